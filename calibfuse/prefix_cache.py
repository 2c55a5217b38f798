"""Which cached rows and tokens a new batch of prefixes can reuse, decided by comparing ids alone.

`generate()` tells a logits processor nothing but `input_ids`: no start of generation, no beam indices, no roll-back
event. Beam search reorders rows between calls, assisted decoding repeats and shortens prefixes, one object serves
many generations. So each new row is matched with the cached row that shares the longest prefix with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Above this many comparisons the whole matrix of rows against rows is made only when rows moved.
_CHEAP_COMPARISONS = 1 << 18


@dataclass(frozen=True)
class Reuse:
    """How to make the cache fit the new prefixes.

    Attributes:
        keep: number of leading tokens that every new row shares with its parent.
        parents: int64 [rows], the cached row that each new row continues; None: the same rows in the same order.
        unchanged: the new prefixes are exactly the cached ones.
    """

    keep: int
    parents: Tensor | None
    unchanged: bool = False


def match_prefixes(cached: Tensor, current: Tensor, readings: Tensor) -> tuple[Reuse, list[float]]:
    """Match new prefixes with cached ones.

    Args:
        cached: int64 [cached_rows, cached_length], the ids behind the cache; at least one row.
        current: int64 [rows, length].
        readings: float [n] on the same device; returned as Python values from the same device read-out.

    Returns:
        The reuse, and the values of `readings`. In the usual decoding steps (one more token, rows reordered or not; or
        the same ids again) the device is read once.
    """
    rows, length = current.shape
    cached_rows, cached_length = cached.shape
    if rows == cached_rows and length in (cached_length, cached_length + 1):
        prefix = current[:, :cached_length]
        if rows * rows * cached_length <= _CHEAP_COMPARISONS and rows > 1:
            same = (prefix[:, None] == cached[None]).all(dim=-1)  # (rows, cached_rows)
            own = same.diagonal()
            # argmax takes the first of equals: the row itself must win over its twins
            preferred = same.to(torch.int8) + torch.diag_embed(own.to(torch.int8))
            parents = preferred.argmax(dim=1)
            own_all, any_all = own.all(), same.any(dim=1).all()
        else:
            parents, own_all = None, (prefix == cached).all()
            any_all = own_all
        own_match, any_match, *values = torch.cat([torch.stack([own_all, any_all]), readings]).tolist()
        if own_match:
            return Reuse(cached_length, None, unchanged=length == cached_length), values
        if any_match:
            return Reuse(min(cached_length, length - 1), parents), values
    else:
        values = readings.tolist()
    return _longest_common_prefixes(cached, current), values


def _longest_common_prefixes(cached: Tensor, current: Tensor) -> Reuse:
    """The general case: any number of rows, any lengths."""
    rows, length = current.shape
    overlap = min(length, cached.shape[1])
    shared = torch.full((rows, cached.shape[0]), overlap, device=current.device)
    if overlap:
        for row in range(rows):  # row by row: the full cube of a large batch would not fit
            differs = current[row, :overlap] != cached[:, :overlap]
            first = differs.to(torch.uint8).argmax(dim=1)
            shared[row] = torch.where(differs.any(dim=1), first, overlap)
    diagonal = torch.arange(min(rows, cached.shape[0]), device=current.device)
    preferred = shared * 2
    preferred[diagonal, diagonal] += 1
    parents = preferred.argmax(dim=1)
    keep = int(shared.gather(1, parents[:, None]).min())
    return Reuse(max(0, min(keep, length - 1)), parents)
