"""A causal LM as guide of a target with the same vocabulary: it reads the target's own ids in lock-step.

A start token stands in place of a text's leading run of special tokens; beyond the model's length, of its beginning.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from calibfuse.guide import isolated
from calibfuse.guides.bound_lm import BoundCausalLM, LMLogits, embeddings_of
from calibfuse.guides.kv_cache import RaggedReader


class LockStepLM(BoundCausalLM):
    """Models that share the target's ids."""

    lock_step = True

    def make_tables(self) -> None:
        self._readable = min(map(embeddings_of, self.models.values()))
        # Special is also what has no embedding, and, in the entry behind all ids, what lies beyond the vocabulary.
        special = [*self.vocabulary.is_special[: self._readable].tolist()]
        self._special = special + [True] * (len(self.vocabulary) + 1 - len(special))
        self._is_special = torch.tensor(self._special, device="cpu").to(self.device)

    def covers(self, token_ids: Tensor) -> Tensor:
        """Bool, same shape: True where the token has bytes."""
        return ~self._is_special[token_ids.clamp(0, len(self.vocabulary))] & (token_ids >= 0)

    def prefix(self, known: object, ids: Sequence[int]) -> list[int]:
        """A start token, and what comes after the leading special tokens."""
        ids = ids[self.left_out(1 + len(ids)) :]
        size = len(self._special)
        lead = next((at for at, each in enumerate(ids) if 0 <= each < size and not self._special[each]), len(ids))
        return [self.start_id, *(each if 0 <= each < self._readable else self.start_id for each in ids[lead:])]

    def read(self, reader: RaggedReader, keys: Sequence[Hashable], prefixes: Sequence[list[int]]) -> LMLogits:
        # The last token is always read, so that a distribution after it is at hand.
        news = reader.arrange(keys, [prefix[:-1] for prefix in prefixes])
        news = [[*new, prefix[-1]] for new, prefix in zip(news, prefixes, strict=True)]
        if reader.is_wasteful(max(map(len, news)), max(map(len, prefixes))):
            news = reader.restart(prefixes)
        logits = reader.read(news, keep=1)
        return LMLogits({name: each[:, -1] for name, each in logits.items()}, len(self.vocabulary))

    @isolated
    def read_sequence(self, input_ids: Tensor, masked: Tensor | None) -> LMLogits:
        rows = (input_ids if masked is None else input_ids.masked_fill(masked, -1)).tolist()
        logits: dict[str, list[Tensor]] = {
            name: [torch.zeros(len(rows), 0, len(self.vocabulary), device=self.device)] for name in self.models
        }
        for _, group in itertools.groupby(range(input_ids.shape[1]), lambda at: self.left_out(at + 2)):
            positions = list(group)
            first, stop = positions[0], positions[-1] + 1
            prefixes = [self.prefix(None, ids[:stop]) for ids in rows]
            reader = RaggedReader(self.models)
            width = max(map(len, prefixes))
            read = reader.read(reader.arrange(range(len(rows)), prefixes), keep=width)
            # After a beginning that is all padding, what the start token says holds.
            slots = torch.arange(width - stop + first, width, device=self.device)
            starts = torch.tensor([width - len(prefix) for prefix in prefixes], device=self.device)
            places = torch.maximum(slots, starts[:, None])[..., None]
            for name, each in read.items():
                logits[name].append(each.gather(1, places.expand(-1, -1, each.shape[-1])))
        return LMLogits(
            {name: torch.cat(each[1:] or each, dim=1) for name, each in logits.items()}, len(self.vocabulary)
        )
