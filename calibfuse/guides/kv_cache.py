"""A transformers causal LM behind the few operations that following generations needs: feed, cut, reorder.

A slot of the cache may be masked (padding, or a token that was taken back). Left out: models whose cache cannot be cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
    """One causal LM, in evaluation mode, with its own key/value cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._known = inspect.signature(model.forward).parameters
        self.reset()

    def reset(self) -> None:
        self._cache = DynamicCache()
        self.slots = 0

    @torch.no_grad()
    def feed(self, ids: Tensor, positions: Tensor, visible: Tensor, *, keep: int) -> Tensor:
        """Read tokens [rows, new] into new slots; `positions` [rows, new] are those of each token in its own text.

        Of the slots count the `visible` ones, bool [rows, slots + new]. Logits at the last `keep` new tokens, float32.
        """
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": keep}
        options = {name: value for name, value in options.items() if name in self._known}
        output = self.model(
            input_ids=ids, attention_mask=visible.long(), past_key_values=self._cache, use_cache=True, return_dict=True,
            **options,
        )  # fmt: skip
        self.slots += ids.shape[1]
        logits: Tensor = output.logits[:, -keep:].float()
        return logits

    def cut(self, count: int) -> None:
        """Remove the last `count` slots."""
        if count >= self.slots:
            self.reset()
        elif count > 0:
            self._cache.crop(-count)  # transformers 4.57 and 5.x agree about negative numbers alone
            self.slots -= count

    def select(self, parents: Tensor) -> None:
        """Make row i a copy of row parents[i]; int64 [rows]."""
        if self.slots:
            self._cache.batch_select_indices(parents)


class RaggedReader:
    """Several LMs of one vocabulary, by head, that read rows of tokens, each known by a key.

    Rows may have read different numbers of tokens: slots of the cache in which a row has none are masked. What a key
    has read is used again as far as its new tokens begin with it; keys that a step leaves out are forgotten.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel]) -> None:
        self._models = models
        self._device = next(iter(models.values())).device
        self.forget()

    def forget(self) -> None:
        """Forget all rows."""
        self._readers = {name: CachedLM(model) for name, model in self._models.items()}
        self.width = 0  # slots that are kept; what is read behind them is taken back before the next reading
        self.tokens: list[list[int]] = []  # read ones, per row
        self.slots: list[list[int]] = []  # and the slot of each
        self._row_of: dict[Hashable, int] = {}

    def copy(self, pairs: Mapping[Hashable, Hashable]) -> None:
        self._row_of.update({new: self._row_of[old] for new, old in pairs.items() if old in self._row_of})

    def arrange(self, keys: Sequence[Hashable], tokens: Sequence[list[int]]) -> list[list[int]]:
        """Make row i that of keys[i], holding nothing but a beginning of tokens[i]; gives what is still to be read."""
        rows = [self._row_of.get(key) for key in keys]
        if all(row is None for row in rows):
            self.forget()
            self.tokens, self.slots = [[] for _ in keys], [[] for _ in keys]
        else:
            parents = [row or 0 for row in rows]  # a row of another text, of which nothing is used, where there is none
            if parents != list(range(len(self.tokens))):
                index = torch.tensor(parents, device="cpu").to(self._device)
                for reader in self._readers.values():
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
            self._cut()
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

    def _cut(self) -> None:
        for reader in self._readers.values():
            reader.cut(reader.slots - self.width)

    def read(
        self, news: Sequence[list[int]], openings: Sequence[list[int]] | None = None, *, keep: int
    ) -> dict[str, Tensor]:
        """Read what is new of each row, and behind it tokens that are taken back before the next reading.

        Rows end side by side with what is new and begin side by side with their openings. Logits at the last `keep`
        slots, float32 [rows, keep, width of the head] by head.
        """
        openings = openings or [[] for _ in news]
        ahead, behind = max(map(len, news)), max(map(len, openings))
        ids = np.zeros((len(news), ahead + behind), dtype=np.int64)
        positions = np.zeros_like(ids)
        visible = np.zeros((len(news), self.width + ahead + behind), dtype=bool)
        for row, (new, opening) in enumerate(zip(news, openings, strict=True)):
            known, start, stop = len(self.tokens[row]), ahead - len(new), ahead + len(opening)
            ids[row, start:stop] = [*new, *opening]
            positions[row, start:stop] = range(known, known + stop - start)
            self.slots[row] += range(self.width + start, self.width + ahead)
            self.tokens[row] += new
            visible[row, self.slots[row]] = True
            visible[row, self.width + ahead : self.width + stop] = True
        self.width += ahead
        tables = [torch.from_numpy(each).to(self._device) for each in (ids, positions, visible)]
        return {name: reader.feed(*tables, keep=keep) for name, reader in self._readers.items()}


@torch.no_grad()
def try_reading(model: PreTrainedModel, name: str) -> None:
    """Try on five tokens whether a model reads in pieces with masked slots as it does at once; else an InputError."""
    # Half precision rounds differently for every shape of a batch; what this looks for is larger by far.
    bound = 0.02 if model.dtype == torch.float32 else 0.2
    size: Any = model.get_input_embeddings().num_embeddings
    tokens = [each * 7 % size for each in range(5)]

    def feed(reader: CachedLM, which: list[int], places: list[int], visible: list[int], keep: int = 1) -> Tensor:
        ids, positions, sees = (
            torch.tensor([each], device=model.device) for each in ([tokens[at] for at in which], places, visible)
        )
        return reader.feed(ids, positions, sees.bool(), keep=keep)[0].softmax(-1)

    try:
        expected = feed(CachedLM(model), [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [1] * 5, keep=5)
        # Padding before the text and a slot taken back in its middle; then what cutting leaves.
        reader = CachedLM(model)
        found = {1: feed(reader, [3, 0, 1], [0, 0, 1], [0, 1, 1])}
        feed(reader, [4, 2, 3], [2, 2, 3], [0, 1, 1, 0, 1, 1])
        reader.cut(1)
        found[3] = feed(reader, [3], [3], [0, 1, 1, 0, 1, 1])
        reads = all(float((each[-1] - expected[at]).abs().sum()) < bound for at, each in found.items())
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):  # of a model that reads otherwise
        reads = False
    if not reads:
        raise InputError(
            f"The language model {name} cannot be followed token by token: reading a text in pieces, with masked "
            "slots, gives something else than reading it at once. A calibrator must be causal and have a key/value "
            "cache."
        )
