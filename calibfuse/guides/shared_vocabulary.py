"""A causal LM as guide of a target with the same vocabulary: it reads the target's own ids in lock-step.

Slot 0 of the cache is a start token before every row. The leading run of special tokens of a row (left padding, begin
marks) is masked but for its last slot, which holds the start token instead: padding changes nothing, and positions
count from there. Special tokens further on are read as they are.

Texts longer than the model can read are read from a later token on, with a start token before it; that token moves by
half the length at a time, so that the cache stays of use.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from calibfuse.guide import GuideSession, NextTokenScores, Request, isolated
from calibfuse.guides.kv_cache import CachedLM, RaggedReader

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
        holes: rows of different length may be read in one forward.
    """

    def __init__(
        self,
        models: Mapping[str, PreTrainedModel],
        target: Vocabulary,
        *,
        start_id: int,
        max_length: int | None,
        holes: bool = True,
    ) -> None:
        self.models = dict(models)
        self.target = target
        self.start_id = start_id
        self.max_length = max_length
        self.holes = holes
        self.device = next(iter(self.models.values())).device
        widths = [model.get_input_embeddings().num_embeddings for model in self.models.values()]
        self._readable = min(cast(int, width) for width in widths)
        # One entry more than ids: whatever lies beyond the vocabulary counts as special, and so does what has no
        # embedding.
        self._is_special = torch.ones(len(target) + 1, dtype=torch.bool, device="cpu")
        self._is_special[:-1] = torch.from_numpy(target.is_special.copy())
        self._is_special[self._readable :] = True
        self._special = self._is_special.tolist()
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
        return LockStepLM(models, self.target, start_id=self.start_id, max_length=self.max_length, holes=self.holes)

    def context(self, ids: Sequence[int]) -> list[int]:
        """What the models read of a text: a start token, and what comes after the leading special tokens."""
        special, size = self._special, len(self._special)
        ids = ids[self.first_read(len(ids)) :]
        lead = next((at for at, each in enumerate(ids) if 0 <= each < size and not special[each]), len(ids))
        return [self.start_id, *(each if 0 <= each < self._readable else self.start_id for each in ids[lead:])]

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


class LMLogits(NextTokenScores):
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


class LockStepLMSession(GuideSession):
    """`GuideSession` of a lock-step LM.

    Args:
        guide: the models.
    """

    def __init__(self, guide: LockStepLM) -> None:
        self.guide = guide
        self.reset()

    def reset(self) -> None:
        """See `GuideSession.reset`."""
        self._reader: RaggedReader | None = None
        self._last: tuple[list[Hashable], list[list[int]], LMLogits] | None = None

    def drop(self, keys: Iterable[Hashable]) -> None:
        """See `GuideSession.drop`; what they held goes with the next step, which names the texts that stay."""
        if self._last is not None and set(self._last[0]) <= set(keys):
            self.reset()

    def copy(self, pairs: Mapping[Hashable, Hashable]) -> None:
        """See `GuideSession.copy`."""
        if self._reader is not None:
            self._reader.copy(pairs)

    @isolated
    def step(self, requests: Sequence[Request]) -> LMLogits:
        """See `GuideSession.step`."""
        requests = [Request(*request) for request in requests]
        keys, contexts = (
            [request.key for request in requests],
            [self.guide.context(request.ids) for request in requests],
        )
        if self._last is not None and self._last[:2] == (keys, contexts):
            return self._last[2]
        reader, self._reader, self._last = self._reader, None, None  # what breaks off leaves the session empty
        reader = reader or RaggedReader(self.guide.models)
        news = reader.arrange(keys, [context[:-1] for context in contexts])
        news = [[*new, context[-1]] for new, context in zip(news, contexts, strict=True)]
        count = max(map(len, news))
        has_hole = any(read and len(new) < count for read, new in zip(reader.tokens, news, strict=True))
        if (has_hole and not self.guide.holes) or reader.is_wasteful(count, max(map(len, contexts))):
            news = reader.restart(contexts)
        said = LMLogits(reader.read_on(news), len(self.guide.target))
        self._reader, self._last = reader, (keys, contexts, said)
        return said
