"""A causal LM as guide of a target with the same vocabulary: it reads the target's own ids in lock-step.

Slot 0 of the cache is a start token before every row. The leading run of special tokens of a row (left padding, begin
marks) is masked but for its last slot, which holds the start token instead: padding changes nothing, and positions
count from there. Special tokens further on are read as they are.

Texts longer than the model can read are read from a later token on, with a start token before it; that token moves by
half the length at a time, so that the cache stays of use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from calibfuse.guides.kv_cache import CachedLM
from calibfuse.isolation import isolated
from calibfuse.prefix_cache import match_prefixes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import Vocabulary


class LockStepLM:
    """Models that share the target's ids.

    Args:
        models: by head.
        target: vocabulary of the ids.
        start_id: before every text.
        max_length: tokens that the models can read; None: any number.
    """

    def __init__(
        self, models: Mapping[str, PreTrainedModel], target: Vocabulary, *, start_id: int, max_length: int | None
    ) -> None:
        self.models = dict(models)
        self.target = target
        self.start_id = start_id
        self.max_length = max_length
        self.device = next(iter(self.models.values())).device
        widths = [model.get_input_embeddings().num_embeddings for model in self.models.values()]
        self._readable = min(cast(int, width) for width in widths)
        # One entry more than ids: whatever lies beyond the vocabulary counts as special, and so does what has no
        # embedding.
        self._is_special = torch.ones(len(target) + 1, dtype=torch.bool)
        self._is_special[:-1] = torch.from_numpy(target.is_special.copy())
        self._is_special[self._readable :] = True
        self._is_special = self._is_special.to(self.device)

    def covers(self, token_ids: Tensor) -> Tensor:
        """Bool, same shape: True where the token has bytes."""
        size = len(self.target)
        return ~self._is_special[token_ids.clamp(0, size)] & (token_ids >= 0)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tables beside the models."""
        return self._is_special.nbytes

    def with_models(self, models: Mapping[str, PreTrainedModel]) -> LockStepLM:
        """The same over other copies of the models."""
        return LockStepLM(models, self.target, start_id=self.start_id, max_length=self.max_length)

    def session(self) -> LockStepLMSession:
        """A new session."""
        return LockStepLMSession(self)

    @isolated
    def sequence(self, input_ids: Tensor, masked: Tensor | None) -> LMLogits:
        """All positions; bool `masked` [rows, length] is True for left padding."""
        rows, length = input_ids.shape
        logits: dict[str, list[Tensor]] = {name: [] for name in self.models}
        position = 0
        while position < length:
            first = self.first_read(position + 1)
            stop = position + 1
            while stop < length and self.first_read(stop + 1) == first:
                stop += 1
            window = slice(first, stop)
            readers = {name: CachedLM(model) for name, model in self.models.items()}
            read, starts = self.feed(
                readers, input_ids[:, window], None, None if masked is None else masked[:, window], stop - position
            )
            # After a beginning that is all padding, what the start token says holds.
            first_slot = position - first + 1
            slots = torch.arange(first_slot, stop - first + 1, device=self.device)
            places = torch.maximum(slots, starts[:, None]) - first_slot
            for name, each in read.items():
                logits[name].append(each.gather(1, places[..., None].expand_as(each)))
            position = stop
        width = len(self.target)
        return LMLogits(
            {
                name: torch.cat(each, dim=1) if each else torch.zeros(rows, 0, width, device=self.device)
                for name, each in logits.items()
            },
            width,
        )

    def first_read(self, length: int) -> int:
        """The first token that is read of a text of `length` tokens."""
        if self.max_length is None or length + 1 <= self.max_length:
            return 0
        stride = max(1, self.max_length // 2)
        return -(-(length + 1 - self.max_length) // stride) * stride

    def feed(
        self, readers: Mapping[str, CachedLM], new_ids: Tensor, starts: Tensor | None, masked: Tensor | None, keep: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Read ids; without `starts`, the rows begin here, with a start token before them.

        Args:
            readers: by head; extended in place.
            new_ids: int64 [rows, new].
            starts: int64 [rows], slots of the start tokens.
            masked: bool [rows, new]; only with starts None.
            keep: of how many of the last ids the logits are wanted.

        Returns:
            Logits [rows, keep, width of the head] by head, and the slots of the start tokens.
        """
        known = new_ids.clamp(0, len(self.target))
        special = self._is_special[known] | (new_ids < 0)
        if masked is not None:
            special = special | masked
        ids = known.masked_fill(known >= self._readable, self.start_id)
        before = next(iter(readers.values())).slots
        if starts is None:
            rows = new_ids.shape[0]
            starts = special.long().cumprod(dim=1).sum(dim=1)
            ids = torch.cat([ids.new_full((rows, 1), self.start_id), ids], dim=1)
        slots = torch.arange(before, before + ids.shape[1], device=self.device)
        ids = torch.where(slots == starts[:, None], self.start_id, ids)
        positions = (slots - starts[:, None]).clamp(min=0)
        visible = torch.arange(before + ids.shape[1], device=self.device) >= starts[:, None]
        return {name: reader.feed(ids, positions, visible, keep=keep) for name, reader in readers.items()}, starts


class LMLogits:
    """`NextTokenScores` of a lock-step LM.

    Args:
        logits: float32 [..., width of the head] by head.
        target_vocab_size: number of the target's ids.
    """

    def __init__(self, logits: Mapping[str, Tensor], target_vocab_size: int) -> None:
        self._logits = logits
        self._size = target_vocab_size

    def positions(self, start: int, stop: int) -> LMLogits:
        """See `NextTokenScores.positions`."""
        return LMLogits({name: each[:, start:stop] for name, each in self._logits.items()}, self._size)

    def log_scores(self, head: str, token_ids: Tensor | None = None) -> Tensor:
        """See `NextTokenScores.log_scores`."""
        logits = self._logits[head]
        if token_ids is not None:
            return logits.gather(-1, token_ids.clamp(0, min(self._size, logits.shape[-1]) - 1))
        missing = self._size - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, missing)) if missing > 0 else logits[..., : self._size]


class LockStepLMSession:
    """`GuideSession` of a lock-step LM.

    Args:
        guide: the models.
    """

    def __init__(self, guide: LockStepLM) -> None:
        self.guide = guide
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._ids: Tensor | None = None
        self._last: LMLogits | None = None
        self._starts: Tensor | None = None
        self._started = 0  # length of prefix by which every row has a token with text
        self._first = 0
        self._readers = {name: CachedLM(model) for name, model in self.guide.models.items()}

    @isolated
    def step(self, input_ids: Tensor, readings: Tensor) -> tuple[LMLogits, list[float]]:
        """See `GuideSession.step`."""
        first = self.guide.first_read(input_ids.shape[1])
        empty = input_ids.shape[1] == 0 or (self._ids is not None and self._ids.shape[1] == 0)
        if self._ids is None or self._starts is None or self._last is None or empty:
            return self._rebuild(input_ids, first), readings.tolist()
        reuse, values = match_prefixes(self._ids, input_ids, readings)
        if reuse.unchanged:
            return self._last, values
        # Where all kept tokens of a row are special, its start token may lie further on.
        if first != self._first or reuse.keep < max(self._started, first + 1):
            return self._rebuild(input_ids, first), values
        starts = self._starts
        for reader in self._readers.values():
            reader.cut(reader.slots - (reuse.keep - first + 1))
            if reuse.parents is not None:
                reader.select(reuse.parents)
        if reuse.parents is not None:
            starts = starts[reuse.parents]
        logits, _ = self.guide.feed(self._readers, input_ids[:, reuse.keep :], starts, None, 1)
        return self._remember(input_ids, starts, logits), values

    def _rebuild(self, input_ids: Tensor, first: int) -> LMLogits:
        self.reset()
        self._first = first
        logits, starts = self.guide.feed(self._readers, input_ids[:, first:], None, None, 1)
        self._started = first + int(starts.max()) + 1
        return self._remember(input_ids, starts, logits)

    def _remember(self, input_ids: Tensor, starts: Tensor, logits: Mapping[str, Tensor]) -> LMLogits:
        self._ids, self._starts = input_ids.clone(), starts  # the caller may write into its ids later
        self._last = LMLogits({name: each[:, -1] for name, each in logits.items()}, len(self.guide.target))
        return self._last
