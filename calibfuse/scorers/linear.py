"""The bundled toxicity scorer: logistic regression on hashed n-grams, read with numpy alone.

Every word has a value (its own weight, its character n-grams', and its pair's with the word before), the values of a
window of words add up to its logit, and a text is as toxic as its worst window (multiple-instance learning). Sources:
Weinberger et al. 2009 (feature hashing), Bojanowski et al. 2017 (n-grams inside words), Platt 1999 (probabilities).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibfuse.errors import CheckpointError, InputError
from calibfuse.hub import WEIGHTS_NAME, read_config, read_tensors, write_checkpoint
from calibfuse.scorers.checks import check_texts
from calibfuse.scorers.plain_words import WordStream, fold_characters, split_words

FORMAT = "calibfuse-linear-scorer"
FORMAT_VERSION = 1
_BATCH_CHARACTERS = 1 << 18  # text handled at once; keeps the temporary arrays inside the processor's caches
_SPACE = 32
_PRIME = 0x01000193
_LONGEST_HASHED = 64  # bytes of a word that get their own power of the hash's base; later ones share the last
_WORD, _PAIR, _CHARACTERS = range(3)  # kinds of features


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Which n-grams are counted, and into how many buckets they are hashed."""

    bucket_bits: int = 20  # the table has 2**bucket_bits weights
    char_min: int = 2  # shortest character n-gram, in bytes of the plain form, the word's edges included as spaces
    char_max: int = 5  # longest one
    word_bigrams: bool = True  # pairs of neighbouring words
    unmask: bool = True  # read "f**k" as the word that it stands for; False in scorers made before this was known
    seed: int = 0  # moves every feature to another bucket

    def __post_init__(self) -> None:
        if not 8 <= self.bucket_bits <= 24:
            raise InputError(f"bucket_bits must lie in 8..24, got {self.bucket_bits}")
        if not 1 <= self.char_min <= self.char_max <= 8:
            raise InputError(
                f"character n-grams need 1 <= char_min <= char_max <= 8, got {self.char_min}..{self.char_max}"
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed of the hash must lie in 0..2**32-1, got {self.seed}")


class NgramHasher:
    """Turns words, their pairs and their character n-grams into bucket numbers, as `FeatureConfig` says."""

    def __init__(self, config: FeatureConfig) -> None:
        self.config = config
        self._powers = np.cumprod([1] + [_PRIME] * (_LONGEST_HASHED - 1), dtype=np.uint32)

    def _bucket(self, state: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Mix hash states so that their upper bits depend on all bits, and keep `bucket_bits` of them."""
        mixed: NDArray[np.uint32] = state ^ (state >> np.uint32(15))
        mixed *= np.uint32(0x85EBCA6B)
        mixed ^= mixed >> np.uint32(13)
        mixed *= np.uint32(0xC2B2AE35)
        mixed >>= np.uint32(32 - self.config.bucket_bits)
        return mixed

    def _start(self, kind: int) -> np.uint32:
        """The first state of one kind of feature, so that kinds do not share buckets by rule."""
        start: np.uint32 = np.uint32(((self.config.seed + 1) * 0x9E3779B1 + kind * 0x7FEB352D) & 0xFFFFFFFF)
        return start

    def word_states(self, stream: WordStream) -> NDArray[np.uint32]:
        """[words] uint32: one hash per word, before mixing."""
        if not len(stream.starts):
            return np.zeros(0, dtype=np.uint32)
        is_space = stream.data == _SPACE
        first = np.zeros(len(stream.data), dtype=np.int64)
        first[stream.starts] = stream.starts
        # how far each byte lies behind its word's first one
        places = np.maximum(np.arange(len(stream.data)) - np.maximum.accumulate(first), 0)
        values = stream.data * self._powers[np.minimum(places, _LONGEST_HASHED - 1)]
        values[is_space] = 0
        states: NDArray[np.uint32] = np.add.reduceat(values, stream.starts, dtype=np.uint32)
        return states

    def word_buckets(self, stream: WordStream) -> NDArray[np.uint32]:
        """[words] uint32: the bucket of each word as a whole."""
        return self._bucket(self.word_states(stream) ^ self._start(_WORD))

    def bigram_buckets(self, stream: WordStream) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """[words] uint32, the bucket of each word with the one before it, and [words] bool: there is one."""
        states = self.word_states(stream)
        pair = states.copy()
        pair[1:] += states[:-1] * np.uint32(0x27D4EB2F)
        return self._bucket(pair ^ self._start(_PAIR)), np.diff(stream.text_index, prepend=-1) == 0

    def char_buckets(self, stream: WordStream) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.bool_]]]:
        """All character n-grams that lie within a word and its two edges; those from an edge on belong to its word.

        For each n: buckets uint32 [bytes] of the n-gram beginning at each byte, and bool [bytes], whether one begins.
        """
        # zeros behind the text, so that n-grams may look beyond its end; those do not exist
        values = np.append(stream.data, np.zeros(self.config.char_max, dtype=np.uint8)).astype(np.uint32)
        size = len(stream.data)
        state = np.full(size, self._start(_CHARACTERS), dtype=np.uint32)
        inside = np.ones(size, dtype=np.bool_)  # no space in the n-gram so far after its first byte but at its end
        for n in range(1, self.config.char_max + 1):
            here = values[n - 1 : n - 1 + size]
            state = (state ^ here) * np.uint32(_PRIME)
            exists = inside & (here != _SPACE) if n == 1 else inside.copy()
            exists[max(0, size - n + 1) :] = False
            if n >= self.config.char_min:
                yield self._bucket(state + np.uint32(n)), exists
            if n > 1:
                inside &= here != _SPACE

    def ngram_counts(self, stream: WordStream) -> NDArray[np.int64]:
        """[words] int64: how many character n-grams each word has (edges included)."""
        sizes = range(self.config.char_min, self.config.char_max + 1)
        counts = [np.maximum(stream.lengths + 3 - n, 0) if n > 1 else stream.lengths for n in sizes]
        total: NDArray[np.int64] = np.sum(counts, axis=0, dtype=np.int64)
        return total


@dataclass(frozen=True)
class WordScore:
    """One word of a text and how toxic it is taken alone."""

    start: int  # first character
    end: int  # one past the last character
    score: float  # probability in [0, 1]


@dataclass(frozen=True, eq=False)
class Windows:
    """All windows of neighbouring words of a batch of texts, ordered by text."""

    starts: NDArray[np.int64]  # [windows] first word
    stops: NDArray[np.int64]  # [windows] one past the last word
    text_index: NDArray[np.int64]  # [windows] ascending
    firsts: NDArray[np.int64]  # [texts with words] each one's first window

    @classmethod
    def of(cls, text_index: NDArray[np.int64], sizes: Sequence[int]) -> Windows:
        """Lay windows over texts: of each size from every word on; a shorter text is one as a whole."""
        words = np.arange(len(text_index))
        first = np.flatnonzero(np.diff(text_index, prepend=-1))
        last = np.append(first[1:], len(words)) if len(first) else first
        stop_of_text = np.repeat(last, last - first)
        starts, stops = [], []
        for size in sizes:
            is_start = words + size <= stop_of_text
            if size == sizes[-1]:
                is_start[first] = True
            starts.append(words[is_start])
            stops.append(np.minimum(words + size, stop_of_text)[is_start])
        order = np.argsort(np.concatenate(starts), kind="stable")
        all_starts, all_stops = np.concatenate(starts)[order], np.concatenate(stops)[order]
        text_of_window = text_index[all_starts]
        return cls(all_starts, all_stops, text_of_window, np.flatnonzero(np.diff(text_of_window, prepend=-1)))

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(windows,): the sum of each window's words' values, (words,)."""
        total = np.concatenate([[0.0], np.cumsum(values)])
        sums: NDArray[np.float64] = total[self.stops] - total[self.starts]
        return sums


@dataclass(eq=False)
class LinearScorer:
    """Logistic regression on hashed word and character n-grams, over sliding windows of words.

    The probability is sigmoid(slope * logit + intercept), the logit `bias` plus the largest sum over a window.
    InputError: sizes that do not fit, or numbers that are not finite.
    """

    weights: NDArray[Any]  # [2**features.bucket_bits]
    features: FeatureConfig  # what they belong to
    _: KW_ONLY
    bias: float = 0.0
    windows: tuple[int, ...] = (3, 16)  # sizes in words, ascending
    slope: float = 1.0  # above 0
    intercept: float = 0.0
    name: str = "linear"  # in reports
    training: dict[str, Any] = field(default_factory=dict)  # facts for the checkpoint

    def __post_init__(self) -> None:
        bits, shape = self.features.bucket_bits, self.weights.shape
        if shape != (1 << bits,):
            raise InputError(f"Scorer weights have shape {shape}; {bits} bucket bits need {(1 << bits,)}")
        if not np.isfinite(self.weights).all() or not np.isfinite([self.bias, self.slope, self.intercept]).all():
            raise InputError("Scorer weights, bias, slope and intercept must be finite")
        check_window_sizes(self.windows)
        if self.slope <= 0:
            raise InputError(f"A scorer needs slope > 0, got {self.slope}")
        self.hasher = NgramHasher(self.features)
        self.weights = np.ascontiguousarray(self.weights, dtype=np.float32)

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Score texts, see `ToxicityScorer.score`; one without words gets the score of "nothing said"."""
        return self.probability(self.logits(texts))

    def logits(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(len(texts),) float64: the logit of each text's worst window, before Platt's calibration."""
        check_texts(texts, self.name)
        logits = np.full(len(texts), self.bias, dtype=np.float64)
        for start, stop in _batches(texts):
            stream = split_words(texts[start:stop], unmask=self.features.unmask)
            if len(stream.starts):
                windows = Windows.of(stream.text_index, self.windows)
                sums = windows.sums(np.add(*self._word_values(stream)))
                with_words = start + windows.text_index[windows.firsts]
                logits[with_words] += np.maximum.reduceat(sums, windows.firsts)
        return logits

    def word_scores(self, text: str) -> list[WordScore]:
        """Score each word of a text as if it stood alone; a disguised word ("f u c k") is one entry."""
        check_texts([text], self.name)
        stream = split_words([text], unmask=self.features.unmask)
        if not len(stream.starts):
            return []
        alone, _ = self._word_values(stream)
        scores = self.probability(alone + self.bias)
        starts, ends = _word_positions(text, stream)
        return [WordScore(int(s), int(e), float(p)) for s, e, p in zip(starts, ends, scores, strict=True)]

    def worst_part(self, text: str) -> str:
        """The window of words with the highest logit, as it stands in the text; "" without words."""
        stream = split_words([text], unmask=self.features.unmask)
        if not len(stream.starts):
            return ""
        windows = Windows.of(stream.text_index, self.windows)
        worst = int(np.argmax(windows.sums(np.add(*self._word_values(stream)))))
        starts, ends = _word_positions(text, stream)
        return text[starts[windows.starts[worst]] : ends[windows.stops[worst] - 1]]

    def probability(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of logits of texts, by Platt's calibration."""
        return 0.5 * (1.0 + np.tanh(0.5 * (self.slope * logits + self.intercept)))

    def _word_values(self, stream: WordStream) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[words] float64 twice: each word's value alone, and its pair's with the word before."""
        alone = self.weights[self.hasher.word_buckets(stream)].astype(np.float64)
        at_byte = np.zeros(len(stream.data), dtype=np.float32)
        for buckets, exists in self.hasher.char_buckets(stream):
            at_byte += np.where(exists, self.weights[buckets], np.float32(0.0))
        chars = np.add.reduceat(at_byte, stream.starts - 1, dtype=np.float64)
        alone += chars / np.sqrt(np.maximum(self.hasher.ngram_counts(stream), 1))
        pairs = np.zeros(len(stream.starts), dtype=np.float64)
        if self.features.word_bigrams:
            buckets, exists = self.hasher.bigram_buckets(stream)
            pairs[exists] = self.weights[buckets[exists]]
        return alone, pairs

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into a folder; a scorer already there is replaced."""
        names = ("name", "bias", "slope", "intercept", "training")
        config = {
            **{"format": FORMAT, "format_version": FORMAT_VERSION},
            **{name: getattr(self, name) for name in names},
            **{"features": asdict(self.features), "windows": list(self.windows)},
        }
        write_checkpoint(folder, config=config, tensors={"weights": torch.from_numpy(self.weights.astype(np.float16))})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LinearScorer:
        """Read a scorer that `save` wrote; CheckpointError where there is none, or a damaged one."""
        config = read_config(folder, format_name=FORMAT, supported_version=FORMAT_VERSION)
        try:
            features = FeatureConfig(**{"unmask": False, **config["features"]})  # an unknown one is a TypeError
            shape = (1 << features.bucket_bits,)
            tensors = read_tensors(Path(folder) / WEIGHTS_NAME, expected={"weights": shape})
            numbers: dict[str, Any] = {name: float(config[name]) for name in ("bias", "slope", "intercept")}
            others: dict[str, Any] = {
                "windows": tuple(config["windows"]),
                "training": config["training"],
                "name": str(config["name"]),
            }
            return cls(tensors["weights"].numpy(), features, **numbers, **others)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"The scorer in {os.fspath(folder)!r} is incomplete or inconsistent: {error!r}"
            ) from error


def check_window_sizes(sizes: Sequence[int]) -> None:
    """Refuse (InputError) sizes that are not ascending whole numbers from 1 on."""
    fine = bool(sizes) and all(isinstance(size, int) and size >= 1 for size in sizes)
    if not fine or any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise InputError(f"Window sizes must be ascending whole numbers from 1 on, got {list(sizes)}")


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    start = size = 0
    for stop, text in enumerate(texts, start=1):
        size += len(text) + 1
        if size >= _BATCH_CHARACTERS or stop == len(texts):
            yield start, stop
            start, size = stop, 0


def _word_positions(text: str, stream: WordStream) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where words begin and end (one past), in characters of the text that `stream` was made of."""
    first_bytes = stream.origin[stream.starts]
    last_bytes = stream.origin[stream.starts + stream.lengths - 1]
    if text.isascii():
        return first_bytes, last_bytes + 1
    raw = np.frombuffer(fold_characters(text).encode(), dtype=np.uint8)  # as many characters as the text
    character = np.cumsum((raw & 0xC0) != 0x80) - 1  # bytes 10xxxxxx continue a character
    return character[first_bytes], character[last_bytes] + 1
