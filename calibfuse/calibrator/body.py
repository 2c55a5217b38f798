"""The calibrator's transformer body: causal, sliding window, keys and values of running texts outside.

Own code: at this size the bookkeeping of transformers' models costs more than their arithmetic (docs/results.md).
Slot 0 of a row is the document boundary, slot j + 1 holds token j.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_WINDOWS_AT_ONCE = 4


class KeyValueRing:
    """Keys and values of the latest slots of many texts, each in a row of its own, in place.

    A query sees `window - 1` earlier slots, so a row is a ring of `window + slack` entries: slot p lies at entry
    p % size, and `slack` slots can be taken back (rejected drafts) before something is missing.
    """

    slack = 32

    def __init__(self, layer_count: int, window: int) -> None:
        self.layer_count = layer_count
        self.window = window
        self.size = window + self.slack
        self.rows = 0
        self._entries: Tensor | None = None  # [layers, 2, rows, heads, size, head_width]

    @property
    def memory_bytes(self) -> int:
        """Bytes of all rows."""
        return 0 if self._entries is None else self._entries.nbytes

    def can_return_to(self, slots: int, highest: int) -> bool:
        """Whether a row that had come to `highest` slots can go on from its first `slots` ones."""
        return highest <= self.size or highest - 1 - slots <= self.size - self.window

    def resize(self, rows: int) -> None:
        """Make room for `rows` rows, or give room back; the first ones keep their contents."""
        if self._entries is not None and rows != self.rows:
            kept = self._entries[:, :, :rows]
            self._entries = kept.new_zeros(*kept.shape[:2], rows, *kept.shape[3:]) if rows else None
            if self._entries is not None:
                self._entries[:, :, : kept.shape[2]] = kept
        self.rows = rows

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        if self._entries is not None:
            self._entries[:, :, list(targets)] = self._entries[:, :, list(sources)]

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [rows, heads, size, head_width] each; `like`: of some new slots."""
        if self._entries is None:
            # zeros: what a mask hides is multiplied by 0, and must be a number
            self._entries = like.new_zeros(self.layer_count, 2, self.rows, like.shape[1], self.size, like.shape[3])
        keys, values = self._entries[index]
        return keys, values


class RingStep:
    """Attention of one forward over a ring: some rows, each with new slots of its own number; see `Body.step`."""

    def __init__(
        self, ring: KeyValueRing, rows: Sequence[int], slots: Sequence[int], counts: Sequence[int], device: torch.device
    ) -> None:
        self._ring = ring
        self._new = new = max(counts)
        table = torch.tensor([rows, slots], device="cpu").to(device, non_blocking=True)
        before = table[1][:, None]
        self.positions = before + torch.arange(new, device=device)  # (rows, new)
        self._entries = self.positions % ring.size
        self._row = table[0]
        first, last = rows[0], rows[-1]
        # Rows that lie side by side are read where they are.
        self._side_by_side = slice(first, last + 1) if last - first + 1 == len(rows) else None
        span = min(ring.size, max(slots) + (new == 1))
        entries = torch.arange(span, device=device)
        if new == 1:  # its key is in the ring when attention looks
            age = (self.positions - entries) % ring.size
            self._mask = (age < (self.positions + 1).clamp(max=ring.window))[:, None, None]
            return
        # Age of each entry as seen from each new slot, then which of the new slots each of them sees.
        latest = before - 1
        age = (latest - entries) % ring.size
        offset = torch.arange(1, new + 1, device=device)
        old = ((age <= latest)[:, None] & (age[:, None] + offset[:, None] < ring.window))[:, None]
        distance = offset[:, None] - offset
        among_new = ((distance >= 0) & (distance < ring.window)).expand(len(rows), 1, new, new)
        self._mask = torch.cat([old, among_new], dim=-1)
        # Of more new slots than the ring has entries, the last ones are kept.
        chosen = [(row, at) for row, n in enumerate(counts) for at in range(max(0, n - ring.size), n)]
        self._kept = torch.tensor(chosen, device="cpu").T.to(device, non_blocking=True)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of one layer; all are [rows, heads, new, head_width]."""
        ring_keys, ring_values = self._ring.layer(layer, keys)
        if self._new == 1:
            ring_keys[self._row, :, self._entries[:, 0]] = keys[:, :, 0]
            ring_values[self._row, :, self._entries[:, 0]] = values[:, :, 0]
            seen = self._seen(ring_keys), self._seen(ring_values)
            return functional.scaled_dot_product_attention(queries, *seen, attn_mask=self._mask)
        seen = (
            torch.cat([self._seen(ring_keys), keys], dim=2),
            torch.cat([self._seen(ring_values), values], dim=2),
        )
        mixed = functional.scaled_dot_product_attention(queries, *seen, attn_mask=self._mask)
        row, at = self._kept
        target = self._row[row], self._entries[row, at]
        ring_keys[target[0], :, target[1]] = keys[row, :, at]
        ring_values[target[0], :, target[1]] = values[row, :, at]
        return mixed

    def _seen(self, tensor: Tensor) -> Tensor:
        span = self._mask.shape[-1] - (0 if self._new == 1 else self._new)
        if self._side_by_side is not None:
            return tensor[self._side_by_side, :, :span]
        return tensor[:, :, :span].index_select(0, self._row)


def rotary_tables(slots: int, head_width: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines, and sines negated in the first half, of positions 0 .. slots - 1: float32 [slots, 1, 1, head_width]."""
    frequencies = 10_000.0 ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angles = torch.arange(slots, device=device, dtype=torch.float32)[:, None] * frequencies
    angles = angles[:, None, None]
    return torch.cat([angles.cos()] * 2, dim=-1), torch.cat([-angles.sin(), angles.sin()], dim=-1)


def _rotate(states: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    """Turn channel pairs (i, i + half): rolling by half swaps the members, the sines carry the sign of the first."""
    return torch.addcmul(states * cosines, states.roll(states.shape[-1] // 2, dims=-1), signed_sines)


def window_mask(starts: Tensor, *, first_query: int, first_key: int, slots: int, window: int) -> Tensor:
    """Which of the slots first_key .. slots - 1 each slot first_query .. slots - 1 sees: bool [rows, 1, queries, keys].

    Slots before a row's boundary (`starts`, int64 [rows]) see only themselves and are seen by nobody, so that a padded
    row equals the unpadded one.
    """
    keys = torch.arange(first_key, slots, device=starts.device)[None, :]
    queries = torch.arange(first_query, slots, device=starts.device)[:, None]
    near = (keys <= queries) & (keys > queries - window)
    lowest = torch.minimum(starts[:, None, None], queries)
    return (near & (keys >= lowest))[:, None]


class Block(nn.Module):
    """Attention and MLP, each behind an RMSNorm, each added to the stream."""

    def __init__(self, width: int, head_count: int, hidden_width: int) -> None:
        super().__init__()
        self.head_count = head_count
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, states: Tensor, cosines: Tensor, sines: Tensor, attend: Attend) -> Tensor:
        """New states [rows, new, width]; `attend` takes queries, keys and values [rows, heads, new, head_width]."""
        rows, new, width = states.shape
        qkv = self.qkv(self.attention_norm(states)).view(rows, new, 3, self.head_count, -1)
        turned = _rotate(qkv[:, :, :2], cosines, sines)  # queries and keys at once: fewer, larger operations
        queries, keys = turned.permute(2, 0, 3, 1, 4).unbind()
        mixed = attend(queries, keys, qkv[:, :, 2].transpose(1, 2))
        states = states + self.attention_out(mixed.transpose(1, 2).reshape(rows, new, width))
        result: Tensor = states + self.down(functional.gelu(self.up(self.mlp_norm(states)), approximate="tanh"))
        return result


class Body(nn.Module):
    """The stack of blocks; see CalibratorConfig for the sizes.

    A state is the stream after `layer_count` blocks, followed by what any further ones make of it.
    """

    def __init__(
        self,
        *,
        width: int,
        layer_count: int,
        head_count: int,
        hidden_width: int,
        window: int,
        value_layer_count: int = 0,
    ) -> None:
        super().__init__()
        self.window = window
        self.layer_count = layer_count
        self.state_width = width * (2 if value_layer_count else 1)
        self.head_width = width // head_count
        self._tables: tuple[Tensor, Tensor] | None = None
        blocks = [Block(width, head_count, hidden_width) for _ in range(layer_count + value_layer_count)]
        self.blocks = nn.ModuleList(blocks)
        for block in blocks:
            for linear in (block.qkv, block.attention_out, block.up, block.down):
                nn.init.normal_(linear.weight, std=0.02)
            for linear in (block.attention_out, block.down):
                nn.init.normal_(linear.weight, std=0.02 / (2 * layer_count) ** 0.5)

    @property
    def reach(self) -> int:
        """How many slots a state depends on, its own included: every layer looks back `window - 1` further."""
        return len(self.blocks) * (self.window - 1) + 1

    def _rotary(self, slots: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of at least `slots` slots; kept, since making them at every step costs as much as a layer."""
        tables = self._tables
        if tables is None or tables[0].shape[0] < slots or tables[0].device != like.device:
            size = max(1024, 1 << (slots - 1).bit_length())
            self._tables = tables = rotary_tables(size, self.head_width, device=like.device)
        return tables

    def forward(self, states: Tensor, starts: Tensor) -> Tensor:
        """Run whole rows [rows, slots, width]; `starts`: int64 [rows], the boundaries."""
        slots = states.shape[1]
        cosines, sines = (table[:slots].to(states.dtype) for table in self._rotary(slots, states))
        attend = partial(_attend_in_windows, starts=starts, window=self.window)
        return self._through(states, lambda _, block, states: block(states, cosines, sines, attend))

    def step(
        self, states: Tensor, ring: KeyValueRing, rows: Sequence[int], slots: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        """Run new slots [rows, new, width] of some texts, behind those in the ring, which is extended by them.

        Args:
            states: input vectors; where a row has fewer new ones than others, they come first.
            ring: earlier slots. Broken off, it holds some of the new ones and not others.
            rows: of the ring, in rising order.
            slots: how many slots of each row were fed before.
            counts: how many new ones each row has; states [rows, new, state_width] behind them mean nothing.
        """
        step = RingStep(ring, rows, slots, counts, states.device)
        tables = self._rotary(max(slots) + states.shape[1], states)
        cosines, sines = (
            functional.embedding(step.positions, table[:, 0, 0])[:, :, None, None].to(states.dtype) for table in tables
        )
        return self._through(
            states, lambda layer, block, states: block(states, cosines, sines, partial(step.attend, layer))
        )

    def _through(self, states: Tensor, run: Callable[[int, nn.Module, Tensor], Tensor]) -> Tensor:
        shared = states
        for layer, block in enumerate(self.blocks):
            states = run(layer, block, states)
            if layer + 1 == self.layer_count:
                shared = states
        return states if len(self.blocks) == self.layer_count else torch.cat([shared, states], dim=-1)


def _attend_in_windows(queries: Tensor, keys: Tensor, values: Tensor, *, starts: Tensor, window: int) -> Tensor:
    """Attention of whole rows, some windows of queries at once: the mask of a long text as a whole would not fit."""
    slots, at_once = queries.shape[2], _WINDOWS_AT_ONCE * window
    parts = []
    for first in range(0, slots, at_once):
        last, oldest = min(first + at_once, slots), max(0, first - window + 1)
        mask = window_mask(starts, first_query=first, first_key=oldest, slots=last, window=window)
        seen = slice(oldest, last)
        parts.append(
            functional.scaled_dot_product_attention(
                queries[:, :, first:last], keys[:, :, seen], values[:, :, seen], attn_mask=mask
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
