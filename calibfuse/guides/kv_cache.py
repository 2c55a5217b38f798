"""A transformers causal LM behind the few operations that following generations needs: feed, cut, reorder.

Slots of the cache and positions of a text are two things here: a slot may be masked (padding, or a token that was taken
back), so every call says which slots count and at which position each token stands. Differences between transformers
4.57 and 5.x stay in this file: `DynamicCache.crop` means the same in both only for negative numbers.

Left out: models without a key/value cache that can be cut (state-space models), and encoder-decoder models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from calibfuse.errors import InputError
from calibfuse.prefix_cache import shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SLACK = 64  # masked slots that are put up with besides one per slot that counts


class CachedLM:
    """One causal LM with its own key/value cache.

    Args:
        model: in evaluation mode; not changed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        known = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in known
        self._keeps_logits = "logits_to_keep" in known
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._cache = DynamicCache()
        self.slots = 0

    @torch.no_grad()
    def feed(self, ids: Tensor, positions: Tensor, visible: Tensor, *, keep: int) -> Tensor:
        """Read tokens into new slots.

        Args:
            ids: int64 [rows, new].
            positions: int64 [rows, new], of each token in its own text.
            visible: bool [rows, slots + new], slots that count (attention is causal in the order of slots); or
                bool [rows, new, slots + new], what each new token sees, itself included.
            keep: of how many of the last new tokens the logits are wanted.

        Returns:
            float32 [rows, keep, width of the head].
        """
        mask = visible.long()
        if visible.ndim == 3:
            dtype = self.model.dtype
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            mask = mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
        options: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}
        if self._keeps_logits:
            options["logits_to_keep"] = keep
        output = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=self._cache, use_cache=True, return_dict=True, **options
        )
        self.slots += ids.shape[1]
        logits: Tensor = output.logits[:, -keep:].float()
        return logits

    def cut(self, count: int) -> None:
        """Remove the last `count` slots."""
        if count >= self.slots:
            self.reset()
        elif count > 0:
            self._cache.crop(-count)
            self.slots -= count

    def select(self, parents: Tensor) -> None:
        """Make row i a copy of row parents[i]; int64 [rows]."""
        if self.slots:
            self._cache.batch_select_indices(parents)


class RaggedReader:
    """Several LMs of one vocabulary that read rows of tokens, each known by a key.

    Rows may have read different numbers of tokens: slots of the cache in which a row has none are masked. What a key
    has read is used again as far as its new tokens begin with it; keys that a step leaves out are forgotten.

    Args:
        models: by head.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel]) -> None:
        self._models = models
        self.forget()

    def forget(self) -> None:
        """Forget all rows."""
        self.readers = {name: CachedLM(model) for name, model in self._models.items()}
        self.width = 0  # slots in use
        self.tokens: list[list[int]] = []  # read ones, per row
        self.slots: list[list[int]] = []  # and the slot of each
        self._row_of: dict[Hashable, int] = {}

    def copy(self, pairs: Mapping[Hashable, Hashable]) -> None:
        """Let new keys stand for what others have read."""
        rows = {new: self._row_of[old] for new, old in pairs.items() if old in self._row_of}
        self._row_of.update(rows)

    def arrange(self, keys: Sequence[Hashable], tokens: Sequence[list[int]]) -> list[list[int]]:
        """Make row i that of keys[i], holding nothing but a beginning of tokens[i].

        Returns:
            What of tokens[i] is still to be read.
        """
        rows = [self._row_of.get(key) for key in keys]
        if all(row is None for row in rows):
            self.forget()
            self.tokens, self.slots = [[] for _ in keys], [[] for _ in keys]
        else:
            parents = [row or 0 for row in rows]  # a row of another text, of which nothing is used, where there is none
            if parents != list(range(len(self.tokens))):
                index = torch.tensor(parents, device="cpu").to(next(iter(self._models.values())).device)
                for reader in self.readers.values():
                    reader.select(index)
            shared = [
                0 if row is None else shared_length(new, self.tokens[row])
                for new, row in zip(tokens, rows, strict=True)
            ]
            self.tokens, self.slots = (
                [each[parent][:keep] for parent, keep in zip(parents, shared, strict=True)]
                for each in (self.tokens, self.slots)
            )
            self.width = max((slots[-1] + 1 for slots in self.slots if slots), default=0)
            self.cut()
        self._row_of = {key: row for row, key in enumerate(keys)}
        return [new[len(read) :] for new, read in zip(tokens, self.tokens, strict=True)]

    def restart(self, tokens: Sequence[list[int]]) -> list[list[int]]:
        """Forget what the rows have read, but not whose they are, and read all of them anew."""
        keys = list(self._row_of)
        self.forget()
        return self.arrange(keys, tokens)

    def is_wasteful(self, new: int, longest: int) -> bool:
        """Whether so many slots are masked that reading anew is cheaper."""
        return self.width + new > 2 * longest + _SLACK

    def cut(self) -> None:
        """Remove the slots that are not in use."""
        for reader in self.readers.values():
            reader.cut(reader.slots - self.width)

    def read_on(self, news: Sequence[list[int]]) -> dict[str, Tensor]:
        """Read what is new of each row, at least one token each.

        Returns:
            Logits of the next token, float32 [rows, width of the head] by head.
        """
        count = max(map(len, news))
        device = next(iter(self._models.values())).device
        # Aligned to the right: rows that begin together are padded before their text, and nowhere else.
        ids = [[0] * (count - len(new)) + new for new in news]
        positions = [
            [0] * (count - len(new)) + list(range(len(read), len(read) + len(new)))
            for new, read in zip(news, self.tokens, strict=True)
        ]
        visible = np.zeros((len(news), self.width + count), dtype=bool)
        for row, new in enumerate(news):
            self.slots[row] += range(self.width + count - len(new), self.width + count)
            self.tokens[row] += new
            visible[row, self.slots[row]] = True
        tables = (
            torch.tensor(ids, device="cpu").to(device),
            torch.tensor(positions, device="cpu").to(device),
            torch.from_numpy(visible).to(device),
        )
        self.width += count
        return {name: reader.feed(*tables, keep=1)[:, -1] for name, reader in self.readers.items()}


def stands_holes(model: PreTrainedModel, name: str) -> bool:
    """Whether rows of different length can be read in one forward.

    Raises:
        InputError: the model cannot be followed at all.
    """
    try:
        check_followable(model, name, holes=True)
    except InputError:
        check_followable(model, name, holes=False)
        return False
    return True


@torch.no_grad()
def check_followable(model: PreTrainedModel, name: str, *, holes: bool) -> bool:
    """Make sure that a model can be followed step by step, by trying it on five tokens.

    Args:
        model: a causal LM.
        name: for messages.
        holes: also ask for masked slots in the middle, which rows with texts of different length need.

    Returns:
        Whether a token can be told one by one what it sees (several continuations in one forward).

    Raises:
        InputError: reading in pieces, with masked slots, gives something else than reading at once.
    """
    device, size = model.device, cast(int, model.get_input_embeddings().num_embeddings)
    tokens = torch.arange(5, device=device) * 7 % size
    places = torch.arange(5, device=device)
    everything = torch.ones(1, 5, dtype=torch.bool, device=device)
    # Half precision rounds differently for every shape of a batch; what this looks for is larger by far.
    bound = 0.02 if model.dtype == torch.float32 else 0.2

    def agree(one: Tensor, other: Tensor) -> bool:
        return float((one.log_softmax(-1).exp() - other.log_softmax(-1).exp()).abs().sum(-1).max()) < bound

    try:
        expected = CachedLM(model).feed(tokens[None], places[None], everything, keep=5)
        pieces = CachedLM(model)
        slots = torch.tensor([3, 0, 1, 4, 2, 3] if holes else [3, 0, 1, 2, 3], device=device)
        visible = torch.tensor([[0, 1, 1, 0, 1, 1] if holes else [0, 1, 1, 1, 1]], dtype=torch.bool, device=device)
        given = (tokens[slots] if holes else torch.cat([tokens[3:4], tokens[:4]]))[None]
        stands = torch.tensor([[0, 0, 1, 2, 2, 3] if holes else [0, 0, 1, 2, 3]], device=device)
        parts = [
            pieces.feed(given[:, start:stop], stands[:, start:stop], visible[:, :stop], keep=1)
            for start, stop in ((0, 3), (3, given.shape[1]))
        ]
        works = agree(parts[0][:, 0], expected[:, 1]) and agree(parts[1][:, 0], expected[:, 3])
        if works:  # what cutting leaves must be as if nothing had been there
            pieces.cut(1)
            again = pieces.feed(given[:, -1:], stands[:, -1:], visible, keep=1)
            works = agree(again[:, 0], expected[:, 3])
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        raise InputError(
            f"The language model {name} cannot be followed token by token ({type(error).__name__})."
        ) from error
    if not works:
        raise InputError(
            f"The language model {name} cannot be followed token by token: reading a text in pieces, with masked "
            "slots, gives something else than reading it at once. A calibrator must be causal and have a key/value "
            "cache."
        )
    return _sees_as_told(model, tokens, expected, agree)


def _sees_as_told(
    model: PreTrainedModel, tokens: Tensor, expected: Tensor, agree: Callable[[Tensor, Tensor], bool]
) -> bool:
    """Whether two continuations of the same text can be read side by side."""
    reader, device = CachedLM(model), tokens.device
    places = torch.arange(5, device=device)
    try:
        reader.feed(tokens[None, :4], places[None, :4], torch.ones(1, 4, dtype=torch.bool, device=device), keep=1)
        visible = torch.ones(1, 2, 6, dtype=torch.bool, device=device)
        visible[0, 0, 5] = visible[0, 1, 4] = False
        pair = torch.stack([tokens[2], tokens[4]])[None]
        side = reader.feed(pair, places[None, [4, 4]], visible, keep=2)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError):
        return False
    return agree(side[:, 1], expected[:, 4])
