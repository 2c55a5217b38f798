"""BoundCalibrator: a universal calibrator compiled for one target vocabulary.

Binding composes the vector of every token of the vocabulary once. From then on the calibrator reads the target's own
token ids in lock-step and scores the target's own ids: no text, no re-tokenisation.

Special tokens (begin, end, padding, chat marks) have no bytes. As input each is the document boundary; the leading run
of them is masked but for the last, so left padding and repeated begin marks change nothing. As output they are not
covered: fusion never moves them, and `log_probs` gives all of them together the probability `SPECIAL_MASS`.

Ids with equal bytes share the probability of these bytes, alike, or nearly all of it to the ones that the tokenizer
really uses (`Vocabulary.log_shares`). The differences that `contrast` adds are the same for all of them either way.

Words with a bias move the calibrator head's score of the tokens that complete them, in however many pieces they are
spelled (word_bias.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from calibfuse.calibrator.body import KeyValueBuffer
from calibfuse.calibrator.bound_files import bound_path, cache_folder, load_bound, save_bound, vocabulary_of
from calibfuse.calibrator.composer import token_features
from calibfuse.calibrator.model import FORMAT_VERSION, CalibratorNetwork
from calibfuse.calibrator.word_bias import REACH, Spelled, WordBias
from calibfuse.errors import InputError
from calibfuse.guide import CALIBRATOR_HEAD, SPECIAL_MASS, VALUE_HEAD, Guide
from calibfuse.isolation import isolated
from calibfuse.prefix_cache import match_prefixes
from calibfuse.vocabulary import TokenizerLike, Vocabulary

__all__ = ["SPECIAL_MASS", "BoundCalibrator", "GuideStates", "LockStepSession", "bind", "cache_folder"]

_COMPOSE_CHUNK = 8192
_SCORE_CHUNK = 16_384  # vectors of lower precision that are widened at once
_WINDOWS_AT_ONCE = 4  # slots fed at once, in windows: the attention mask of a long text as a whole would not fit


def bind(
    calibrator: CalibratorNetwork,
    tokenizer: TokenizerLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    use_disk_cache: bool = True,
) -> BoundCalibrator:
    """Compile `calibrator` for one vocabulary; see `Calibrator.bind`."""
    dtype = dtype or torch.float32
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"Bound vectors can be float32, bfloat16 or float16, got dtype={dtype}.")
    vocabulary = vocabulary_of(tokenizer, use_disk_cache=use_disk_cache)
    config = calibrator.config
    path, tensors = None, None
    if use_disk_cache:
        path = bound_path(calibrator.fingerprint, vocabulary, dtype, FORMAT_VERSION)
        tensors = load_bound(path, size=len(vocabulary), token_width=config.token_width, head_count=len(config.heads))
    words = WordBias(config.words, vocabulary)
    vectors, biases = tensors or compose_vocabulary(calibrator, vocabulary, dtype, words)
    if path is not None and tensors is None:
        save_bound(path, vectors, biases)
    return BoundCalibrator(calibrator, vocabulary, vectors, biases, words).to(
        torch.device(device) if device is not None else calibrator.boundary.device
    )


@isolated
def compose_vocabulary(
    calibrator: CalibratorNetwork, vocabulary: Vocabulary, dtype: torch.dtype, words: WordBias | None = None
) -> tuple[Tensor, Tensor]:
    """Vectors [target_vocab_size, token_width] in `dtype`, biases [target_vocab_size, heads] in float32, on the CPU.

    `words` are the calibrator's in this vocabulary, where the caller has them.
    """
    size = len(vocabulary)
    config = calibrator.config
    vectors = torch.empty(size, config.token_width, dtype=dtype, device="cpu")
    biases = torch.empty(size, len(config.heads), dtype=torch.float32, device="cpu")
    for start in range(0, size, _COMPOSE_CHUNK):  # in chunks: the features of 200,000 tokens would take 60 MB
        end = min(start + _COMPOSE_CHUNK, size)
        offsets = vocabulary.offsets[start : end + 1]
        features = token_features(vocabulary.data[offsets[0] : offsets[-1]], offsets - offsets[0], config.bucket_count)
        chunk_vectors, chunk_biases = calibrator.compose(features)
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
    """A guide: the calibrator over one target vocabulary. Made by `Calibrator.bind`.

    Args:
        calibrator: the model; its body and heads are shared, not copied.
        vocabulary: of the target.
        vectors: [target_vocab_size, token_width].
        biases: float32 [target_vocab_size, heads].
        words: the calibrator's words in this vocabulary; None: made here.
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
        self._vectors = vectors
        self._biases = biases
        # One entry more than ids: whatever lies beyond the vocabulary (a padded head) counts as special.
        self._is_special = torch.ones(len(vocabulary) + 1, dtype=torch.bool, device="cpu")
        self._is_special[:-1] = torch.from_numpy(vocabulary.is_special.copy())
        self._words = WordBias(calibrator.config.words, vocabulary) if words is None else words
        self._always_candidates: dict[int, Tensor | None] = {}

    def to(self, device: torch.device | str) -> BoundCalibrator:
        """The same object where it is there already, else a copy on the device, with its own copy of the model."""
        device = torch.device(device)
        if device == self.device and device == self.calibrator.boundary.device:
            return self
        moved = BoundCalibrator(
            copy.deepcopy(self.calibrator).to(device),
            self.vocabulary,
            self._vectors.to(device),
            self._biases.to(device),
            self._words,
        )
        moved._is_special = self._is_special.to(device)
        return moved

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads."""
        return self.calibrator.config.heads

    @property
    def device(self) -> torch.device:
        """Where the bound vectors are."""
        return self._vectors.device

    @property
    def recommended(self) -> Mapping[str, Any]:
        """See `Guide.recommended`."""
        return self.calibrator.config.fusion

    @property
    def memory_bytes(self) -> int:
        """Bytes of the bound vectors and biases."""
        return self._vectors.nbytes + self._biases.nbytes

    def covers(self, token_ids: Tensor) -> Tensor:
        """Bool, same shape: True where the token has bytes."""
        return ~self._is_special[token_ids.clamp(0, self.target_vocab_size)]

    def session(self) -> LockStepSession:
        """A new session."""
        return LockStepSession(self)

    @isolated
    def read_sequence(self, input_ids: Tensor, masked: Tensor | None) -> GuideStates:
        """See `Guide.read_sequence`."""
        states, _ = self._advance(input_ids, None, None, masked)
        readable = input_ids if masked is None else input_ids.masked_fill(masked, -1)
        return GuideStates(self, states[:, 1:], self.spelled(readable.tolist()))

    def always_candidates(self, vocab_size: int) -> Tensor | None:
        """Ids below `vocab_size` of the tokens that are a word with a bias below 0; see `Guide.always_candidates`."""
        if vocab_size not in self._always_candidates:
            ids = self._words.token_ids
            ids = ids[: np.searchsorted(ids, vocab_size)]
            self._always_candidates[vocab_size] = torch.from_numpy(ids).to(self.device) if len(ids) else None
        return self._always_candidates[vocab_size]

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
    def _advance(
        self,
        new_ids: Tensor,
        starts: Tensor | None,
        buffer: KeyValueBuffer | None,
        masked: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Feed ids. Where `buffer` has no slots yet, the rows begin here, with their boundary in slot 0.

        Args:
            new_ids: int64 [rows, new].
            starts: int64 [rows], boundary slots, of rows that began earlier; None: see `Body.forward`.
            buffer: extended in place; None: rows begin here, and are not kept.
            masked: bool [rows, new], True for left padding; only for rows that begin here.

        Returns:
            States of the new slots, [rows, new (+ 1), width], and the boundary slots.
        """
        known = new_ids.clamp(0, self.target_vocab_size)
        is_boundary = self._is_special[known]
        if masked is not None:
            is_boundary = is_boundary | masked
        vectors = functional.embedding(known.clamp(max=self.target_vocab_size - 1), self._vectors)
        vectors = vectors.to(self.calibrator.boundary.dtype)
        if buffer is None or buffer.slots == 0:
            rows = new_ids.shape[0]
            vectors = torch.cat([vectors.new_zeros(rows, 1, vectors.shape[-1]), vectors], dim=1)
            starts = _leading(is_boundary)
            is_boundary = torch.cat([is_boundary.new_ones(rows, 1), is_boundary], dim=1)
        inputs = self.calibrator.embed(vectors, is_boundary)
        config = self.calibrator.config
        at_once = _WINDOWS_AT_ONCE * config.window
        if inputs.shape[1] <= at_once:
            return self.calibrator(inputs, starts, buffer), starts
        if buffer is None:
            buffer = KeyValueBuffer(config.layer_count, config.window)
        parts = [self.calibrator(part, starts, buffer) for part in torch.split(inputs, at_once, dim=1)]
        return torch.cat(parts, dim=1), starts


class GuideStates:
    """`NextTokenScores` of a bound calibrator.

    Args:
        bound: the calibrator.
        hidden: [..., width], body states.
        spelled: what would complete a word with a bias, with the same rows (and positions); None: nothing.
    """

    def __init__(self, bound: BoundCalibrator, hidden: Tensor, spelled: Spelled | None = None) -> None:
        self.bound = bound
        self.hidden = hidden
        self._spelled = spelled
        self._queries: dict[str, Tensor] = {}
        self._picked: tuple[Tensor, Tensor, Tensor] | None = None

    def positions(self, start: int, stop: int) -> GuideStates:
        """See `NextTokenScores.positions`."""
        spelled = self._spelled.part(start, stop) if self._spelled is not None else None
        return GuideStates(self.bound, self.hidden[:, start:stop], spelled)

    @isolated
    def log_scores(self, head: str, token_ids: Tensor | None = None) -> Tensor:
        """See `NextTokenScores.log_scores`.

        Raises:
            MissingHeadError: the calibrator has no such head.
        """
        bound = self.bound
        bound.check_head(head)
        if head not in self._queries:
            self._queries[head] = bound.calibrator.heads[head](self.hidden)
        query = self._queries[head]
        column = bound.heads.index(head)
        vectors, biases = bound._vectors, bound._biases[:, column]
        if token_ids is None:
            # Products in the query's precision: rounded to bfloat16, a score of 10 would be off by 0.03 nats.
            blocks = [query @ block.to(query.dtype).T for block in torch.split(vectors, _blocks(vectors, query))]
            scores = torch.cat(blocks, dim=-1).float() + biases
        else:
            known, picked = self._pick(token_ids)
            scores = (picked * query[..., None, :]).sum(dim=-1).float() + biases[known]
        if self._spelled is not None and head == CALIBRATOR_HEAD:
            self._spelled.add_to(scores, token_ids, bound.target_vocab_size)
        return functional.logsigmoid(scores) if head == VALUE_HEAD else scores

    def _pick(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Clamped ids and their vectors [..., k, token_width]; kept, since the second head asks for the same ones."""
        if self._picked is None or self._picked[0] is not token_ids:
            known = token_ids.clamp(0, self.bound.target_vocab_size - 1)
            # `embedding` gathers rows several times as fast as indexing does.
            picked = functional.embedding(known, self.bound._vectors).to(self.hidden.dtype)
            self._picked = (token_ids, known, picked)
        return self._picked[1:]


def _leading(is_boundary: Tensor) -> Tensor:
    """Length of the leading run of True: bool [rows, length] -> int64 [rows]."""
    return is_boundary.long().cumprod(dim=1).sum(dim=1)


def _blocks(vectors: Tensor, query: Tensor) -> int:
    return len(vectors) if vectors.dtype == query.dtype else _SCORE_CHUNK


class LockStepSession:
    """`GuideSession` of a bound calibrator: it reads the target's ids with its own key/value cache."""

    def __init__(self, bound: BoundCalibrator) -> None:
        self._bound = bound
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._ids: Tensor | None = None
        self._buffer = KeyValueBuffer(self._bound.calibrator.config.layer_count, self._bound.calibrator.config.window)
        self._starts: Tensor | None = None
        # The slot by which every row's text has begun; None: not known, or some row is special so far.
        self._last_start: int | None = None
        self._last: GuideStates | None = None

    @isolated
    def step(self, input_ids: Tensor, readings: Tensor) -> tuple[GuideStates, list[float]]:
        """See `GuideSession.step`."""
        bound = self._bound
        tail = input_ids[:, -REACH:] if len(bound._words) else input_ids[:, :0]
        readings = torch.cat([readings.float(), tail.reshape(-1).float()])  # exact: ids are below 2 ** 24
        if self._ids is None or self._starts is None or self._last is None:
            values, spelled = self._read_tail(readings.tolist(), tail)
            return self._rebuild(input_ids, spelled), values
        cached_length = self._ids.shape[1]
        unknown = self._last_start is None
        if unknown:
            readings = torch.cat([self._starts.amax()[None].float(), readings])
        reuse, values = match_prefixes(self._ids, input_ids, readings)
        last_start = int(values.pop(0)) if unknown else 0
        values, spelled = self._read_tail(values, tail)
        if unknown and last_start < cached_length:
            self._last_start = last_start
        if reuse.unchanged:
            return self._last, values
        kept_slots = reuse.keep + 1
        if input_ids.shape[1] == 0 or not self._buffer.can_cut_to(kept_slots):
            return self._rebuild(input_ids, spelled), values
        self._buffer.cut(kept_slots, reuse.parents)
        starts = self._starts if reuse.parents is None else self._starts[reuse.parents]
        new_ids = input_ids[:, reuse.keep :]
        if self._last_start is None or reuse.keep <= self._last_start:
            # Where all kept tokens are special, the boundary may lie further on.
            self._last_start = None
            starts = torch.where(starts < reuse.keep, starts, reuse.keep + _leading(~bound.covers(new_ids)))
        hiding: Tensor | None = starts
        if self._last_start is not None and new_ids.shape[1] == 1 and self._last_start <= self._buffer.oldest_visible:
            hiding = None
        hidden, _ = bound._advance(new_ids, hiding, self._buffer, None)
        return self._remember(input_ids, starts, hidden, spelled), values

    def _read_tail(self, values: list[float], tail: Tensor) -> tuple[list[float], Spelled | None]:
        """Split what was read off the device into the caller's readings and what the last tokens would complete."""
        rows, width = tail.shape
        words = self._bound._words
        if not len(words):
            return values, None
        split = len(values) - rows * width
        last = [int(value) for value in values[split:]]
        completions = (words.after(last[row * width : (row + 1) * width]) for row in range(rows))
        return values[:split], Spelled.of((row, 0, each) for row, each in enumerate(completions))

    def _rebuild(self, input_ids: Tensor, spelled: Spelled | None) -> GuideStates:
        self.reset()
        hidden, starts = self._bound._advance(input_ids, None, self._buffer, None)
        return self._remember(input_ids, starts, hidden, spelled)

    def _remember(
        self, input_ids: Tensor, starts: Tensor | None, hidden: Tensor, spelled: Spelled | None
    ) -> GuideStates:
        self._ids, self._starts = input_ids.clone(), starts  # the caller may write into its ids later
        self._last = GuideStates(self._bound, hidden[:, -1], spelled)
        return self._last
