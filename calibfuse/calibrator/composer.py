"""Token vectors composed from bytes: what lets one calibrator serve every vocabulary.

A weighted sum of rows of a hashed table, picked by features of the bytes (docs/how-it-works.md), and a residual MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

BEGIN_MARK, END_MARK = 256, 257
_WHOLE_A, _WHOLE_B, _FOLDED, _SHAPE, _TRIGRAM, _TETRAGRAM, _SCRIPT = range(1, 8)
# Odd multipliers of the polynomial string hashes; any fixed odd 64-bit numbers do, but they are part of the format.
_MULTIPLIER = {_WHOLE_A: 0x9E3779B97F4A7C15, _WHOLE_B: 0xC2B2AE3D27D4EB4F, _FOLDED: 0x165667B19E3779F9}
_INVERSE = {kind: pow(multiplier, -1, 1 << 64) for kind, multiplier in _MULTIPLIER.items()}
_MAX_SHAPE_LENGTH = 15


@dataclass(frozen=True)
class TokenFeatures:
    """Hashed features of many tokens in compressed-row form."""

    buckets: NDArray[np.int32]  # [total], rows of the table, token after token
    weights: NDArray[np.float32]  # [total]
    offsets: NDArray[np.int64]  # [tokens + 1]; the features of token i are buckets[offsets[i]:offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, token_ids: NDArray[np.int64]) -> TokenFeatures:
        """The features of the given tokens, in the given order."""
        starts = self.offsets[token_ids]
        counts = self.offsets[token_ids + 1] - starts
        offsets = np.append(0, np.cumsum(counts))
        index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        return TokenFeatures(self.buckets[index], self.weights[index], offsets)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def _string_hashes(
    data: NDArray[np.uint8], offsets: NDArray[np.int64], starts: NDArray[np.int64], kind: int
) -> NDArray[np.uint64]:
    """Hash of data[starts[i]:offsets[i + 1]] for every token: the sum of (byte + 1) * multiplier ** position."""
    longest = int((offsets[1:] - starts).max(initial=0))
    powers = np.cumprod(np.full(longest + 1, _MULTIPLIER[kind], dtype=np.uint64)) * np.uint64(_INVERSE[kind])
    # Positions are counted from `starts`; bytes before it (a leading space) get factor zero.
    position_of_byte = np.arange(len(data)) - np.repeat(starts, np.diff(offsets))
    factors = powers[np.maximum(position_of_byte, 0)]
    factors[position_of_byte < 0] = 0
    running = np.append(np.uint64(0), np.cumsum((data.astype(np.uint64) + np.uint64(1)) * factors))
    sums = running[offsets[1:]] - running[offsets[:-1]]
    return _mix(sums * np.uint64(8) + np.uint64(kind))


def _shape_codes(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One code per token of: leading space, kinds of bytes it holds, capital first letter, length up to 15."""
    lengths = np.diff(offsets)
    lower = (data >= 97) & (data <= 122)
    upper = (data >= 65) & (data <= 90)
    digit = (data >= 48) & (data <= 57)
    high = data >= 128
    blank = (data == 32) | ((data >= 9) & (data <= 13))
    other = ~(lower | upper | digit | high | blank)
    code = np.zeros(len(lengths), dtype=np.uint64)
    for bit, flag in enumerate((lower, upper, digit, high, blank, other)):
        running = np.append(0, np.cumsum(flag))
        present = running[offsets[1:]] > running[offsets[:-1]]
        code |= present.astype(np.uint64) << np.uint64(bit)
    first = _first_bytes(data, offsets)
    starts_blank = (lengths > 0) & (first == 32)
    second = data[np.minimum(offsets[:-1] + starts_blank, max(len(data) - 1, 0))] if len(data) else first
    capital = (lengths > starts_blank) & (second >= 65) & (second <= 90)
    code |= starts_blank.astype(np.uint64) << np.uint64(6)
    code |= capital.astype(np.uint64) << np.uint64(7)
    code |= np.minimum(lengths, _MAX_SHAPE_LENGTH).astype(np.uint64) << np.uint64(8)
    return code


def _first_bytes(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.uint8]:
    if not len(data):
        return np.zeros(len(offsets) - 1, dtype=np.uint8)
    first = data[np.minimum(offsets[:-1], len(data) - 1)]
    return np.where(np.diff(offsets) > 0, first, 0).astype(np.uint8)


@np.errstate(over="ignore")
def token_features(data: NDArray[np.uint8], offsets: NDArray[np.int64], bucket_count: int) -> TokenFeatures:
    """Hash the features of all tokens of a vocabulary at once; tokens without bytes have none.

    `data`: uint8, the bytes of all tokens one after the other; `offsets`: int64 [tokens + 1].
    """
    lengths = np.diff(offsets)
    count = len(lengths)
    token_of_byte = np.repeat(np.arange(count), lengths)

    # The text of all tokens with marks: token i occupies marked[offsets[i] + 2 i : offsets[i + 1] + 2 (i + 1)].
    marked = np.full(len(data) + 2 * count, BEGIN_MARK, dtype=np.uint64)
    marked[np.arange(len(data)) + 2 * token_of_byte + 1] = data
    marked[offsets[1:] + 2 * np.arange(count) + 1] = END_MARK
    token_of_mark = np.repeat(np.arange(count), lengths + 2)

    pieces: list[NDArray[np.uint64]] = []
    owners: list[NDArray[np.int64]] = []
    for width, kind in ((3, _TRIGRAM), (4, _TETRAGRAM)):
        if len(marked) < width:
            continue
        gram = np.full(len(marked) - width + 1, kind, dtype=np.uint64)
        for i in range(width):
            gram = gram * np.uint64(259) + marked[i : len(marked) - width + 1 + i]
        inside = token_of_mark[: len(gram)] == token_of_mark[width - 1 :]
        inside &= lengths[token_of_mark[: len(gram)]] > 0
        pieces.append(_mix(gram[inside]))
        owners.append(token_of_mark[: len(gram)][inside])
    if len(data) > 1:
        script = (data[:-1] >= 0xC0) & (token_of_byte[:-1] == token_of_byte[1:])
        pair = data[:-1].astype(np.uint64) * np.uint64(256) + data[1:].astype(np.uint64)
        pieces.append(_mix(pair[script] * np.uint64(8) + np.uint64(_SCRIPT)))
        owners.append(token_of_byte[:-1][script])

    filled = np.flatnonzero(lengths > 0)
    gram_owner = np.concatenate(owners) if owners else np.zeros(0, dtype=np.int64)
    gram_count = np.bincount(gram_owner, minlength=count)
    gram_weight = 1.0 / np.sqrt(np.maximum(gram_count, 1))

    starts = offsets[:-1]
    bare_starts = starts + ((lengths > 1) & (_first_bytes(data, offsets) == 32))
    folded = np.where((data >= 65) & (data <= 90), data + 32, data).astype(np.uint8)
    whole = [
        _string_hashes(data, offsets, starts, _WHOLE_A),
        _string_hashes(data, offsets, starts, _WHOLE_B),
        _string_hashes(folded, offsets, bare_starts, _FOLDED),
        _mix(_shape_codes(data, offsets) * np.uint64(8) + np.uint64(_SHAPE)),
    ]
    hashes = np.concatenate([values[filled] for values in whole] + pieces)
    owner = np.concatenate([filled] * len(whole) + [gram_owner])
    weights = np.concatenate([np.ones(len(filled) * len(whole)), gram_weight[gram_owner]])
    order = np.argsort(owner, kind="stable")
    buckets = (hashes % np.uint64(bucket_count)).astype(np.int32)
    result_offsets = np.append(0, np.cumsum(np.bincount(owner, minlength=count)))
    return TokenFeatures(buckets[order], weights[order].astype(np.float32), result_offsets)


class Composer(nn.Module):
    """Token features -> one vector per token and one output bias per head; see CalibratorConfig for the sizes.

    Vectors longer than `max_norm` are shortened to it.
    """

    def __init__(
        self, *, bucket_count: int, token_width: int, hidden_width: int, head_count: int, max_norm: float = math.inf
    ) -> None:
        super().__init__()
        self.max_norm = max_norm
        self.token_width = token_width
        self.bucket_count = bucket_count
        # One table: the first `token_width` columns are vectors, the others the heads' biases.
        self.table = nn.Parameter(torch.zeros(bucket_count, token_width + head_count))
        nn.init.normal_(self.table[:, :token_width], std=0.02)
        self.norm = nn.RMSNorm(token_width, eps=1e-6)
        self.up = nn.Linear(token_width, hidden_width)
        self.down = nn.Linear(hidden_width, token_width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, features: TokenFeatures) -> tuple[Tensor, Tensor]:
        """Vectors [tokens, token_width] and biases [tokens, heads]; those of tokens without bytes mean nothing."""
        device = self.table.device
        sums = nn.functional.embedding_bag(
            torch.from_numpy(features.buckets).to(device),
            self.table,
            torch.from_numpy(features.offsets[:-1]).to(device=device, dtype=torch.int32),
            mode="sum",
            per_sample_weights=torch.from_numpy(features.weights).to(device=device, dtype=self.table.dtype),
        )
        vectors, biases = sums[:, : self.token_width], sums[:, self.token_width :]
        vectors = vectors + self.down(nn.functional.gelu(self.up(self.norm(vectors))))
        # A byte string unlike all of training can come out four times as long as words do, and would then take several
        # percent of the probability in every context.
        if self.max_norm < math.inf:
            norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
            vectors = vectors * (self.max_norm / norms.clamp(min=self.max_norm))
        return vectors, biases
