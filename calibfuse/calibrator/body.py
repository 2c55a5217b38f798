"""The calibrator's transformer body: causal, sliding window, key/value cache outside.

Pre-norm blocks with rotary positions (Su et al. 2021) and a window (Beltagy et al. 2020), so that the cost of one more
token does not grow with the text. Own code rather than a transformers model: at this size (3 layers x 192) the
bookkeeping of a general model costs more than its arithmetic; docs/results.md has the comparison.

A row of input is `slots`: slot 0 is always the document boundary, slot j + 1 holds token j. Slots before a row's
`start` (left padding, repeated begin-of-text marks) attend only to themselves and are seen by nobody, except slot
`start` itself, the boundary that the text follows. Thus a padded row equals the unpadded one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional


class KeyValueBuffer:
    """Keys and values of the latest slots of some rows, per layer; in place, with room to grow.

    Only `window - 1` earlier slots are ever attended to, so no more than those and `slack` slots for roll-backs
    (assisted decoding rejects a few tokens at a time) are kept: memory and copying do not grow with the text.

    Attributes:
        slots: number of slots fed so far (kept or dropped).
        first_slot: the oldest slot still present.
    """

    slack = 64

    def __init__(self, layer_count: int, window: int) -> None:
        self.slots = 0
        self.first_slot = 0
        self._window = window
        self._keys: list[Tensor | None] = [None] * layer_count
        self._values: list[Tensor | None] = [None] * layer_count

    @property
    def oldest_visible(self) -> int:
        """The oldest slot that the next one may attend to."""
        return max(self.first_slot, self.slots - self._window + 1)

    def can_cut_to(self, slots: int) -> bool:
        """Whether every slot that the next query needs would still be there after `cut`."""
        return self.first_slot == 0 or slots - self._window + 1 >= self.first_slot

    def cut(self, slots: int, parents: Tensor | None) -> None:
        """Forget all but the first `slots` slots; then row i becomes a copy of the former row parents[i]."""
        self.slots = slots
        if parents is not None:
            for tensors in (self._keys, self._values):
                for layer, tensor in enumerate(tensors):
                    if tensor is not None:
                        tensors[layer] = tensor.index_select(0, parents)  # with the free room: the next slots go there

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new slots of one layer (counted by `advance`, after the last layer).

        Args:
            layer: index.
            keys: [rows, heads, new, head_width].
            values: likewise.

        Returns:
            Keys and values of the slots that the new ones may attend to, the new ones last.
        """
        oldest = self.oldest_visible
        return self._store(self._keys, layer, keys, oldest), self._store(self._values, layer, values, oldest)

    def _store(self, tensors: list[Tensor | None], layer: int, new: Tensor, oldest: int) -> Tensor:
        filled = self.slots - self.first_slot
        end = filled + new.shape[2]
        old = tensors[layer]
        if old is None or old.shape[2] < end:
            room = new.new_empty(new.shape[0], new.shape[1], end + self._window, new.shape[3])
            if old is not None:
                room[:, :, :filled] = old[:, :, :filled]
            tensors[layer] = old = room
        old[:, :, filled:end] = new
        return old[:, :, oldest - self.first_slot : end]

    def advance(self, new: int) -> None:
        """Count `new` slots as fed, and drop what lies too far back when that is worth a copy."""
        self.slots += new
        surplus = self.slots - self.first_slot - (self._window + self.slack)
        if surplus >= self._window:
            for tensors in (self._keys, self._values):
                for layer, tensor in enumerate(tensors):
                    if tensor is not None:
                        kept = tensor[:, :, surplus : self.slots - self.first_slot]
                        room = tensor.new_empty(*kept.shape[:2], kept.shape[2] + self._window, kept.shape[3])
                        room[:, :, : kept.shape[2]] = kept
                        tensors[layer] = room
            self.first_slot += surplus


def rotary_tables(slots: int, head_width: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions 0 .. slots - 1.

    Returns:
        Two float32 tensors [slots, 1, 1, head_width]: cosines, both halves of the last axis alike; sines, negated in
        the first half.
    """
    frequencies = 10_000.0 ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angles = torch.arange(slots, device=device, dtype=torch.float32)[:, None] * frequencies
    angles = angles[:, None, None]
    return torch.cat([angles.cos()] * 2, dim=-1), torch.cat([-angles.sin(), angles.sin()], dim=-1)


def _rotate(states: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    """Turn channel pairs (i, i + half): rolling by half swaps the members, the sines carry the sign of the first."""
    return torch.addcmul(states * cosines, states.roll(states.shape[-1] // 2, dims=-1), signed_sines)


def window_mask(starts: Tensor, *, first_query: int, first_key: int, slots: int, window: int) -> Tensor:
    """Which slots each new slot may attend to.

    Args:
        starts: int64 [rows], the slot of each row's boundary.
        first_query: slot of the first query; queries run to slots - 1.
        first_key: slot of the first key that is present; keys run to slots - 1.
        slots: number of slots so far, the new ones included.
        window: how many slots a query sees, itself included.

    Returns:
        bool [rows, 1, queries, keys].
    """
    keys = torch.arange(first_key, slots, device=starts.device)[None, :]
    if slots - first_query == 1 and first_key > first_query - window:  # a decoding step: all keys are near
        return (keys >= starts[:, None].clamp(max=first_query))[:, None, None]
    queries = torch.arange(first_query, slots, device=starts.device)[:, None]
    near = (keys <= queries) & (keys > queries - window)
    # A query before its row's start sees only itself.
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

    def forward(
        self,
        states: Tensor,
        cosines: Tensor,
        sines: Tensor,
        mask: Tensor | None,
        remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        """One block.

        Args:
            states: [rows, new, width].
            cosines: [new, 1, 1, head_width], of the new slots; see `rotary_tables`.
            sines: likewise.
            mask: bool [rows, 1, new, keys]; None: the new slots see all keys.
            remember: takes keys and values of the new slots, [rows, heads, new, head_width], and returns those of all
                slots on the mask's key axis; None when there is no past.

        Returns:
            New states.
        """
        rows, new, width = states.shape
        qkv = self.qkv(self.attention_norm(states)).view(rows, new, 3, self.head_count, -1)
        turned = _rotate(qkv[:, :, :2], cosines, sines)  # queries and keys at once: fewer, larger operations
        queries, keys = turned.permute(2, 0, 3, 1, 4).unbind()
        values = qkv[:, :, 2].transpose(1, 2)  # each (rows, heads, new, head_width)
        if remember is not None:
            keys, values = remember(keys, values)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        states = states + self.attention_out(mixed.transpose(1, 2).reshape(rows, new, width))
        result: Tensor = states + self.down(functional.gelu(self.up(self.mlp_norm(states)), approximate="tanh"))
        return result


class Body(nn.Module):
    """The stack of blocks.

    Args:
        width: of the stream.
        layer_count: number of blocks.
        head_count: attention heads; `width` is a multiple of twice this.
        hidden_width: of the MLPs.
        window: slots a query sees, itself included.
    """

    def __init__(self, *, width: int, layer_count: int, head_count: int, hidden_width: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.head_width = width // head_count
        self._tables: tuple[Tensor, Tensor] | None = None
        blocks = [Block(width, head_count, hidden_width) for _ in range(layer_count)]
        self.blocks = nn.ModuleList(blocks)
        for block in blocks:
            for linear in (block.qkv, block.attention_out, block.up, block.down):
                nn.init.normal_(linear.weight, std=0.02)
            for linear in (block.attention_out, block.down):
                nn.init.normal_(linear.weight, std=0.02 / (2 * layer_count) ** 0.5)

    def _rotary(self, first: int, slots: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of the slots from `first` on; kept, since making them at every step costs as much as a layer."""
        if self._tables is None or self._tables[0].shape[0] < slots or self._tables[0].device != like.device:
            size = max(1024, 1 << (slots - 1).bit_length())
            self._tables = rotary_tables(size, self.head_width, device=like.device)
        cosines, sines = (table[first:slots].to(like.dtype) for table in self._tables)
        return cosines, sines

    def forward(self, states: Tensor, starts: Tensor | None, buffer: KeyValueBuffer | None = None) -> Tensor:
        """Run new slots through all blocks.

        Args:
            states: float [rows, new, width], input vectors of the slots after those in `buffer`.
            starts: int64 [rows], the boundary slot of each row. None: no boundary lies after the oldest slot that the
                new one (a single one) can see, so nothing needs hiding.
            buffer: earlier slots; extended by the new ones. None: there are none, and none are kept.

        Returns:
            States [rows, new, width].
        """
        first = buffer.slots if buffer is not None else 0
        new = states.shape[1]
        cosines, sines = self._rotary(first, first + new, states)
        oldest = buffer.oldest_visible if buffer is not None else 0
        mask = None
        if starts is not None:
            mask = window_mask(starts, first_query=first, first_key=oldest, slots=first + new, window=self.window)
        for layer, block in enumerate(self.blocks):
            remember = partial(buffer.append, layer) if buffer is not None else None
            states = block(states, cosines, sines, mask, remember)
        if buffer is not None:
            buffer.advance(new)
        return states
