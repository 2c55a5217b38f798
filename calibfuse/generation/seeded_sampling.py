"""Sampling as a logits processor: truncation and a draw whose randomness belongs to the row, not to the batch.

`generate(do_sample=True)` draws all rows from one generator, so a continuation depends on its neighbours. Here the last
processor draws by the Gumbel-max trick (Maddison et al. 2014) with noise that is a hash of row key, step and token id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from calibfuse.errors import InputError
from calibfuse.generation.decoding import Decoding, generate_tokens

_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of splitmix64 (Steele et al. 2014), as signed numbers
_INCREMENT = -0x61C8864680B583EB


def nucleus(log_probs: Tensor, *, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """The best tokens of each row up to a probability (Holtzman et al. 2020) and a count: bool [rows, vocabulary].

    `log_probs` are float32 [rows, vocabulary], normalised; `top_p` 1 and `top_k` 0 are off. Tokens exactly as likely as
    the last one inside are inside, too.
    """
    inside = log_probs > -torch.inf
    if 0 < top_k < log_probs.shape[-1]:
        inside &= log_probs >= log_probs.topk(top_k, dim=-1).values[:, -1:]
    if top_p < 1.0:
        values = _descending(log_probs)
        probabilities = values.exp()
        count = (probabilities.cumsum(dim=-1) - probabilities < top_p).sum(dim=-1, keepdim=True)
        inside &= log_probs >= values.gather(-1, count - 1)  # the best token is always inside, so count is at least 1
    return inside


def _descending(values: Tensor) -> Tensor:
    """Each row sorted, best first. On a CPU numpy's sort is several times as fast: it moves no indices."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    return values.sort(dim=-1, descending=True).values


def row_key(seed: int, prompt_id: str, text: str, sample: int) -> int:
    """The key of one continuation's randomness, a signed 64-bit number."""
    digest = hashlib.sha256(f"{seed}\0{prompt_id}\0{text}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def gumbel_noise(keys: Tensor, step: int, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise as a pure function of row key (int64 [n]), step and token (int64 [n]): float64 [n]."""
    steps = torch.full_like(keys, step) * _INCREMENT  # tensors wrap around where Python's numbers grow
    mixed = _mix(_mix(keys + steps) + token_ids * _INCREMENT)
    uniform = (_shift(mixed, 11).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _mix(values: Tensor) -> Tensor:
    values = values + _INCREMENT
    values = (values ^ _shift(values, 30)) * _MULTIPLIERS[0]
    values = (values ^ _shift(values, 27)) * _MULTIPLIERS[1]
    return values ^ _shift(values, 31)


def _shift(values: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own copies the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


class SeededSampling(LogitsProcessor):
    """Draws the next token of each row; must be the last processor, under `do_sample=False`.

    `keys` has one key per row, see `row_key`; `prompt_length` counts the columns of `input_ids` before the first new
    token; of `decoding` temperature and truncation are used.
    """

    supports_continuous_batching = False

    def __init__(self, keys: Sequence[int], prompt_length: int, decoding: Decoding) -> None:
        self._keys = torch.tensor(list(keys), dtype=torch.int64)
        self._prompt_length = prompt_length
        self._decoding = decoding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose: 0 for the token drawn, -inf for all others, float32 [rows, vocabulary].

        `scores` are logits or log-probabilities. Rows that are not those of the keys (beams) are an InputError.
        """
        if len(self._keys) != scores.shape[0]:
            raise InputError(f"Sampling was set up for {len(self._keys)} rows, but got scores of {scores.shape[0]}.")
        log_probs = (scores.float() / self._decoding.temperature).log_softmax(dim=-1)
        inside = nucleus(log_probs, top_p=self._decoding.top_p, top_k=self._decoding.top_k)
        # float64 does not exist on MPS, and float32 noise has too few bits for rare tokens
        place = torch.device("cpu") if scores.device.type == "mps" else scores.device
        rows, ids = inside.to(place).nonzero(as_tuple=True)
        noise = gumbel_noise(self._keys.to(place)[rows], input_ids.shape[1] - self._prompt_length, ids)
        perturbed = torch.full(scores.shape, -torch.inf, dtype=torch.float64, device=place)
        perturbed[rows, ids] = log_probs.to(place)[rows, ids].double() + noise
        chosen = perturbed.argmax(dim=-1, keepdim=True).to(scores.device)
        return torch.full_like(log_probs, -torch.inf).scatter(-1, chosen, 0.0)


def draw_tokens(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    keys: Sequence[int],
    processors: Sequence[LogitsProcessor],
    decoding: Decoding,
    padding_id: int | None,
    end_ids: Iterable[int] = (),
) -> Tensor:
    """Decode a batch with `SeededSampling` behind the processors, up to one of `end_ids`; see `generate_tokens`."""
    draw = SeededSampling(keys, max(map(len, rows)), decoding)
    options: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "eos_token_id": sorted(end_ids) or None}
    return generate_tokens(model, rows, [*processors, draw], padding_id, **options, do_sample=False, num_beams=1)
