"""How a target model turns its last hidden state h into scores: a fusion of states can then be done on scores.

Every decoder of transformers computes cap(scale (W h + b)), with cap(x) = c tanh(x / c) or x. The names of the settings
differ from model to model, so they are measured: one forward pass of four tokens shows the head's output beside the
model's. What does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibfuse.errors import InputError, VocabularyMismatchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Some models exclude tokens after their head with the lowest number of the dtype instead of -inf.
_EXCLUDED = -1e30
# Log-probabilities have a logsumexp of at most 0 (below where tokens were excluded); rounding adds to it.
_LOG_PROBABILITY_LIMIT = 1e-4


@dataclass(frozen=True, eq=False)
class OutputHead:
    """Hidden states to scores and, but for what a softmax forgets, back to the head's own output."""

    affine: Callable[[Tensor], Tensor]  # h [..., hidden_size] on any device -> W h + b
    hidden_size: int
    scale: float = 1.0  # positive
    soft_cap: float | None = None
    bias: Tensor | None = None  # b, float32; None: there is none

    @torch.no_grad()
    def logits(self, states: Tensor, width: int) -> Tensor:
        """W h + b, float32 [..., width] on the device of `states`; a head that is padded beyond the scores is cut."""
        logits = self.affine(states).to(states.device, torch.float32)
        if logits.shape[-1] < width:
            raise VocabularyMismatchError(
                f"The scores have {width} entries a row, but the target's output head only {logits.shape[-1]}. Is "
                "`target` the model that generates?"
            )
        return logits[..., :width]

    def unbiased_logits(self, states: Tensor, width: int) -> Tensor:
        """W h: `logits` without b."""
        logits = self.logits(states, width)
        return logits if self.bias is None else logits - self.bias[:width].to(logits.device)

    def undo(self, scores: Tensor) -> Tensor:
        """W h + b behind scores, float32 [..., width]; up to a constant per row where they are log-probabilities.

        -inf stays -inf.

        Raises:
            InputError: with a soft cap: log-probabilities (beam search), or scores beyond the cap.
        """
        scores = scores.float()
        if self.soft_cap is None:
            return scores / self.scale
        self._check_capped(scores, self.soft_cap)
        # The nearest float32 to the cap that is not the cap: scores that saturated are as large as can be told.
        ratio = (scores / self.soft_cap).clamp(-1 + 2**-24, 1 - 2**-24)
        uncapped = self.soft_cap / self.scale * torch.atanh(ratio)
        return torch.where(scores < _EXCLUDED, scores, uncapped)

    def redo(self, logits: Tensor) -> Tensor:
        """Scores from W h + b; -inf stays -inf."""
        scaled = logits * self.scale
        if self.soft_cap is None:
            return scaled
        return torch.where(logits < _EXCLUDED, logits, self.soft_cap * torch.tanh(scaled / self.soft_cap))

    def _check_capped(self, scores: Tensor, cap: float) -> None:
        kept = scores.masked_fill(scores < _EXCLUDED, 0.0)
        beyond = kept.abs().amax() > cap * (1 + 1e-5)
        normalised = (scores.logsumexp(dim=-1) < _LOG_PROBABILITY_LIMIT).all()
        is_beyond, is_normalised = torch.stack([beyond, normalised]).tolist()  # one read-out of the device
        if is_normalised:
            raise InputError(
                f"The target soft-caps its logits at {cap:g}, and the scores are log-probabilities (beam search): the "
                "cap cannot be undone, so mode 'embedding' is not exact there. Use sampling or greedy search, or "
                "another mode."
            )
        if is_beyond:
            raise InputError(
                f"The target soft-caps its logits at {cap:g}, but a score is {float(kept.abs().amax()):g}: another "
                "processor (a repetition penalty?) changed the scores, so the cap cannot be undone. Remove that "
                "processor or use another mode than 'embedding'."
            )


@torch.no_grad()
def find_output_head(target: PreTrainedModel) -> OutputHead:
    """Measure a target's output head with one forward pass of four tokens; the target is not changed.

    Raises:
        InputError: it has no output head, or does something after it that is neither a factor nor a soft cap.
    """
    name = type(target).__name__
    module = _head_module(target)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    try:
        scores = target(**_probe(target)).logits
    finally:
        handle.remove()
    if len(seen) != 1:
        raise InputError(
            f"Expected one call of the output head in a forward pass of {name}, saw {len(seen)}: mode 'embedding' "
            "cannot be used with this model."
        )
    states, logits = seen[0]
    width = scores.shape[-1]
    if logits.shape[-1] < width or logits.shape[:-1] != scores.shape[:-1]:
        raise InputError(
            f"{name} makes scores of shape {tuple(scores.shape)} from {tuple(logits.shape)} of its output head: mode "
            "'embedding' cannot be used with this model."
        )
    tolerance = 4.0 * max(torch.finfo(tensor.dtype).eps for tensor in (logits, scores))
    fit = _fit(logits[..., :width].double(), scores.double(), tuple(_declared_caps(target)), tolerance)
    if fit is None:
        raise InputError(
            f"{name} does something after its output head that is neither a constant factor nor a soft cap: mode "
            "'embedding' cannot be exact with this model; use another mode."
        )
    scale, soft_cap = fit
    affine = _movable(module, states)
    bias = affine(states.new_zeros(1, states.shape[-1]))[0].float()
    return OutputHead(
        affine=affine,
        hidden_size=states.shape[-1],
        scale=scale,
        soft_cap=soft_cap,
        bias=bias if bool(bias.any()) else None,
    )


def _movable(module: torch.nn.Module, seen: Tensor) -> Callable[[Tensor], Tensor]:
    """The head for states of any device and dtype, also after the target was moved."""

    def affine(states: Tensor) -> Tensor:
        weight = getattr(module, "weight", None)
        like = seen  # a quantised or offloaded head takes what it took in the probe
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.device.type != "meta":
            like = weight
        logits: Tensor = module(states.to(like.device, like.dtype))
        return logits

    return affine


def _head_module(target: PreTrainedModel) -> torch.nn.Module:
    model: Any = target  # transformers types this method in some versions only
    try:
        module = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        module = None
    if not isinstance(module, torch.nn.Module):
        raise InputError(
            f"{type(target).__name__} has no output head (get_output_embeddings() gives none), which mode 'embedding' "
            "needs."
        )
    return module


def _probe(target: PreTrainedModel) -> dict[str, Tensor]:
    """Four tokens from all over the vocabulary: the vector of one alone (padding) may be zero."""
    config = target.config.get_text_config()
    size = int(config.vocab_size)
    first = config.bos_token_id if isinstance(getattr(config, "bos_token_id", None), int) else 0
    ids = torch.tensor([[min(first, size - 1), size // 4, size // 2, 3 * size // 4]], device=target.device)
    inputs = {"input_ids": ids}
    if getattr(target.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def _declared_caps(target: PreTrainedModel) -> Iterator[float]:
    """Settings that may be a soft cap of the logits, whatever the model calls them."""
    configs: list[Any] = [target.config, target.config.get_text_config(), target.config.get_text_config(decoder=True)]
    found: set[float] = set()
    for config in configs:
        for name, value in config.to_dict().items():
            is_cap = "logit" in name and "cap" in name and not name.startswith("attn")
            if is_cap and isinstance(value, int | float) and value > 0 and value not in found:
                found.add(float(value))
                yield float(value)


def _fit(
    logits: Tensor, scores: Tensor, caps: tuple[float, ...], tolerance: float
) -> tuple[float, float | None] | None:
    """The factor and soft cap with which `logits` give `scores`; None where none do.

    A declared cap is tried first: small logits look uncapped in half precision.
    """
    counted = scores > _EXCLUDED
    logits, scores = logits[counted], scores[counted]
    largest = float(scores.abs().max()) if scores.numel() else 0.0
    if not largest > 0.0 or not float(logits.abs().max()) > 0.0:
        return None
    for cap in (*caps, None):
        uncapped, flat = scores, logits
        if cap is not None:
            inside = scores.abs() < 0.95 * cap  # beyond, rounding is blown up
            flat, uncapped = logits[inside], cap * torch.atanh(scores[inside] / cap)
        scale = float((flat * uncapped).sum() / (flat * flat).sum())
        predicted = logits * scale if cap is None else cap * torch.tanh(logits * scale / cap)
        if scale > 0.0 and float((predicted - scores).abs().max()) <= tolerance * largest:
            return (1.0 if abs(scale - 1.0) < 1e-3 else scale), cap
    return None
