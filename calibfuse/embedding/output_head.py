"""How a target turns its last hidden state h into scores: cap(scale (W h + b)), with cap(x) = c tanh(x / c) or x.

Factor and cap stand in its config, under the names below; one forward pass of four tokens makes sure of them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from calibfuse.errors import InputError, VocabularyMismatchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALES = ("logit_scale", "lm_head_multiplier", "logits_scaling")  # some models divide by what others multiply with
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Some models exclude tokens after their head with the lowest number of the dtype instead of -inf.
_EXCLUDED = -1e30
# Log-probabilities have a logsumexp of at most 0 (below where tokens were excluded); rounding adds to it.
_LOG_PROBABILITY_LIMIT = 1e-4


@dataclass(frozen=True, eq=False)
class OutputHead:
    """Hidden states to scores and, but for what a softmax forgets, back to the head's own output."""

    linear: torch.nn.Linear
    scale: float = 1.0  # positive
    soft_cap: float | None = None

    @torch.no_grad()
    def logits(self, states: Tensor, width: int, *, bias: bool = True) -> Tensor:
        """W h + b, or W h: float32 [..., width] on the device of `states`; a head padded beyond the scores is cut."""
        weight = self.linear.weight
        if len(weight) < width:
            raise VocabularyMismatchError(
                f"The scores have {width} entries a row, but the target's output head only {len(weight)}. Is `target` "
                "the model that generates?"
            )
        moved = states.to(weight.device, weight.dtype)
        logits = functional.linear(moved, weight, self.linear.bias if bias else None)
        return logits.to(states.device, torch.float32)[..., :width]

    def undo(self, scores: Tensor) -> Tensor:
        """W h + b behind scores, float32 [..., width]; up to a constant per row where they are log-probabilities.

        Raises:
            InputError: with a soft cap: log-probabilities (beam search), or scores beyond the cap.
        """
        scores, cap = scores.float(), self.soft_cap
        if cap is None:
            return scores / self.scale
        excluded = scores < _EXCLUDED
        is_beyond = scores.masked_fill(excluded, 0.0).abs().amax() > cap * (1 + 1e-5)
        if bool(is_beyond | (scores.logsumexp(dim=-1) < _LOG_PROBABILITY_LIMIT).all()):
            raise InputError(
                f"The target soft-caps its logits at {cap:g}, and the scores are not what its head gave, but "
                "log-probabilities (beam search) or changed by another processor (a repetition penalty?), so that the "
                "cap cannot be undone: decode without these, or in another mode than 'embedding'."
            )
        # The nearest float32 to the cap that is not the cap: scores that saturated are as large as can be told.
        ratio = (scores / cap).clamp(-1 + 2**-24, 1 - 2**-24)
        return torch.where(excluded, scores, cap / self.scale * torch.atanh(ratio))

    def redo(self, logits: Tensor) -> Tensor:
        """Scores from W h + b; -inf stays -inf."""
        scaled = logits * self.scale
        if self.soft_cap is None:
            return scaled
        return torch.where(logits < _EXCLUDED, logits, self.soft_cap * torch.tanh(scaled / self.soft_cap))


@torch.no_grad()
def find_output_head(target: PreTrainedModel) -> OutputHead:
    """The output head of a target, which is not changed.

    Raises:
        InputError: it is not linear, or what follows it is neither a factor nor a soft cap of the config.
    """
    model: Any = target  # transformers types its methods in some versions only
    name, config = type(target).__name__, target.config.get_text_config()
    linear = model.get_output_embeddings()
    weight: Any = getattr(linear, "weight", None)
    is_plain = isinstance(linear, torch.nn.Linear) and weight.is_floating_point() and weight.device.type != "meta"
    if not is_plain or target.config.is_encoder_decoder:
        raise InputError(
            f"{name} has no output head that mode 'embedding' can use: it needs a decoder-only model with a "
            "torch.nn.Linear as head, neither quantised nor offloaded; use another mode."
        )
    # From all over the vocabulary: the vector of one token alone (padding) may be zero.
    ids = torch.tensor([[0, config.vocab_size // 4, config.vocab_size // 2, 3 * config.vocab_size // 4]])
    seen: list[Tensor] = []
    handle = linear.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        scores = model(ids.to(target.device)).logits
    finally:
        handle.remove()
    numbers = [[getattr(config, key, None) for key in keys] for keys in (_SCALES, _SOFT_CAPS)]
    scales, caps = ([each for each in found if isinstance(each, int | float) and each > 0] for found in numbers)
    # A declared cap is tried first: small logits look uncapped in half precision.
    for cap, scale in itertools.product([*caps, None], [1.0, *scales, *(1 / each for each in scales)]):
        head = OutputHead(linear, scale, cap)
        if len(seen) == 1 and _gives(head, seen[0], scores):
            return head
    raise InputError(
        f"{name} does something with the output of its head that is neither a factor nor a soft cap of its config: "
        "mode 'embedding' cannot be exact with this model; use another mode."
    )


def _gives(head: OutputHead, logits: Tensor, scores: Tensor) -> bool:
    if logits.shape != scores.shape:
        return False
    tolerance = 4.0 * max(torch.finfo(each.dtype).eps for each in (logits, scores))
    counted = scores > _EXCLUDED
    wanted, found = scores[counted].double(), head.redo(logits.double())[counted]
    return bool(wanted.any()) and float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())
