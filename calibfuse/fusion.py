"""Fusion of the target's and the guide's next-token distributions: the arithmetic, and nothing else.

Common to all modes: only the target's `candidates` best tokens that the guide covers are re-ranked. Both distributions
are renormalised over these (so constants of the guide cancel and its head is needed for the candidates alone), the mode
makes new scores, and the result gets the probability mass that the candidates had. Every other token keeps the target's
log-probability exactly: what the guide does not know is never moved, and no tail token gains.

With t, c, r the renormalised log-probabilities of target, calibrator and reference, and a = alpha:

    contrast    t + clip(a (c - r), -max_shift, 0 or max_shift)   (Liu et al. 2021, DExperts, with a twin as reference)
    geometric   (1 - a) t + a c                                   (log-linear mixture)
    blend       log((1 - a) exp t + a exp c)                      (linear mixture of probabilities)
    value       t + a log R                                       (Meng et al. 2022, NADO)

A new mode is one pure function and one line in MODES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from calibfuse.errors import InputError

MAX_ALPHA = 100.0
GuideScores = Callable[[str, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How to fuse.

    Attributes:
        mode: a key of MODES: "contrast" (default), "geometric", "blend", "value".
        alpha: strength; 0 leaves the target as it is. At most 1 for geometric and blend, where 1 means that the guide
            alone ranks the candidates; at most 100 for the others.
        candidates: how many of the target's best tokens are re-ranked; 0 means the whole vocabulary.
        one_sided: contrast only lowers tokens, never raises one (raising happens only through renormalisation).
        max_shift: largest change of a candidate's log-probability in contrast and value mode, before renormalisation,
            in nats.
    """

    mode: str = "contrast"
    alpha: float = 1.0
    candidates: int = 200
    one_sided: bool = True
    max_shift: float = 10.0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value is out of range, with the range.
        """
        if self.mode not in MODES:
            raise InputError(f"Unknown fusion mode {self.mode!r}; choose one of {', '.join(MODES)}.")
        limit = MODES[self.mode].max_alpha
        if not _is_number(self.alpha) or not 0.0 <= self.alpha <= limit:
            raise InputError(f"alpha must be a number from 0 (off) to {limit:g} in mode {self.mode!r}, got {self.alpha!r}.")
        if not isinstance(self.candidates, int) or isinstance(self.candidates, bool) or self.candidates < 0:
            raise InputError(f"candidates must be 0 (whole vocabulary) or a positive integer, got {self.candidates!r}.")
        if not isinstance(self.one_sided, bool):
            raise InputError(f"one_sided must be True or False, got {self.one_sided!r}.")
        if not _is_number(self.max_shift, allow_infinity=True) or not self.max_shift > 0:
            raise InputError(f"max_shift must be a positive number of nats, got {self.max_shift!r}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FusionConfig:
        """Inverse of `to_dict`.

        Raises:
            InputError: unknown keys, or values out of range.
        """
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InputError(f"Unknown fusion options: {', '.join(unknown)}; known are {', '.join(known)}.")
        return cls(**values)


def _is_number(value: object, *, allow_infinity: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return False
    return allow_infinity or not math.isinf(value)


@dataclass(frozen=True)
class Mode:
    """One way of fusing.

    Attributes:
        fuse: (target log-probabilities, guide log-probabilities by head, config) -> new scores, all [..., k].
        heads: heads of the guide that it needs.
        max_alpha: upper end of alpha.
    """

    fuse: Callable[[Tensor, Mapping[str, Tensor], FusionConfig], Tensor]
    heads: tuple[str, ...]
    max_alpha: float


def _contrast(target: Tensor, guide: Mapping[str, Tensor], config: FusionConfig) -> Tensor:
    shift = config.alpha * (guide["calibrator"] - guide["reference"])
    return target + shift.clamp(-config.max_shift, 0.0 if config.one_sided else config.max_shift)


def _geometric(target: Tensor, guide: Mapping[str, Tensor], config: FusionConfig) -> Tensor:
    if config.alpha == 1.0:  # 0 * -inf would be nan where the target excludes a token
        return torch.where(target == -torch.inf, target, guide["calibrator"])
    return (1.0 - config.alpha) * target + config.alpha * guide["calibrator"]


def _blend(target: Tensor, guide: Mapping[str, Tensor], config: FusionConfig) -> Tensor:
    if config.alpha == 1.0:
        mixed = guide["calibrator"]
    else:
        mixed = torch.logaddexp(
            target + math.log1p(-config.alpha), guide["calibrator"] + math.log(max(config.alpha, 1e-300))
        )
    # A token that the target excludes (bad words, a grammar) must not come back through the mixture.
    return torch.where(target == -torch.inf, target, mixed)


def _value(target: Tensor, guide: Mapping[str, Tensor], config: FusionConfig) -> Tensor:
    return target + (config.alpha * guide["value"]).clamp(-config.max_shift, config.max_shift)


MODES: dict[str, Mode] = {
    "contrast": Mode(_contrast, ("calibrator", "reference"), MAX_ALPHA),
    "geometric": Mode(_geometric, ("calibrator",), 1.0),
    "blend": Mode(_blend, ("calibrator",), 1.0),
    "value": Mode(_value, ("value",), MAX_ALPHA),
}
# Heads whose scores are log-probabilities up to a constant; the value head's are log R, with its own zero.
_DISTRIBUTION_HEADS = ("calibrator", "reference")


def fuse(
    scores: Tensor,
    guide_scores: GuideScores,
    covers: Callable[[Tensor], Tensor],
    config: FusionConfig,
) -> Tensor:
    """Fuse next-token scores with a guide.

    Args:
        scores: float [..., target_vocab_size], logits or log-probabilities (a constant per row changes nothing); -inf
            where a token is excluded. Not modified.
        guide_scores: (head, token_ids int64 [..., k] or None) -> float [..., k], log-probabilities up to a constant per
            row. Asked for the needed heads and the candidates only; None is passed when every token is a candidate.
        covers: token_ids int64 [...] -> bool, True where the guide knows the token.
        config: how.

    Returns:
        Normalised log-probabilities, float32 [..., target_vocab_size], nats. -inf stays -inf; tokens that are no covered
        candidates keep the target's log-probability; with alpha 0 all do.
    """
    log_probs = scores.float().log_softmax(dim=-1)
    if config.alpha == 0.0:
        return log_probs
    mode = MODES[config.mode]
    vocab_size = log_probs.shape[-1]
    if 0 < config.candidates < vocab_size:
        values, token_ids = log_probs.topk(config.candidates, dim=-1, sorted=False)
    else:
        values = log_probs
        token_ids = torch.arange(vocab_size, device=scores.device).expand(log_probs.shape)
    movable = covers(token_ids) & (values > -torch.inf)
    target, mass = _renormalise(values, movable)
    guide = {}
    for head in mode.heads:
        raw = guide_scores(head, token_ids)
        guide[head] = _renormalise(raw, movable)[0] if head in _DISTRIBUTION_HEADS else raw
    fused, _ = _renormalise(mode.fuse(target, guide, config), movable)
    values = torch.where(movable, fused + mass, values)
    return log_probs.scatter(-1, token_ids, values)


def _renormalise(scores: Tensor, movable: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax over the movable entries (0 elsewhere), and the log of their sum [..., 1]."""
    inside = scores.masked_fill(~movable, -torch.inf)
    mass = inside.logsumexp(dim=-1, keepdim=True)
    # A row without movable entries has mass -inf; nothing of it is used.
    mass = mass.masked_fill(mass == -torch.inf, 0.0)
    return (scores - mass).masked_fill(~movable, 0.0), mass
