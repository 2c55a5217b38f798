"""A causal LM as guide of a target with another vocabulary: it reads the text in its own tokens.

Each row follows its own text (source_text.py): finished words are in the key/value cache, the open word is read anew at
each step. The distributions after its tokens are carried over to the target's tokens (projection.py), and behind the
most probable own tokens that targets go on from, the model reads one token further, side by side.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
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
    """Models of one vocabulary, read for the ids of another one; see `BoundCausalLM`.

    `further`: own tokens per position after which the models are asked once more; 0: none.
    """

    lock_step = False

    def __init__(
        self,
        calibrator: Any,  # noqa: ANN401
        models: Mapping[str, PreTrainedModel],
        source_text: SourceText,
        target: Vocabulary,
        *,
        further: int,
    ) -> None:
        self.source_text = source_text
        self.further = further
        self._bytes = [target.token_bytes(token_id) for token_id in range(len(target))]
        super().__init__(calibrator, models, target, start_id=source_text.start_id)

    def make_tables(self) -> None:
        """See `BoundCausalLM.make_tables`."""
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
        """See `BoundCausalLM.read`."""
        marginals, projection = self.marginals(reader, keys, prefixes), self.projection
        logs = {head: projection.log_by_id(projection.token_masses(each)) for head, each in marginals.items()}
        return LMLogits(logs, len(self.vocabulary))

    def marginals(
        self, reader: RaggedReader, keys: Sequence[Hashable], prefixes: Sequence[SourcePrefix]
    ) -> dict[str, Tensor]:
        """Read what is new of some texts; marginals of the target's strings, float64 [texts, strings] by head."""
        spellings = [self.source_text.spell(prefix.word) for prefix in prefixes]
        contexts = [self._context(prefix, len(each.ids) + 1) for prefix, each in zip(prefixes, spellings, strict=True)]
        # The last finished token is read with the open word, so that a distribution after it is at hand.
        finished = [context[:-1] for context in contexts]
        openings = [[context[-1], *each.ids] for context, each in zip(contexts, spellings, strict=True)]
        news = reader.arrange(keys, finished)
        if reader.is_wasteful(max(map(len, news)), max(map(len, contexts))):
            news = reader.restart(finished)
        logits = reader.read(news, openings, keep=max(map(len, openings)))
        probs = {name: each.softmax(dim=-1) for name, each in logits.items()}
        return _OpenWords(self, prefixes, spellings, probs).marginals(reader)


class _OpenWords:
    """What the models say behind the tokens of the open words of some texts, carried over to the target's strings.

    `probs`: by head, [rows, slots, own ids]: after the last finished token and after each token of the word.
    """

    def __init__(
        self,
        guide: ProjectedLM,
        prefixes: Sequence[SourcePrefix],
        spellings: Sequence[Spelling],
        probs: Mapping[str, Tensor],
    ) -> None:
        self.guide, self.prefixes, self.spellings = guide, prefixes, spellings
        self.lengths = torch.tensor([len(each.ids) for each in spellings], device=guide.device)
        self.at_start = [prefix.at_start(guide.start_id) for prefix in prefixes]
        self.masses = {name: guide.projection.own_masses(each) for name, each in probs.items()}
        self.weights = {name: self._path_weights(each.double()) for name, each in probs.items()}

    def _path_weights(self, probs: Tensor) -> Tensor:
        """Probability of the first j tokens of each open word, over that of all: float64 [rows, slots].

        What comes after all of them nearly always matters most; its weight is 1 however improbable the word is.
        """
        slots = probs.shape[1]
        rows = [[*each.ids, *[0] * (slots - 1 - len(each.ids))] for each in self.spellings]
        nexts = torch.tensor(rows, dtype=torch.int64, device=probs.device)
        steps = probs[:, :-1].gather(-1, nexts[..., None])[..., 0]
        logs = torch.nn.functional.pad(steps.clamp(min=_LEAST).log().cumsum(dim=-1), (1, 0))
        # Beyond the end there is nothing to weigh; the bound keeps sums finite.
        return (logs - logs.gather(1, self.lengths[:, None])).clamp(max=_MOST_LOG).exp()

    def marginals(self, reader: RaggedReader) -> dict[str, Tensor]:
        """Of the target's strings, float64 [rows, target strings] by head."""
        projection, device = self.guide.projection, self.guide.device
        # A rest that no token spells has still to be spelled: only tokens that run past it count.
        spelled = torch.tensor([not each.rest for each in self.spellings], device=device)
        initial = torch.tensor(self.at_start, device=device)
        marginals = {}
        for name, masses in self.masses.items():
            last = masses[torch.arange(len(masses), device=device), self.lengths]
            whole = projection.following(last)
            if any(self.at_start) and projection.initial_space:
                whole = torch.where(initial[:, None], projection.initial(last), whole)
            marginals[name] = whole * (self.weights[name].gather(1, self.lengths[:, None]) * spelled[:, None])
        for row in range(len(self.spellings)):
            for at, remaining in self._open_ends(row):
                pairs = projection.crossing(remaining).pairs
                for name, each in marginals.items():
                    pairs.add(each[row], self.masses[name][row, at] * self.weights[name][row, at])
        if self.guide.further:
            self._ask_further(reader, marginals)
        return marginals

    def _open_ends(self, row: int) -> list[tuple[int, bytes]]:
        """Numbers of tokens of an open word after which bytes of it are still to be spelled, and these bytes."""
        word, spelling = self.prefixes[row].word, self.spellings[row]
        if len(spelling.ends) != len(spelling.ids):
            return []
        ends = [(at, word[end:]) for at, end in enumerate([0, *spelling.ends])]
        return [(at, remaining) for at, remaining in ends if remaining]

    def _ask_further(self, reader: RaggedReader, marginals: Mapping[str, Tensor]) -> None:
        """Replace the shares of targets behind the most probable own tokens by what the models say there; in place."""
        projection, own = self.guide.projection, self.guide.projection.own.strings
        chosen = [self._worth_asking(row) for row in range(len(self.spellings))]
        most = max(map(len, chosen))
        if not most:
            return
        rows, width = reader.visible.shape
        ids = np.full((rows, most), self.guide.start_id)
        positions = np.zeros((rows, most), dtype=np.int64)
        sees = np.zeros((rows, most, width + most), dtype=bool)
        for row, questions in enumerate(chosen):
            sees[row, :, :width] = reader.visible[row]
            sees[row, range(most), range(width, width + most)] = True
            for at, (after, _, place) in enumerate(questions):
                ids[row, at] = self.guide.source_text.id_of(own[place])
                # Tokens of the open word behind which it is not asked are not there.
                sees[row, at, reader.width + after + 1 : width] = False
                positions[row, at] = int(sees[row, at, :width].sum())
        for name, logits in reader.ask(ids, positions, sees).items():
            answers = projection.own_masses(logits.softmax(dim=-1))
            for row, questions in enumerate(chosen):
                for at, (after, remaining, place) in enumerate(questions):
                    onward = projection.continuations(own[place][len(remaining) :])
                    before = self.masses[name][row, after, place] * self.weights[name][row, after]
                    change = onward.marginals(answers[row, at]) - onward.shares
                    marginals[name][row].index_add_(-1, onward.targets, change * before)

    def _worth_asking(self, row: int) -> list[tuple[int, bytes, int]]:
        """The most probable own tokens of one row that targets go on from.

        Of each: after how many tokens of the open word, the bytes of it that are still to spell, and its place among
        the own strings. They are the same for all heads: what one knows better would look like a contrast.
        """
        projection, spelling, further = self.guide.projection, self.spellings[row], self.guide.further
        totals = {name: each[row, : len(spelling.ids) + 1].sum() for name, each in self.weights.items()}
        found: list[tuple[float, int, bytes, int]] = []

        def consider(after: int, remaining: bytes, places: Tensor) -> None:
            values = torch.stack(
                [
                    each[row, after, places] * self.weights[name][row, after] / totals[name]
                    for name, each in self.masses.items()
                ]
            ).mean(dim=0)
            best, index = values.topk(min(further, len(places)))
            for value, place in zip(best.tolist(), places[index].tolist(), strict=True):
                found.append((value, after, remaining, place))

        for after, remaining in self._open_ends(row):
            consider(after, remaining, projection.crossing(remaining).goes_on)
        # At the start of a text, own tokens may begin with a space that the text has not: another table.
        if not spelling.rest and not (projection.initial_space and self.at_start[row]):
            consider(len(spelling.ids), b"", projection.following.goes_on)
        found.sort(key=lambda each: -each[0])
        return [(after, remaining, place) for value, after, remaining, place in found[:further] if value > 0]
