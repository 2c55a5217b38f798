"""The rows of a generation as texts of a session, told apart by comparing ids alone.

`generate()` says nothing of starts, beams or roll-backs: each new row continues the text that shares most with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calibfuse.guide import Guide, NextTokenScores, Request

# Above this many comparisons the whole matrix of rows against rows is made only when rows moved.
_CHEAP_COMPARISONS = 1 << 18


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:  # the usual case, at the speed of C
        return length
    low, high = 0, length  # equal up to low, not up to high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low


class Text(NamedTuple):
    """The last tokens of a text; the first of them is number `first`."""

    ids: list[int]
    first: int

    @property
    def length(self) -> int:
        """Tokens of the whole text."""
        return self.first + len(self.ids)

    def shared(self, other: Text) -> int:
        """How many tokens both begin with, as far as can be seen: tokens that only one has kept count as equal."""
        first = max(self.first, other.first)
        if first > min(self.length, other.length):
            return 0
        return first + shared_length(self.ids[first - self.first :], other.ids[first - other.first :])


class _Rows(NamedTuple):
    tails: Tensor  # int64 [rows, n], the last ids of each row, as far as they matter
    length: int
    keys: list[Hashable]  # in the session
    texts: list[Text]  # without padding


class RowSession:
    """A guide's session for rows without names."""

    def __init__(self, guide: Guide) -> None:
        self.guide = guide
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.session = self.guide.session()
        self._rows: _Rows | None = None
        self._names = itertools.count()

    def step(self, input_ids: Tensor, readings: Tensor) -> tuple[NextTokenScores, list[float]]:
        """Advance to the given rows, int64 [rows, length]: what the guide says of the next token of each.

        The values of `readings`, float [n], are read out together with the ids, so that a GPU is waited for once.
        """
        former, self._rows = self._rows, None  # whatever breaks off, nothing half-done is gone on from
        tails = self._tails(input_ids)
        parents: list[int] | None = None
        texts: list[Text] = []
        if former is not None and _may_continue(former, input_ids):
            parents, last, values = _parents(former, tails, input_ids, readings)
            grown = input_ids.shape[1] > former.length
            if parents is not None:
                texts = [former.texts[parent] for parent in parents]
                if grown and all(text.ids for text in texts):
                    texts = [Text([*text.ids, token], text.first) for text, token in zip(texts, last, strict=True)]
                elif grown:  # where a text begins is not known yet
                    parents = None
        else:
            values = readings.tolist()
        if parents is None:
            texts = self._texts(input_ids)
            parents = [-1] * len(texts)
            if former is not None:
                parents = [_best(text, index, former.texts) for index, text in enumerate(texts)]
        keys = self._assign(parents, former.keys if former is not None else [])
        limit = self.guide.reach
        if limit is not None:
            texts = [_cut(text, 2 * limit) if len(text.ids) > 3 * limit else text for text in texts]
        said = self.session.step([Request(key, text.ids, text.length) for key, text in zip(keys, texts, strict=True)])
        self._rows = _Rows(tails.clone(), input_ids.shape[1], keys, texts)  # the caller may write into its ids later
        return said, values

    def _tails(self, input_ids: Tensor) -> Tensor:
        reach = self.guide.reach
        return input_ids if reach is None else input_ids[:, -reach:]

    def _texts(self, input_ids: Tensor) -> list[Text]:
        """The rows as texts. Where only tails are looked at, padding before a text is taken off here."""
        if self.guide.reach is None:
            return [Text(ids, 0) for ids in input_ids.tolist()]
        # Twice as much as matters: what is known of a text can be told from what is new behind it.
        tails = input_ids[:, -2 * self.guide.reach :]
        before = input_ids.shape[1] - tails.shape[1]
        padding = (~self.guide.covers(input_ids)).long().cumprod(dim=1).sum(dim=1).tolist()
        return [
            Text(ids[max(0, count - before) :], max(0, before - count))
            for ids, count in zip(tails.tolist(), padding, strict=True)
        ]

    def _assign(self, parents: Sequence[int], former: Sequence[Hashable]) -> list[Hashable]:
        """Keys of the rows: the first row that goes on from a text takes it over, others get copies."""
        keys: list[Hashable] = []
        taken: set[int] = set()
        copies: dict[Hashable, Hashable] = {}
        for parent in parents:
            if parent >= 0 and parent not in taken:
                taken.add(parent)
                keys.append(former[parent])
                continue
            keys.append(next(self._names))
            if parent >= 0:
                copies[keys[-1]] = former[parent]
        self.session.drop([key for index, key in enumerate(former) if index not in taken])
        if copies:
            self.session.copy(copies)
        return keys


def _cut(text: Text, count: int) -> Text:
    return Text(text.ids[-count:], text.length - count)


def _may_continue(former: _Rows, input_ids: Tensor) -> bool:
    rows, length = input_ids.shape
    return rows == len(former.keys) and length in (former.length, former.length + 1) and former.length > 0


def _parents(
    former: _Rows, tails: Tensor, input_ids: Tensor, readings: Tensor
) -> tuple[list[int] | None, list[int], list[float]]:
    """Which former row each row goes on from (None: some row from none), the last ids, and the readings."""
    rows = len(former.keys)
    grown = input_ids.shape[1] - former.length
    prefix = tails[:, : tails.shape[1] - grown]
    cached = former.tails[:, former.tails.shape[1] - prefix.shape[1] :]
    if rows * rows * prefix.shape[1] <= _CHEAP_COMPARISONS and rows > 1:
        same = (prefix[:, None] == cached[None]).all(dim=-1)  # (rows, rows)
        preferred = same.to(torch.int8) + torch.diag_embed(same.diagonal().to(torch.int8))
        parents, matched = preferred.argmax(dim=1), same.any(dim=1)
    else:
        matched = (prefix == cached).all(dim=-1)
        parents = torch.arange(rows, device=tails.device)
    last = tails[:, -1] if grown else parents
    read = torch.cat([matched.all()[None].double(), parents.double(), last.double(), readings.double()]).tolist()
    chosen = [int(value) for value in read[1 : rows + 1]]
    return (chosen if read[0] else None), [int(value) for value in read[rows + 1 : 2 * rows + 1]], read[2 * rows + 1 :]


def _best(text: Text, index: int, former: Sequence[Text]) -> int:
    """The former text that shares most with a row, at equal lengths the row itself; -1: none shares anything."""
    lengths = [text.shared(other) for other in former]
    best = max(lengths, default=0)
    if best == 0:
        return -1
    return index if index < len(lengths) and lengths[index] == best else lengths.index(best)
