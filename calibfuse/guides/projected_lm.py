"""A causal LM as guide of a target with another vocabulary: it reads the text in its own tokens.

Each row follows its own text (source_text.py): finished words are in the key/value cache, the open word is read anew at
each step and cut from the cache again. Rows have different numbers of own tokens, so slots of the cache are masked
where a row has none. The distributions after the tokens of the open word are carried over to the target's tokens
(projection.py), and for the most probable own tokens that targets go on from, the model reads one token further, side
by side.

All state derives from the ids: rows may be reordered, rolled back or exchanged at any time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from calibfuse.guide import GuideSession, NextTokenScores, Request, isolated
from calibfuse.guides.kv_cache import RaggedReader
from calibfuse.guides.projection import Projection
from calibfuse.guides.source_text import SourcePrefix, SourceText, Spelling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import Vocabulary

_LEAST = 1e-30  # probability of a token of the text: a model that says 0 must not make everything impossible
_MOST_LOG = 500.0


class ProjectedLM:
    """Models of one vocabulary, read for the ids of another one.

    Args:
        models: by head; all with the same own vocabulary.
        source_text: spells text in that vocabulary.
        target: vocabulary of the ids.
        further: own tokens per position after which the models are asked once more; 0: none.
        max_length: tokens that the models can read; None: any number.
        projection: tables of the two vocabularies on the models' device, where they exist already.
    """

    def __init__(
        self,
        models: Mapping[str, PreTrainedModel],
        source_text: SourceText,
        target: Vocabulary,
        *,
        further: int,
        max_length: int | None,
        projection: Projection | None = None,
    ) -> None:
        self.models = dict(models)
        self.source_text = source_text
        self.target = target
        self.further = further
        self.max_length = max_length
        self.device = next(iter(self.models.values())).device
        self.projection = projection or Projection(
            source_text.vocabulary, target, self.device, initial_space=source_text.adds_space
        )
        self._bytes = [target.token_bytes(token_id) for token_id in range(len(target))]

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tables beside the models; those made while decoding are not counted."""
        return self.projection.memory_bytes

    def with_models(self, models: Mapping[str, PreTrainedModel]) -> ProjectedLM:
        """The same over other copies of the models."""
        there = next(iter(models.values())).device
        return ProjectedLM(
            models,
            self.source_text,
            self.target,
            further=self.further,
            max_length=self.max_length,
            projection=self.projection if there == self.device else None,
        )

    def covers(self, token_ids: Tensor) -> Tensor:
        """Bool, same shape: True where the token has bytes that the own vocabulary can spell."""
        size = len(self.target)
        return self.projection.spelled[token_ids.clamp(0, size - 1)] & (token_ids >= 0) & (token_ids < size)

    def session(self) -> ProjectedSession:
        """A new session."""
        return ProjectedSession(self)

    def sequence(self, input_ids: Tensor, masked: Tensor | None) -> ProjectedSequence:
        """All positions; bool `masked` [rows, length] is True for left padding."""
        if masked is not None:
            input_ids = input_ids.masked_fill(masked, len(self.target))
        return ProjectedSequence(self.session(), input_ids, 0, input_ids.shape[1])

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of target ids; empty for special tokens and ids beyond the vocabulary."""
        size = len(self._bytes)
        return [self._bytes[each] if 0 <= each < size else b"" for each in ids]

    def context(self, prefix: SourcePrefix, extra: int) -> list[int]:
        """The finished own tokens that the models read when `extra` more follow: the last ones, where all are too many.

        What is dropped changes only once in a while, so that the cache stays of use.
        """
        tokens = list(prefix.closed)
        over = 0 if self.max_length is None else len(tokens) + extra - self.max_length
        if over <= 0:
            return tokens
        assert self.max_length is not None
        stride = max(1, self.max_length // 2)
        dropped = min(-(-over // stride) * stride, len(tokens) - 1)
        return [self.source_text.start_id, *tokens[1 + dropped :]]


class ProjectedStates(NextTokenScores):
    """`NextTokenScores` of a projected LM.

    Args:
        guide: the models.
        marginals: float64 [..., target strings] by head.
    """

    def __init__(self, guide: ProjectedLM, marginals: Mapping[str, Tensor]) -> None:
        self._guide = guide
        self._marginals = marginals
        self._logs: dict[str, Tensor] = {}

    def positions(self, start: int, stop: int) -> ProjectedStates:
        """See `NextTokenScores.positions`."""
        return ProjectedStates(self._guide, {name: each[:, start:stop] for name, each in self._marginals.items()})

    def log_scores(self, head: str, token_ids: Tensor | None = None) -> Tensor:
        """See `NextTokenScores.log_scores`."""
        projection = self._guide.projection
        if head not in self._logs:
            masses = projection.token_masses(self._marginals[head])
            self._logs[head] = projection.log_by_id(masses, split_copies=True)
        return _pick(self._logs[head], token_ids)

    def log_marginals(self, head: str, token_ids: Tensor | None = None) -> Tensor:
        """Log-probability that the text goes on with the bytes of each token, up to a constant per position.

        Unlike `log_scores`, " th" holds here all of " the", even where both are tokens.
        """
        projection = self._guide.projection
        return _pick(projection.log_by_id(self._marginals[head], split_copies=False), token_ids)


class ProjectedSequence(NextTokenScores):
    """`NextTokenScores` of whole sequences, computed when asked for.

    Args:
        session: follows the sequences.
        input_ids: int64 [rows, length].
        start: first position.
        stop: position after the last.
    """

    def __init__(self, session: ProjectedSession, input_ids: Tensor, start: int, stop: int) -> None:
        self._session = session
        self._ids = input_ids
        self._range = range(start, stop)
        self._states: list[ProjectedStates] | None = None

    def positions(self, start: int, stop: int) -> ProjectedSequence:
        """See `NextTokenScores.positions`."""
        part = self._range[start:stop]
        return ProjectedSequence(self._session, self._ids, part.start, part.stop)

    def log_scores(self, head: str, token_ids: Tensor | None = None) -> Tensor:
        """See `NextTokenScores.log_scores`."""
        if self._states is None:
            rows = self._ids.tolist()
            self._states = [
                self._session.step([Request(row, ids[: at + 1]) for row, ids in enumerate(rows)]) for at in self._range
            ]
        if not self._states:
            width = len(self._session.guide.target) if token_ids is None else token_ids.shape[-1]
            return torch.zeros(self._ids.shape[0], 0, width, device=self._ids.device)
        wanted = [None if token_ids is None else token_ids[:, at] for at in range(len(self._states))]
        return torch.stack(
            [state.log_scores(head, ids) for state, ids in zip(self._states, wanted, strict=True)], dim=1
        )


class ProjectedSession(GuideSession):
    """`GuideSession` of a projected LM.

    Args:
        guide: the models.
    """

    def __init__(self, guide: ProjectedLM) -> None:
        self.guide = guide
        self.reset()

    def reset(self) -> None:
        """See `GuideSession.reset`."""
        self._reader: RaggedReader | None = None
        self._prefixes: dict[Hashable, tuple[list[int], SourcePrefix]] = {}
        self._last: tuple[list[Hashable], ProjectedStates] | None = None

    def drop(self, keys: Iterable[Hashable]) -> None:
        """See `GuideSession.drop`; what they held goes with the next step, which names the texts that stay."""
        for key in keys:
            self._prefixes.pop(key, None)
        if not self._prefixes:
            self.reset()

    def copy(self, pairs: Mapping[Hashable, Hashable]) -> None:
        """See `GuideSession.copy`."""
        self._prefixes.update({new: self._prefixes[old] for new, old in pairs.items() if old in self._prefixes})
        if self._reader is not None:
            self._reader.copy(pairs)

    @isolated
    def step(self, requests: Sequence[Request]) -> ProjectedStates:
        """See `GuideSession.step`."""
        requests = [Request(*request) for request in requests]
        keys, texts = [request.key for request in requests], [list(request.ids) for request in requests]
        unchanged = all(
            key in self._prefixes and self._prefixes[key][0] == ids for key, ids in zip(keys, texts, strict=True)
        )
        if self._last is not None and unchanged and self._last[0] == keys:
            return self._last[1]
        reader, known = self._reader, self._prefixes
        self.reset()  # what breaks off leaves the session empty
        reader = reader or RaggedReader(self.guide.models)
        prefixes = [self._prefix(known.get(key), ids) for key, ids in zip(keys, texts, strict=True)]
        said = ProjectedStates(self.guide, self._read(reader, keys, prefixes))
        self._prefixes = dict(zip(keys, zip(texts, prefixes, strict=True), strict=True))
        self._reader, self._last = reader, (keys, said)
        return said

    def _prefix(self, known: tuple[list[int], SourcePrefix] | None, ids: list[int]) -> SourcePrefix:
        """The text in the LM's own tokens; gone on from what is known where the ids go on."""
        text = self.guide.source_text
        if known is not None and ids[: len(known[0])] == known[0]:
            return text.extend(known[1], self.guide.pieces(ids[len(known[0]) :]))
        return text.extend(text.empty(), self.guide.pieces(ids))

    def _read(
        self, reader: RaggedReader, keys: Sequence[Hashable], prefixes: Sequence[SourcePrefix]
    ) -> dict[str, Tensor]:
        """Marginals by head, float64 [rows, target strings]."""
        guide = self.guide
        spellings = [guide.source_text.spell(prefix.word) for prefix in prefixes]
        contexts = [guide.context(prefix, len(each.ids) + 1) for prefix, each in zip(prefixes, spellings, strict=True)]
        # The last finished token is read with the open word, so that a distribution after it is at hand.
        finished = [context[:-1] for context in contexts]
        openings = [[context[-1], *each.ids] for context, each in zip(contexts, spellings, strict=True)]
        news = reader.arrange(keys, finished)
        ahead, behind = max(map(len, news)), max(map(len, openings))
        if reader.is_wasteful(ahead, max(map(len, contexts))):
            news = reader.restart(finished)
            ahead = max(map(len, finished))
        first, opened = reader.width, reader.width + ahead
        rows, width = len(contexts), opened + behind
        ids = np.full((rows, ahead + behind), guide.source_text.start_id)
        positions = np.zeros((rows, ahead + behind), dtype=np.int64)
        visible = np.zeros((rows, width), dtype=bool)
        for row in range(rows):
            new, opening, known = news[row], openings[row], len(reader.tokens[row])
            visible[row, reader.slots[row]] = True
            for tokens, place, position in ((new, 0, known), (opening, ahead, known + len(new))):
                ids[row, place : place + len(tokens)] = tokens
                positions[row, place : place + len(tokens)] = range(position, position + len(tokens))
                visible[row, first + place : first + place + len(tokens)] = True
            reader.slots[row] += range(first, first + len(new))
            reader.tokens[row] += new
        seen = self._tensor(visible)
        probs = {
            name: each.feed(self._tensor(ids), self._tensor(positions), seen, keep=behind).softmax(dim=-1)
            for name, each in reader.readers.items()
        }
        marginals = self._project(reader, prefixes, spellings, probs, visible, opened)
        reader.width = opened
        reader.cut()
        return marginals

    def _project(
        self,
        reader: RaggedReader,
        prefixes: Sequence[SourcePrefix],
        spellings: Sequence[Spelling],
        probs: Mapping[str, Tensor],
        visible: np.ndarray,
        opened: int,
    ) -> dict[str, Tensor]:
        """From the models' distributions after the tokens of the open words to marginals over target strings."""
        projection, device = self.guide.projection, self.guide.device
        rows = len(spellings)
        lengths = torch.tensor([len(each.ids) for each in spellings], device=device)
        at_start = [prefix.at_start(self.guide.source_text.start_id) for prefix in prefixes]
        initial = torch.tensor(at_start, device=device)
        masses, weights, marginals = {}, {}, {}
        for name, each in probs.items():
            masses[name] = projection.own_masses(each)  # (rows, behind, own strings)
            weights[name] = self._path_weights(each.double(), spellings)  # (rows, behind)
            last = masses[name][torch.arange(rows, device=device), lengths]
            whole = projection.following(last)
            if any(at_start) and projection.initial_space:
                whole = torch.where(initial[:, None], projection.initial(last), whole)
            # A rest that no token spells has still to be spelled: only tokens that run past it count.
            spelled = torch.tensor([not each.rest for each in spellings], device=device)
            marginals[name] = whole * (weights[name].gather(1, lengths[:, None]) * spelled[:, None])
        for row, spelling in enumerate(spellings):
            for at, remaining in _open_ends(prefixes[row].word, spelling):
                pairs = projection.crossing(remaining).pairs
                for name in probs:
                    pairs.add(marginals[name][row], masses[name][row, at] * weights[name][row, at])
        if self.guide.further:
            self._read_further(reader, prefixes, spellings, masses, weights, marginals, visible, opened)
        return marginals

    def _path_weights(self, probs: Tensor, spellings: Sequence[Spelling]) -> Tensor:
        """Probability of the first j tokens of each open word, over that of all: float64 [rows, behind].

        What comes after all of them nearly always matters most; its weight is 1 however improbable the word is.
        """
        behind = probs.shape[1]
        nexts = torch.tensor([[*each.ids, *[0] * (behind - len(each.ids))] for each in spellings], device=probs.device)
        steps = probs[:, :-1].gather(-1, nexts[:, : behind - 1, None])[..., 0]
        logs = torch.nn.functional.pad(steps.clamp(min=_LEAST).log().cumsum(dim=-1), (1, 0))
        ends = torch.tensor([[len(each.ids)] for each in spellings], device=probs.device)
        # Beyond the end there is nothing to weigh; the bound keeps sums finite.
        return (logs - logs.gather(1, ends)).clamp(max=_MOST_LOG).exp()

    def _read_further(
        self,
        reader: RaggedReader,
        prefixes: Sequence[SourcePrefix],
        spellings: Sequence[Spelling],
        masses: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        marginals: Mapping[str, Tensor],
        visible: np.ndarray,
        opened: int,
    ) -> None:
        """Replace the shares of targets behind the most probable own tokens by what the models say there; in place."""
        guide, projection = self.guide, self.guide.projection
        rows, width = len(spellings), visible.shape[1]
        chosen = [
            self._worth_asking(prefixes[row], spellings[row], {name: each[row] for name, each in masses.items()},
                               {name: each[row] for name, each in weights.items()})
            for row in range(rows)
        ]  # fmt: skip
        most = max(map(len, chosen))
        if not most:
            return
        ids = np.full((rows, most), guide.source_text.start_id)
        positions = np.zeros((rows, most), dtype=np.int64)
        sees = np.zeros((rows, most, width + most), dtype=bool)
        for row, questions in enumerate(chosen):
            sees[row, :, :width] = visible[row]
            sees[row, range(most), range(width, width + most)] = True
            for at, (after, _, place) in enumerate(questions):
                ids[row, at] = guide.source_text.id_of(projection.own.strings[place])
                # Tokens of the open word behind which it is not asked are not there.
                sees[row, at, opened + after + 1 : width] = False
                positions[row, at] = int(sees[row, at, :width].sum())
        sees_tensor = self._tensor(sees)
        for name, each in reader.readers.items():
            logits = each.feed(self._tensor(ids), self._tensor(positions), sees_tensor, keep=most)
            answers = projection.own_masses(logits.softmax(dim=-1))
            for row, questions in enumerate(chosen):
                for at, (after, remaining, place) in enumerate(questions):
                    onward = projection.continuations(projection.own.strings[place][len(remaining) :])
                    before = masses[name][row, after, place] * weights[name][row, after]
                    change = onward.marginals(answers[row, at]) - onward.shares
                    marginals[name][row].index_add_(-1, onward.targets, change * before)

    def _worth_asking(
        self, prefix: SourcePrefix, spelling: Spelling, masses: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> list[tuple[int, bytes, int]]:
        """The most probable own tokens of one row that targets go on from.

        Returns:
            For each: after how many tokens of the open word, the bytes of the word that it still spells, and its place
            among the own strings. The same for all heads: what one knows better than the other would look like a
            contrast.
        """
        projection = self.guide.projection
        totals = {name: weights[name][: len(spelling.ids) + 1].sum() for name in masses}
        found: list[tuple[float, int, bytes, int]] = []

        def consider(after: int, remaining: bytes, places: Tensor) -> None:
            values = torch.stack(
                [each[after, places] * weights[name][after] / totals[name] for name, each in masses.items()]
            ).mean(dim=0)
            best, index = values.topk(min(self.guide.further, len(places)))
            for value, place in zip(best.tolist(), places[index].tolist(), strict=True):
                found.append((value, after, remaining, place))

        for after, remaining in _open_ends(prefix.word, spelling):
            consider(after, remaining, projection.crossing(remaining).goes_on)
        # At the start of a text, own tokens may begin with a space that the text has not: another table.
        spaced = projection.initial_space and prefix.at_start(self.guide.source_text.start_id)
        if not spelling.rest and not spaced:
            consider(len(spelling.ids), b"", projection.following.goes_on)
        found.sort(key=lambda each: -each[0])
        return [
            (after, remaining, place) for value, after, remaining, place in found[: self.guide.further] if value > 0
        ]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.guide.device)


def _open_ends(word: bytes, spelling: Spelling) -> list[tuple[int, bytes]]:
    """Numbers of tokens of an open word after which bytes of it are still to be spelled, and these bytes."""
    if len(spelling.ends) != len(spelling.ids):
        return []
    ends = [(at, word[end:]) for at, end in enumerate([0, *spelling.ends])]
    return [(at, remaining) for at, remaining in ends if remaining]


def _pick(logs: Tensor, token_ids: Tensor | None) -> Tensor:
    if token_ids is None:
        return logs
    return logs.gather(-1, token_ids.clamp(0, logs.shape[-1] - 1))
