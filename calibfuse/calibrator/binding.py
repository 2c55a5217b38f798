"""BoundCalibrator: a universal calibrator compiled for one target vocabulary, whose ids it reads and scores.

Special tokens have no bytes: as input they are the document boundary, as output they are not covered.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from calibfuse.calibrator.composer import token_features
from calibfuse.calibrator.model import CalibratorNetwork
from calibfuse.calibrator.session import CalibratorSession
from calibfuse.calibrator.word_bias import REACH, Spelled, WordBias
from calibfuse.guide import CALIBRATOR_HEAD, VALUE_HEAD, Guide, NextTokenScores, isolated
from calibfuse.vocabulary import Vocabulary

_COMPOSE_CHUNK = 8192
_SCORE_CHUNK = 16_384  # vectors of lower precision that are widened at once
_DENSE = 8  # where an eighth of all tokens are asked for, all of them are multiplied


@isolated
def compose_vocabulary(
    calibrator: CalibratorNetwork, vocabulary: Vocabulary, dtype: torch.dtype, words: WordBias | None = None
) -> tuple[Tensor, Tensor]:
    """Vectors [target_vocab_size, token_width] in `dtype`, biases [target_vocab_size, heads] in float32, on the CPU."""
    size, config = len(vocabulary), calibrator.config
    vectors = torch.empty(size, config.token_width, dtype=dtype, device="cpu")
    biases = torch.empty(size, len(config.heads), dtype=torch.float32, device="cpu")
    for start in range(0, size, _COMPOSE_CHUNK):  # in chunks: the features of 200,000 tokens would take 60 MB
        end = min(start + _COMPOSE_CHUNK, size)
        offsets = vocabulary.offsets[start : end + 1]
        features = token_features(vocabulary.data[offsets[0] : offsets[-1]], offsets - offsets[0], config.bucket_count)
        chunk_vectors, chunk_biases = calibrator.composer(features)
        vectors[start:end] = chunk_vectors.to("cpu", dtype)
        biases[start:end] = chunk_biases.to("cpu", torch.float32)
    # Ids with the same bytes have the same vector: of what the bytes get, each is given its share.
    is_distribution = torch.tensor([head != VALUE_HEAD for head in config.heads], device="cpu")
    biases += torch.from_numpy(vocabulary.log_shares)[:, None] * is_distribution
    if config.words and CALIBRATOR_HEAD in config.heads:
        whole = (WordBias(config.words, vocabulary) if words is None else words).whole()
        biases[torch.from_numpy(whole.token_ids), config.heads.index(CALIBRATOR_HEAD)] += torch.from_numpy(whole.shifts)
    return vectors, biases


class BoundCalibrator(Guide):
    """A guide: the calibrator, which is shared, over one target vocabulary. Made by `Calibrator.bind`.

    `vectors`: [target_vocab_size, token_width]; `biases`: float32 [target_vocab_size, heads].
    """

    calibrator: CalibratorNetwork

    def __init__(
        self,
        calibrator: CalibratorNetwork,
        vocabulary: Vocabulary,
        vectors: Tensor,
        biases: Tensor,
        words: WordBias | None = None,
    ) -> None:
        self.calibrator = calibrator
        self.vocabulary = vocabulary
        self.vectors = vectors
        self._biases = biases
        # One entry more than ids: whatever lies beyond the vocabulary (a padded head) counts as special.
        self._is_special = torch.from_numpy(np.append(vocabulary.is_special, True)).to(vectors.device)
        self._words = WordBias(calibrator.config.words, vocabulary) if words is None else words
        self._always_candidates: dict[int, Tensor | None] = {}

    def to(self, device: torch.device | str) -> BoundCalibrator:
        """The same object where it is there already, else a copy on the device, with its own copy of the model."""
        device = torch.device(device)
        if device == self.device and device == self.calibrator.boundary.device:
            return self
        calibrator = copy.deepcopy(self.calibrator).to(device)
        tables = self.vectors.to(device), self._biases.to(device)
        return BoundCalibrator(calibrator, self.vocabulary, *tables, self._words)

    @property
    def heads(self) -> tuple[str, ...]:
        return self.calibrator.config.heads

    @property
    def device(self) -> torch.device:
        return self.vectors.device

    @property
    def recommended(self) -> Mapping[str, Any]:
        return self.calibrator.config.fusion

    @property
    def memory_bytes(self) -> int:
        """Bytes of the bound vectors and biases."""
        return self.vectors.nbytes + self._biases.nbytes

    def covers(self, token_ids: Tensor) -> Tensor:
        """Bool, same shape: True where the token has bytes."""
        return ~self._is_boundary(token_ids)

    @property
    def reach(self) -> int:
        return max(self.calibrator.body.reach, REACH)

    def session(self) -> CalibratorSession:
        return CalibratorSession(self)

    @isolated
    def read_sequence(self, input_ids: Tensor, masked: Tensor | None) -> GuideStates:
        readable = input_ids if masked is None else input_ids.masked_fill(masked, -1)
        return GuideStates(self, self.states(input_ids, masked)[:, 1:], self.spelled(readable.tolist()))

    def always_candidates(self, vocab_size: int) -> Tensor | None:
        """See `Guide.always_candidates`: the tokens that are a word with a bias below 0."""
        if vocab_size not in self._always_candidates:
            ids = self._words.token_ids
            ids = ids[: np.searchsorted(ids, vocab_size)]
            self._always_candidates[vocab_size] = torch.from_numpy(ids).to(self.device) if len(ids) else None
        return self._always_candidates[vocab_size]

    @cached_property
    def protected(self) -> Tensor | None:
        """See `Guide.protected`: the tokens that are a protected name, or a beginning of one, behind a space."""
        names = self._words.whole()
        chosen = torch.zeros(self.target_vocab_size, dtype=torch.bool, device="cpu")
        chosen[torch.from_numpy(names.token_ids[names.shifts > 0.0])] = True
        return chosen.to(self.device) if bool(chosen.any()) else None

    def say(self, hidden: Tensor, last_ids: Sequence[Sequence[int]]) -> GuideStates:
        """What is said after some texts: body states [rows, width], and the last REACH ids of each text."""
        found = ((row, 0, self._words.after(ids)) for row, ids in enumerate(last_ids)) if len(self._words) else ()
        return GuideStates(self, hidden, Spelled.of(found))

    def leading_specials(self, ids: Sequence[int]) -> int:
        """How many ids at the beginning of a text are special or unknown."""
        special, size = self.vocabulary.is_special, len(self.vocabulary)
        return next((at for at, each in enumerate(ids) if 0 <= each < size and not special[each]), len(ids))

    def spelled(self, rows: Sequence[Sequence[int]]) -> Spelled | None:
        """What would complete a word after each token of some rows; places are (row, position). None: nothing."""
        if not len(self._words):
            return None
        return Spelled.of(
            (row, place, self._words.after(ids[max(0, place + 1 - REACH) : place + 1]))
            for row, ids in enumerate(rows)
            for place in range(len(ids))
        )

    @isolated
    def states(self, input_ids: Tensor, masked: Tensor | None = None) -> Tensor:
        """Body states of whole rows, [rows, length + 1, width]; slot 0 is the boundary before each text."""
        ids = functional.pad(input_ids if masked is None else input_ids.masked_fill(masked, -1), (1, 0), value=-1)
        starts = self._is_boundary(ids[:, 1:]).long().cumprod(dim=1).sum(dim=1)
        states: Tensor = self.calibrator.body(self.inputs(ids), starts)
        return states

    def inputs(self, ids: Tensor) -> Tensor:
        """Input vectors of the body, [..., width]; ids outside the vocabulary are boundaries, as special tokens are."""
        vectors = functional.embedding(ids.clamp(0, self.target_vocab_size - 1), self.vectors)
        return self.calibrator.embed(vectors.to(self.calibrator.boundary.dtype), self._is_boundary(ids))

    def _is_boundary(self, ids: Tensor) -> Tensor:
        size = self.target_vocab_size
        return self._is_special[torch.where(ids < 0, size, ids.clamp(max=size))]


class GuideStates(NextTokenScores):
    """`NextTokenScores` of a bound calibrator: body states [..., width], and what would complete a word after them."""

    def __init__(self, bound: BoundCalibrator, hidden: Tensor, spelled: Spelled | None = None) -> None:
        self.bound = bound
        self.hidden = hidden
        self._spelled = spelled
        self._queries: dict[str, Tensor] = {}

    def positions(self, start: int, stop: int) -> GuideStates:
        spelled = self._spelled.part(start, stop) if self._spelled is not None else None
        return GuideStates(self.bound, self.hidden[:, start:stop], spelled)

    @isolated
    def log_scores(self, head: str, token_ids: Tensor | None = None) -> Tensor:
        bound, query = self.bound, self._query(head)
        biases = bound._biases[:, bound.heads.index(head)]
        if token_ids is None:
            scores = self._of_all(query).float() + biases
        else:
            known = token_ids.clamp(0, bound.target_vocab_size - 1)
            picked = functional.embedding(known, bound.vectors).to(query.dtype)  # several times as fast as indexing
            scores = (picked * query[..., None, :]).sum(dim=-1).float() + biases[known]
        if self._spelled is not None and head == CALIBRATOR_HEAD:
            self._spelled.add_to(scores, token_ids, bound.target_vocab_size)
        return functional.logsigmoid(scores) if head == VALUE_HEAD else scores

    @isolated
    def log_scores_at(self, heads: Sequence[str], places: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        bound = self.bound
        queries = torch.stack([self._query(head).flatten(0, -2) for head in heads], dim=1)  # (rows, heads, width)
        known = token_ids.clamp(0, bound.target_vocab_size - 1)
        biases = bound._biases.index_select(0, known)[:, [bound.heads.index(head) for head in heads]].T
        if _DENSE * len(known) > len(queries) * len(bound.vectors):
            products = torch.stack([self._of_all(each)[places, known] for each in queries.unbind(dim=1)])
        else:
            bounds = torch.searchsorted(places, torch.arange(1, len(queries), device=places.device))
            own_ids = known.tensor_split(bounds.cpu())
            # Row by row: a few hundred vectors stay in the processor's cache between being fetched and multiplied.
            rows = (
                query @ functional.embedding(ids, bound.vectors).to(query.dtype).T
                for query, ids in zip(queries, own_ids, strict=True)
            )
            products = torch.cat(list(rows), dim=1)
        scores = dict(zip(heads, (products.float() + biases).unbind(), strict=True))
        if self._spelled is not None and CALIBRATOR_HEAD in scores:
            width = self.hidden.shape[1] if self.hidden.ndim == 3 else 1
            self._spelled.add_at(scores[CALIBRATOR_HEAD], places, token_ids, width)
        if VALUE_HEAD in scores:
            scores[VALUE_HEAD] = functional.logsigmoid(scores[VALUE_HEAD])
        return scores

    def _query(self, head: str) -> Tensor:
        self.bound.check_head(head)
        if head not in self._queries:
            self._queries[head] = self.bound.calibrator.heads[head](self.hidden)
        return self._queries[head]

    def _of_all(self, query: Tensor) -> Tensor:
        # Products in the query's precision: rounded to bfloat16, a score of 10 would be off by 0.03 nats.
        vectors = self.bound.vectors
        size = len(vectors) if vectors.dtype == query.dtype else _SCORE_CHUNK
        blocks = [query @ block.to(query.dtype).T for block in torch.split(vectors, size)]
        return torch.cat(blocks, dim=-1)
