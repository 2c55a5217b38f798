"""Following texts with a bound calibrator: what each has read lies in a ring of keys and values of its own.

A leading run of special tokens is one boundary; of a long text only the last `reach` tokens are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from calibfuse.calibrator.body import KeyValueRing
from calibfuse.calibrator.word_bias import REACH
from calibfuse.guide import GuideSession, NextTokenScores, Request, isolated
from calibfuse.prefix_cache import Text

if TYPE_CHECKING:
    from calibfuse.calibrator.binding import BoundCalibrator

_TOKENS_AT_ONCE = 4096  # of a forward: bounds the memory of masks and states
_BOUNDARY = -1  # stands for the slot before a text


@dataclass(frozen=True)
class _Reading:
    row: int  # of the ring
    text: Text  # its last ids
    origin: int  # number of the token in slot 1; slot 0 is a boundary
    highest: int  # how many slots of the row were ever filled
    is_cut: bool  # whether text before `origin` was left out; then the states of the first slots are not exact


class _New(NamedTuple):
    row: int
    slots: int
    ids: list[int]


@dataclass(frozen=True)
class _State:
    """Everything a session knows; replaced as a whole, so that a step that breaks off leaves none of it behind."""

    readings: dict[Hashable, _Reading]
    ring: KeyValueRing
    hidden: Tensor  # (rows of the ring, width): the last state of each


class CalibratorSession(GuideSession):
    """`GuideSession` of a bound calibrator."""

    def __init__(self, bound: BoundCalibrator) -> None:
        self._bound = bound
        self.reset()

    def reset(self) -> None:
        self._state: _State | None = None

    @property
    def keys(self) -> tuple[Hashable, ...]:
        return tuple(self._state.readings) if self._state is not None else ()

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys and values."""
        return self._state.ring.memory_bytes if self._state is not None else 0

    @isolated
    @torch.inference_mode()
    def drop(self, keys: Iterable[Hashable]) -> None:
        state, gone = self._state, set(keys)
        if state is None or gone.isdisjoint(state.readings):
            return
        self._state = None
        kept = {key: reading for key, reading in state.readings.items() if key not in gone}
        if kept:
            self._state = _compacted(state, kept)

    @isolated
    @torch.inference_mode()
    def copy(self, pairs: Mapping[Hashable, Hashable]) -> None:
        state, self._state = self._state, None
        if state is None:
            return
        pairs = {new: old for new, old in pairs.items() if old in state.readings and new != old}
        state = self._with_rows(state, len(set(pairs) - set(state.readings)))
        readings = dict(state.readings)
        free = _free_rows(state)
        for new, old in pairs.items():
            row = state.readings[new].row if new in state.readings else next(free)
            readings[new] = replace(state.readings[old], row=row)
        sources = [state.readings[old].row for old in pairs.values()]
        targets = [readings[new].row for new in pairs]
        state.ring.copy(sources, targets)
        state.hidden[targets] = state.hidden[sources]
        self._state = replace(state, readings=readings)

    @isolated
    @torch.inference_mode()  # a tenth faster; what it fills is written to in this mode alone
    def step(self, requests: Sequence[Request]) -> NextTokenScores:
        state, self._state = self._state, None  # what breaks off leaves the session empty
        requests = [Request(*request) for request in requests]
        known = state.readings if state is not None else {}
        state = self._with_rows(state, sum(request.key not in known for request in requests))
        free, readings, news = _free_rows(state), dict(state.readings), list[_New]()
        for request in requests:
            before = readings.get(request.key)
            row = before.row if before is not None else next(free)
            readings[request.key] = self._plan(news, state.ring, request, before, row)
        for group in _groups(news):
            self._read(state, group)
        self._state = replace(state, readings=readings)
        rows = torch.tensor([readings[request.key].row for request in requests], dtype=torch.int64, device="cpu")
        hidden = state.hidden.index_select(0, rows.to(self._bound.device, non_blocking=True))
        return self._bound.say(hidden, [request.ids[-REACH:] for request in requests])

    def _plan(
        self, news: list[_New], ring: KeyValueRing, request: Request, before: _Reading | None, row: int
    ) -> _Reading:
        """What there is to read of one text; how far it is read then."""
        ids, reach = request.ids, self._bound.reach
        length = len(ids) if request.length is None else request.length
        first = length - len(ids)
        lead = self._bound.leading_specials(ids) if first == 0 else 0
        tail = min(len(ids), 2 * reach)
        text = Text(list(ids[len(ids) - tail :]), length - tail)
        if before is not None:
            kept, seen_from = text.shared(before.text), max(text.first, before.text.first)
            if kept == length == before.text.length and seen_from <= max(before.origin, kept - reach):
                return replace(before, text=text)
            kept = min(kept, length - 1)
            is_whole = first == 0 and not before.is_cut
            origin = lead if is_whole else before.origin
            slots = 1 + (max(0, kept - lead) if is_whole else kept - origin)
            new = length - (origin + slots - 1)
            if (
                slots >= (reach if before.is_cut else 1)
                and 0 < new <= reach
                and seen_from <= max(origin, kept + 1 - reach)
                and ring.can_return_to(slots, before.highest)
            ):
                news.append(_New(row, slots, text.ids[-new:]))
                return _Reading(row, text, origin, max(before.highest, slots + new), before.is_cut)
        origin = max(lead, first, length - reach)
        new = length - origin
        news.append(_New(row, 0, [_BOUNDARY, *text.ids[len(text.ids) - new :]]))
        return _Reading(row, text, origin, new + 1, origin > lead)

    def _read(self, state: _State, group: Sequence[_New]) -> None:
        device = self._bound.device
        rows, slots, ids = (list(column) for column in zip(*sorted(group), strict=True))
        counts = [len(each) for each in ids]
        width = max(counts)
        padded = torch.tensor([each + [_BOUNDARY] * (width - len(each)) for each in ids], device="cpu")
        inputs = self._bound.inputs(padded.to(device, non_blocking=True))
        states = self._bound.calibrator.body.step(inputs, state.ring, rows, slots, counts)
        if width > 1:
            places = torch.tensor([range(len(rows)), [count - 1 for count in counts]], device="cpu")
            places = places.to(device, non_blocking=True)
            last = states[places[0], places[1]]
        else:
            last = states[:, 0]
        state.hidden[torch.tensor(rows, device="cpu").to(device, non_blocking=True)] = last

    def _with_rows(self, state: _State | None, more: int) -> _State:
        if state is None:
            body, boundary = self._bound.calibrator.body, self._bound.calibrator.boundary
            state = _State({}, KeyValueRing(len(body.blocks), body.window), boundary.new_zeros(0, body.state_width))
        needed = len(state.readings) + more
        if needed <= state.ring.rows:
            return state
        return _resized(state, max(needed, state.ring.rows + state.ring.rows // 2))


def _resized(state: _State, rows: int) -> _State:
    state.ring.resize(rows)
    hidden = state.hidden.new_zeros(rows, state.hidden.shape[1])
    kept = min(rows, len(state.hidden))
    hidden[:kept] = state.hidden[:kept]
    return replace(state, hidden=hidden)


def _free_rows(state: _State) -> Iterator[int]:
    used = {reading.row for reading in state.readings.values()}
    return (row for row in range(state.ring.rows) if row not in used)


def _compacted(state: _State, readings: dict[Hashable, _Reading]) -> _State:
    """The state with these texts alone: side by side in the first rows, and with at most half of the ring free."""
    count = len(readings)
    state = replace(state, readings=readings)
    moved = [key for key, reading in readings.items() if reading.row >= count]
    if moved:
        sources = [readings[key].row for key in moved]
        targets = list(itertools.islice(_free_rows(state), len(moved)))
        state.ring.copy(sources, targets)
        state.hidden[targets] = state.hidden[sources]
        rows = dict(zip(moved, targets, strict=True))
        readings = {key: replace(each, row=rows[key]) if key in rows else each for key, each in readings.items()}
        state = replace(state, readings=readings)
    return state if 2 * count > state.ring.rows else _resized(state, count)


def _groups(news: Iterable[_New]) -> list[list[_New]]:
    """Texts that are read together: those with one new token, and others by like numbers."""
    groups: list[list[_New]] = []
    widest = 0
    for new in sorted(news, key=lambda new: -len(new.ids)):
        count = len(new.ids)
        if groups and 2 * count >= widest and (count > 1) == (widest > 1):
            if widest == 1 or (len(groups[-1]) + 1) * widest <= _TOKENS_AT_ONCE:
                groups[-1].append(new)
                continue
        groups.append([new])
        widest = count
    return groups
