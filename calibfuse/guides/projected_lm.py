"""A causal LM as guide of a target with another vocabulary: it reads the text in its own tokens.

Each row follows its own text (source_text.py): finished words are in the key/value cache, the open word is read anew at
each step. The distributions after its tokens are carried over to the target's tokens (projection.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibfuse.guide import Request
from calibfuse.guides.bound_lm import BoundCausalLM, LMLogits
from calibfuse.guides.kv_cache import RaggedReader
from calibfuse.guides.projection import Projection
from calibfuse.guides.source_text import SourcePrefix, SourceText, Spelling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import Vocabulary

_LEAST = 1e-30  # probability of a token of the text: a model that says 0 must not make everything impossible
_MOST_LOG = 500.0


class ProjectedLM(BoundCausalLM):
    """Models of one vocabulary, read for the ids of another one; see `BoundCausalLM`."""

    lock_step = False

    def __init__(
        self,
        calibrator: Any,  # noqa: ANN401
        models: Mapping[str, PreTrainedModel],
        source_text: SourceText,
        target: Vocabulary,
    ) -> None:
        self.source_text = source_text
        self._bytes = [target.token_bytes(token_id) for token_id in range(len(target))]
        super().__init__(calibrator, models, target, start_id=source_text.start_id)

    def make_tables(self) -> None:
        text = self.source_text
        self.projection = Projection(text.vocabulary, self.vocabulary, self.device, initial_space=text.adds_space)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tables beside the models; those made while decoding are not counted."""
        return self.projection.memory_bytes

    def covers(self, token_ids: Tensor) -> Tensor:
        """Bool, same shape: True where the token has bytes that the own vocabulary can spell."""
        size = len(self.vocabulary)
        return self.projection.spelled[token_ids.clamp(0, size - 1)] & (token_ids >= 0) & (token_ids < size)

    def read_sequence(self, input_ids: Tensor, masked: Tensor | None) -> LMLogits:
        """See `Guide.read_sequence`; token by token."""
        rows = (input_ids if masked is None else input_ids.masked_fill(masked, len(self.vocabulary))).tolist()
        session = self.session()
        steps = [
            session.step([Request(row, ids[: at + 1]) for row, ids in enumerate(rows)])
            for at in range(input_ids.shape[1])
        ]
        nothing = torch.zeros(len(rows), 0, len(self.vocabulary), device=self.device)
        logs = {
            head: torch.cat([nothing, *(step.log_scores(head)[:, None] for step in steps)], dim=1)
            for head in self.heads
        }
        return LMLogits(logs, len(self.vocabulary))

    def prefix(self, known: tuple[Sequence[int], SourcePrefix] | None, ids: list[int]) -> SourcePrefix:
        """The text in the LM's own tokens; gone on from what is known where the ids go on."""
        start, prefix = 0, self.source_text.empty()
        if known is not None and ids[: len(known[0])] == known[0]:
            start, prefix = len(known[0]), known[1]
        size = len(self._bytes)
        return self.source_text.extend(prefix, [self._bytes[each] if 0 <= each < size else b"" for each in ids[start:]])

    def _context(self, prefix: SourcePrefix, extra: int) -> list[int]:
        """The finished own tokens that the models read when `extra` more follow."""
        tokens = prefix.closed
        return [self.start_id, *tokens[1 + min(self.left_out(len(tokens) + extra), len(tokens) - 1) :]]

    def read(self, reader: RaggedReader, keys: Sequence[Hashable], prefixes: Sequence[SourcePrefix]) -> LMLogits:
        marginals, projection = self.marginals(reader, keys, prefixes), self.projection
        logs = {head: projection.log_by_id(projection.token_masses(each)) for head, each in marginals.items()}
        return LMLogits(logs, len(self.vocabulary))

    def marginals(
        self, reader: RaggedReader, keys: Sequence[Hashable], prefixes: Sequence[SourcePrefix]
    ) -> dict[str, Tensor]:
        """Read what is new of some texts; marginals of the target's strings, float64 [texts, strings] by head."""
        spellings = [self.source_text.spell(prefix.word) for prefix in prefixes]
        contexts = [self._context(prefix, len(each.ids)) for prefix, each in zip(prefixes, spellings, strict=True)]
        # The last finished token is read with the open word, so that a distribution after it is at hand.
        finished = [context[:-1] for context in contexts]
        openings = [[context[-1], *each.ids] for context, each in zip(contexts, spellings, strict=True)]
        news = reader.arrange(keys, finished)
        if reader.is_wasteful(max(map(len, news)), max(map(len, contexts))):
            news = reader.restart(finished)
        logits = reader.read(news, openings, keep=max(map(len, openings)))
        return {name: self._carried_over(prefixes, spellings, each.softmax(dim=-1)) for name, each in logits.items()}

    def _carried_over(self, prefixes: Sequence[SourcePrefix], spellings: Sequence[Spelling], probs: Tensor) -> Tensor:
        """Marginals of the target's strings, float64 [rows, strings].

        `probs`: [rows, slots, own ids], after the last finished token and after each token of the open word.
        """
        projection, device = self.projection, self.device
        masses = projection.own_masses(probs)
        lengths = torch.tensor([len(each.ids) for each in spellings], device=device)
        weights = _path_weights(probs.double(), spellings, lengths)
        # A rest that no token spells has still to be spelled: only tokens that run past it count.
        spelled = torch.tensor([not each.rest for each in spellings], device=device)
        last = masses[torch.arange(len(masses), device=device), lengths]
        marginals = projection.following(last)
        at_start = [prefix.at_start(self.start_id) for prefix in prefixes]
        if any(at_start) and projection.initial_space:
            initial = torch.tensor(at_start, device=device)[:, None]
            marginals = torch.where(initial, projection.initial(last), marginals)
        marginals = marginals * (weights.gather(1, lengths[:, None]) * spelled[:, None])
        for row, (prefix, spelling) in enumerate(zip(prefixes, spellings, strict=True)):
            for at, end in enumerate([0, *spelling.ends] if len(spelling.ends) == len(spelling.ids) else []):
                if remaining := prefix.word[end:]:
                    projection.crossing(remaining).add(marginals[row], masses[row, at] * weights[row, at])
        return marginals


def _path_weights(probs: Tensor, spellings: Sequence[Spelling], lengths: Tensor) -> Tensor:
    """Probability of the first j tokens of each open word, over that of all: float64 [rows, slots].

    What comes after all of them nearly always matters most; its weight is 1 however improbable the word is.
    """
    slots = probs.shape[1]
    rows = [[*each.ids, *[0] * (slots - 1 - len(each.ids))] for each in spellings]
    nexts = torch.tensor(rows, dtype=torch.int64, device=probs.device)
    steps = probs[:, :-1].gather(-1, nexts[..., None])[..., 0]
    logs = torch.nn.functional.pad(steps.clamp(min=_LEAST).log().cumsum(dim=-1), (1, 0))
    # Beyond the end there is nothing to weigh; the bound keeps sums finite.
    return (logs - logs.gather(1, lengths[:, None])).clamp(max=_MOST_LOG).exp()
