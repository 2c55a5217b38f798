"""Fusion of the target's and the guide's next-token distributions: the arithmetic, and nothing else.

Common to all modes: only those of the target's candidates (candidates.py) that the guide covers are re-ranked.
Both distributions are renormalised over these (so constants of the guide cancel and its head is needed for the
candidates alone), the mode makes new scores, and the result gets the probability mass that the candidates had. Every
other token keeps the target's log-probability exactly: what the guide does not know is never moved, and no tail token
gains.

With t, c, r the renormalised log-probabilities of target, calibrator and reference, and a = alpha:

    contrast    t + clip(a d, -max_shift, 0 or max_shift)         (Liu et al. 2021, DExperts)
                d = c - r, brought nearer to 0 by margin
    geometric   (1 - a) t + a c                                   (log-linear mixture)
    blend       log((1 - a) exp t + a exp c)                      (linear mixture of probabilities)
    value       t + clip(a v, -max_shift, max_shift)              (Meng et al. 2022, NADO)
                v = log R(x_<i, y) - log R(x_<i), R(x_<i) = sum_y exp(t) R(x_<i, y) over the candidates

Dividing by the sum gives a candidate that was lowered part of its loss back, and nearly all of it where it was nearly
certain: the end of a rude word whose beginning is said. With `mass_to_others` the lost mass goes to the others instead:
exp(t) / (nu + exp(-shift) - 1), nu such that the sum is 1. Of all distributions in which the weighted penalties
exp(-shift) - 1 are expected no oftener, this one is nearest to the target's, by the divergence from the target.

One mode is none of these: `embedding`, the source paper's own (Tian et al. 2025), fuses hidden states before the
target's output head, over the whole vocabulary. Its arithmetic is in embedding/fusion.py; here it has its options.

A new mode is one pure function and one line in MODES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import InitVar, asdict, dataclass, fields
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from calibfuse.candidates import choose_candidates
from calibfuse.errors import InputError

MAX_ALPHA = 100.0
_NEWTON_STEPS = 6
_MAX_PENALTY = 1e18  # its square is still a float32
_LEAST_NU = 1e-3  # no candidate is raised by more than its inverse
_TINY = 1e-30
GuideScores = Callable[[str, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How to fuse.

    Attributes:
        mode: a key of MODES: "contrast" (default), "geometric", "blend", "value", "embedding".
        alpha: strength; 0 leaves the target as it is. At most 1 for geometric and blend, where 1 means that the guide
            alone ranks the candidates; below 1 for embedding; at most 100 for the others. Default: the mode's.
        candidates: which of the target's tokens are re-ranked. None (default): those to which it gives a probability of
            at least 0.00005, its best 200 in any case, and the words with a bias below 0. A number: so many of its
            best. 0: the whole vocabulary, which mode embedding always takes.
        one_sided: contrast only lowers tokens, never raises one (raising happens only through renormalisation).
        margin: of contrast: a disagreement of calibrator and reference up to this many nats counts as none, and a
            larger one is smaller by as much. What the two disagree about in calm text is mostly noise.
        max_shift: largest change of a candidate's log-probability in contrast and value mode, before renormalisation,
            in nats.
        mass_to_others: of one-sided contrast: the mass that a candidate loses goes to the others, and none of it comes
            back by renormalisation, however certain it was; see the head of this module.
        hidden_temperature: of mode embedding. True: as published, the target's hidden state gets the weight 1 - alpha,
            which also acts as a temperature of 1 / (1 - alpha). False: it keeps weight 1.
        hold: the former name of `mass_to_others`, for older code and files.
    """

    mode: str = "contrast"
    alpha: float = None  # type: ignore[assignment]  # a float from __post_init__ on: the default hangs on the mode
    candidates: int | None = None
    one_sided: bool = True
    margin: float = 0.0
    max_shift: float = 10.0
    mass_to_others: bool = False
    hidden_temperature: bool = True
    hold: InitVar[bool | None] = None

    def __post_init__(self, hold: bool | None) -> None:
        """Validate.

        Raises:
            InputError: a value is out of range, with the range.
        """
        if not isinstance(self.mode, str) or self.mode not in MODES:
            raise InputError(f"Unknown fusion mode {self.mode!r}; choose one of {', '.join(MODES)}.")
        mode = MODES[self.mode]
        if hold is not None:
            object.__setattr__(self, "mass_to_others", hold)
        if cast("float | None", self.alpha) is None:
            object.__setattr__(self, "alpha", mode.default_alpha)
        if not _is_number(self.alpha) or not mode.allows(self.alpha):
            limit = f"{'below ' if mode.below_max else ''}{mode.max_alpha:g}"
            raise InputError(
                f"alpha must be a number from 0 (off) to {limit} in mode {self.mode!r}, got {self.alpha!r}."
            )
        count = self.candidates
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
            raise InputError(
                f"candidates must be None (by probability), 0 (whole vocabulary) or a positive integer, got {count!r}."
            )
        for name in ("one_sided", "mass_to_others", "hidden_temperature"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if not _is_number(self.margin) or self.margin < 0:
            raise InputError(f"margin must be a number of nats, 0 or more, got {self.margin!r}.")
        if not _is_number(self.max_shift, allow_infinity=True) or not self.max_shift > 0:
            raise InputError(f"max_shift must be a positive number of nats, got {self.max_shift!r}.")
        for name in ("alpha", "margin", "max_shift"):
            object.__setattr__(self, name, float(getattr(self, name)))  # plain numbers, which JSON can hold

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FusionConfig:
        """Inverse of `to_dict`.

        Raises:
            InputError: unknown keys, or values out of range.
        """
        values = _present_names(values)
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InputError(f"Unknown fusion options: {', '.join(unknown)}; known are {', '.join(known)}.")
        return cls(**values)


def recommended_config(recommended: Mapping[str, Any], options: Mapping[str, Any]) -> FusionConfig:
    """A guide's recommended options, overridden by the user's.

    A recommendation belongs to its mode: when the user asks for another mode, only the user's options count.

    Args:
        recommended: `Guide.recommended`.
        options: of FusionConfig.

    Returns:
        The config.

    Raises:
        InputError: unknown keys, or values out of range.
    """
    if options.get("mode", recommended.get("mode", FusionConfig.mode)) == recommended.get("mode", FusionConfig.mode):
        options = {**_present_names(recommended), **_present_names(options)}
    return FusionConfig.from_dict(options)


def _present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their present names: `mass_to_others` was `hold`."""
    return {"mass_to_others" if name == "hold" else name: value for name, value in values.items()}


def _is_number(value: object, *, allow_infinity: bool = False) -> bool:
    # Real: NumPy's numbers too, as a sweep over strengths gives them
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        return False
    return allow_infinity or not math.isinf(value)


@dataclass(frozen=True)
class Mode:
    """One way of fusing.

    Attributes:
        fuse: (target log-probabilities, guide log-probabilities by head, fixed entries, config) -> new scores, all
            [..., k]. None: the mode fuses hidden states, and needs the target's output head (embedding/fusion.py).
        heads: heads of the guide that it needs.
        max_alpha: upper end of alpha.
        default_alpha: alpha where none is given.
        below_max: alpha must be less than `max_alpha`.
        options: the options of FusionConfig, besides alpha, that this mode reads.
    """

    fuse: Callable[[Tensor, Mapping[str, Tensor], Tensor, FusionConfig], Tensor] | None
    heads: tuple[str, ...]
    max_alpha: float
    default_alpha: float = 1.0
    below_max: bool = False
    options: tuple[str, ...] = ("candidates",)

    def allows(self, alpha: float) -> bool:
        """Whether a number is a strength of this mode."""
        return 0.0 <= alpha <= self.max_alpha and not (self.below_max and alpha == self.max_alpha)


def _contrast(target: Tensor, guide: Mapping[str, Tensor], fixed: Tensor, config: FusionConfig) -> Tensor:
    disagreement = guide["calibrator"] - guide["reference"]
    if config.margin:
        disagreement = functional.softshrink(disagreement, config.margin)
    shift = config.alpha * disagreement
    fused = target + shift.clamp(-config.max_shift, 0.0 if config.one_sided else config.max_shift)
    return _give_to_others(target, fused, fixed) if config.mass_to_others and config.one_sided else fused


def _geometric(target: Tensor, guide: Mapping[str, Tensor], fixed: Tensor, config: FusionConfig) -> Tensor:
    if config.alpha == 1.0:  # 0 * -inf would be nan where the target excludes a token
        return torch.where(target == -torch.inf, target, guide["calibrator"])
    return (1.0 - config.alpha) * target + config.alpha * guide["calibrator"]


def _blend(target: Tensor, guide: Mapping[str, Tensor], fixed: Tensor, config: FusionConfig) -> Tensor:
    if config.alpha == 1.0:
        mixed = guide["calibrator"]
    else:
        mixed = torch.logaddexp(
            target + math.log1p(-config.alpha), guide["calibrator"] + math.log(max(config.alpha, 1e-300))
        )
    # A token that the target excludes (bad words, a grammar) must not come back through the mixture.
    return torch.where(target == -torch.inf, target, mixed)


def _value(target: Tensor, guide: Mapping[str, Tensor], fixed: Tensor, config: FusionConfig) -> Tensor:
    # guide["value"] is relative to its expectation under the target (`_relative`): what the clip bounds is how much a
    # token is better or worse than the target's average one, however hopeless the prefix is.
    return target + (config.alpha * guide["value"]).clamp(-config.max_shift, config.max_shift)


_OF_CONTRAST = ("candidates", "one_sided", "margin", "max_shift", "mass_to_others")
MODES: dict[str, Mode] = {
    "contrast": Mode(_contrast, ("calibrator", "reference"), MAX_ALPHA, options=_OF_CONTRAST),
    "geometric": Mode(_geometric, ("calibrator",), 1.0, default_alpha=0.3),
    "blend": Mode(_blend, ("calibrator",), 1.0, default_alpha=0.3),
    "value": Mode(_value, ("value",), MAX_ALPHA, options=("candidates", "max_shift")),
    "embedding": Mode(None, ("calibrator",), 1.0, default_alpha=0.1, below_max=True, options=("hidden_temperature",)),
}
# Heads whose scores are log-probabilities up to a constant; the value head's are log R.
_DISTRIBUTION_HEADS = ("calibrator", "reference")


def fuse(
    scores: Tensor,
    guide_scores: GuideScores,
    covers: Callable[[Tensor], Tensor],
    config: FusionConfig,
    always: Tensor | None = None,
) -> Tensor:
    """Fuse next-token scores with a guide.

    Args:
        scores: float [..., target_vocab_size], logits or log-probabilities (a constant per row changes nothing); -inf
            where a token is excluded. Not modified.
        guide_scores: (head, token_ids int64 [..., k] or None) -> float [..., k], log-probabilities up to a constant per
            row, or log R of the head "value" (a constant per row cancels there as well). Asked for the needed heads and
            the candidates only; None when every token is a candidate: then the last axis is the guide's whole
            vocabulary, which may be wider or narrower than the scores.
        covers: token_ids int64 [...] -> bool, True where the guide knows the token.
        config: how.
        always: int64 [n], ids that are candidates whatever their probability; see `choose_candidates`.

    Returns:
        Normalised log-probabilities, float32 [..., target_vocab_size], nats. -inf stays -inf; tokens that are no
        covered candidates keep the target's log-probability; with alpha 0 all do.

    Raises:
        InputError: the mode fuses hidden states, which scores do not tell.
    """
    log_probs = scores.float().log_softmax(dim=-1)
    if config.alpha == 0.0:
        return log_probs
    mode = MODES[config.mode]
    if mode.fuse is None:
        raise InputError(
            f"Mode {config.mode!r} fuses hidden states, not distributions: use embedding.fusion.EmbeddingFusion."
        )
    vocab_size = log_probs.shape[-1]
    token_ids, values, is_candidate = choose_candidates(log_probs, config.candidates, always)
    covered = covers(torch.arange(vocab_size, device=scores.device) if token_ids is None else token_ids)
    if is_candidate is not None:
        covered = covered & is_candidate
    fixed = ~(covered & (values > -torch.inf))
    mass = values.masked_fill(fixed, -torch.inf).logsumexp(dim=-1, keepdim=True)
    target = _renormalise(values, fixed)
    guide = {}
    for head in mode.heads:
        raw = _fit(guide_scores(head, token_ids), values.shape[-1])
        guide[head] = _renormalise(raw, fixed) if head in _DISTRIBUTION_HEADS else _relative(raw, target, fixed)
    fused = mode.fuse(target, guide, fixed, config)
    fused = _renormalise(fused, fixed)
    values = torch.where(fixed, values, fused + mass)
    if token_ids is None:
        return values
    # In place where autograd does not need the old values: they are a copy of the scores already.
    scatter = log_probs.scatter if log_probs.requires_grad else log_probs.scatter_
    return scatter(-1, token_ids, values)


def _give_to_others(target: Tensor, lowered: Tensor, fixed: Tensor) -> Tensor:
    """Log of exp(target) / (nu + exp(target - lowered) - 1), with the nu in (0, 1] for which the sum is 1.

    Newton's method on 1 / sum - 1, which is concave in nu: begun at a lower bound (no part of the sum may exceed 1) it
    comes nearer from below with every step. What is left of an error the caller's renormalisation takes away.
    """
    penalty = torch.expm1(target - lowered).clamp(max=_MAX_PENALTY)
    probability = target.exp().masked_fill(fixed, 0.0)
    untouched = torch.where(penalty == 0.0, probability, 0.0).sum(dim=-1, keepdim=True)
    nu = (probability - penalty).amax(dim=-1, keepdim=True).maximum(untouched).clamp(min=_LEAST_NU)
    for _ in range(_NEWTON_STEPS):
        share = 1.0 / (nu + penalty)
        total = (probability * share).sum(dim=-1, keepdim=True)
        slope = (probability * share * share).sum(dim=-1, keepdim=True)
        nu = (nu + total * (total - 1.0) / slope.clamp(min=_TINY)).clamp(_LEAST_NU, 1.0)
    return target - (nu + penalty).log()


def _fit(guide_scores: Tensor, width: int) -> Tensor:
    """Cut or fill up to the width of a model head that is narrower or wider than the tokenizer; fillers are unused."""
    missing = width - guide_scores.shape[-1]
    return functional.pad(guide_scores, (0, missing)) if missing else guide_scores  # a negative pad cuts


def _renormalise(scores: Tensor, fixed: Tensor) -> Tensor:
    """Log-softmax over the entries that are not fixed; 0 at the fixed ones, also in a row that has no others."""
    return scores.masked_fill(fixed, -torch.inf).log_softmax(dim=-1).masked_fill(fixed, 0.0)


def _relative(log_r: Tensor, target: Tensor, fixed: Tensor) -> Tensor:
    """Log R of each candidate minus log of its expectation under the target's candidates; 0 at the fixed entries."""
    expected = (target + log_r).masked_fill(fixed, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return (log_r - expected).masked_fill(fixed, 0.0)
