"""The bundled toxicity scorer: logistic regression on hashed n-grams, read with numpy alone.

Every word has a value (its own weight, its character n-grams', and its pair's with the word before), the values of a
window of words add up to its logit, and a text is as toxic as its worst window (multiple-instance learning). Feature
hashing: Weinberger et al. 2009; probabilities: Platt 1999. Left out: meaning; it misses hate without hateful words.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibfuse.errors import CheckpointError, InputError
from calibfuse.hub import WEIGHTS_NAME, read_config, read_tensors, write_checkpoint
from calibfuse.scorers.checks import check_scores, check_texts
from calibfuse.scorers.features import FeatureConfig, NgramHasher, WordStream, fold_characters, split_words

FORMAT = "calibfuse-linear-scorer"
FORMAT_VERSION = 1
_BATCH_CHARACTERS = 1 << 18  # text handled at once; keeps the temporary arrays inside the processor's caches


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
        n = len(text_index)
        edges = np.flatnonzero(np.diff(text_index)) + 1
        first = np.concatenate([[0], edges]) if n else np.zeros(0, dtype=np.int64)
        last = np.concatenate([edges, [n]]) if n else np.zeros(0, dtype=np.int64)
        stop_of_text = np.repeat(last, last - first)
        words = np.arange(n)
        starts, stops = [], []
        for size in sizes:
            is_start = words + size <= stop_of_text
            if size == sizes[-1]:
                is_start[first] = True
            starts.append(words[is_start])
            stops.append(np.minimum(words + size, stop_of_text)[is_start])
        all_starts, all_stops = np.concatenate(starts), np.concatenate(stops)
        if len(sizes) > 1:
            order = np.argsort(all_starts, kind="stable")
            all_starts, all_stops = all_starts[order], all_stops[order]
        text_of_window = text_index[all_starts]
        return cls(all_starts, all_stops, text_of_window, np.flatnonzero(np.diff(text_of_window, prepend=-1)))

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(windows,): the sum of each window's words' values, (words,)."""
        total = np.concatenate([[0.0], np.cumsum(values)])
        sums: NDArray[np.float64] = total[self.stops] - total[self.starts]
        return sums


class LinearScorer:
    """Logistic regression on hashed word and character n-grams, over sliding windows of words.

    The probability is sigmoid(slope * logit + intercept), the logit `bias` plus the largest sum over a window.
    `weights` are [2**features.bucket_bits], `windows` ascending sizes in words; `training` holds facts for the
    checkpoint. InputError: sizes that do not fit, or numbers that are not finite.
    """

    def __init__(
        self,
        weights: NDArray[Any],
        features: FeatureConfig,
        *,
        bias: float = 0.0,
        windows: Sequence[int] = (3, 16),
        slope: float = 1.0,
        intercept: float = 0.0,
        name: str = "linear",
        training: dict[str, Any] | None = None,
    ) -> None:
        expected = (1 << features.bucket_bits,)
        if weights.shape != expected:
            raise InputError(
                f"Scorer weights have shape {weights.shape}; {features.bucket_bits} bucket bits need {expected}"
            )
        if not np.isfinite(weights).all() or not np.isfinite([bias, slope, intercept]).all():
            raise InputError("Scorer weights, bias, slope and intercept must be finite")
        check_window_sizes(windows)
        if slope <= 0:
            raise InputError(f"A scorer needs slope > 0, got {slope}")
        self.features = features
        self.bias = float(bias)
        self.windows = tuple(windows)
        self.slope = float(slope)
        self.intercept = float(intercept)
        self.name = name
        self.training = dict(training or {})
        self.hasher = NgramHasher(features)
        self._weights = np.ascontiguousarray(weights, dtype=np.float32)

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Score texts, see `ToxicityScorer.score`; one without words gets the score of "nothing said"."""
        return check_scores(self._probability(self.logits(texts)), len(texts), self.name)

    def logits(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(len(texts),) float64: the logit of each text's worst window, before Platt's calibration."""
        check_texts(texts, self.name)
        logits = np.empty(len(texts), dtype=np.float64)
        for start, stop in _batches(texts):
            logits[start:stop] = self._logits(texts[start:stop])
        return logits

    def word_scores(self, text: str) -> list[WordScore]:
        """Score each word of a text as if it stood alone; a disguised word ("f u c k") is one entry."""
        check_texts([text], self.name)
        stream = split_words([text], unmask=self.features.unmask)
        if not len(stream):
            return []
        alone, _ = self._word_values(stream)
        scores = self._probability(alone + self.bias)
        starts, ends = _word_positions(text, stream)
        return [WordScore(int(s), int(e), float(p)) for s, e, p in zip(starts, ends, scores, strict=True)]

    def worst_part(self, text: str) -> str:
        """The window of words with the highest logit, as it stands in the text; "" without words."""
        check_texts([text], self.name)
        stream = split_words([text], unmask=self.features.unmask)
        if not len(stream):
            return ""
        windows = Windows.of(stream.text_index, self.windows)
        worst = int(np.argmax(windows.sums(np.add(*self._word_values(stream)))))
        starts, ends = _word_positions(text, stream)
        return text[starts[windows.starts[worst]] : ends[windows.stops[worst] - 1]]

    def _probability(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        return 0.5 * (1.0 + np.tanh(0.5 * (self.slope * logits + self.intercept)))

    def _word_values(self, stream: WordStream) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[words] float64 twice: each word's value alone, and its pair's with the word before."""
        alone = self._weights[self.hasher.word_buckets(stream)].astype(np.float64)
        at_byte = np.zeros(len(stream.data), dtype=np.float32)
        for buckets, exists in self.hasher.char_buckets(stream):
            at_byte += np.where(exists, self._weights[buckets], np.float32(0.0))
        chars = np.add.reduceat(at_byte, stream.starts - 1, dtype=np.float64)
        alone += chars / np.sqrt(np.maximum(self.hasher.ngram_counts(stream), 1))
        pairs = np.zeros(len(stream), dtype=np.float64)
        if self.features.word_bigrams:
            buckets, exists = self.hasher.bigram_buckets(stream)
            pairs[exists] = self._weights[buckets[exists]]
        return alone, pairs

    def _logits(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[texts] float64: the logit of each text's worst window."""
        stream = split_words(texts, unmask=self.features.unmask)
        logits = np.full(len(texts), self.bias, dtype=np.float64)
        if not len(stream):
            return logits
        alone, pairs = self._word_values(stream)
        windows = Windows.of(stream.text_index, self.windows)
        sums = windows.sums(alone + pairs)
        logits[windows.text_index[windows.firsts]] += np.maximum.reduceat(sums, windows.firsts)
        return logits

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into a folder; a scorer already there is replaced."""
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "features": self.features.to_dict(),
            "windows": list(self.windows),
            "bias": self.bias,
            "slope": self.slope,
            "intercept": self.intercept,
            "training": self.training,
        }
        write_checkpoint(folder, config=config, tensors={"weights": torch.from_numpy(self._weights.astype(np.float16))})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LinearScorer:
        """Read a scorer that `save` wrote.

        Raises:
            CheckpointError: a file is missing or damaged, or is no scorer of ours.
            CheckpointFormatError: written in a newer format.
        """
        config = read_config(folder, format_name=FORMAT, supported_version=FORMAT_VERSION)
        try:
            features = FeatureConfig.from_dict(config["features"])
            shape = (1 << features.bucket_bits,)
            tensors = read_tensors(Path(folder) / WEIGHTS_NAME, expected={"weights": shape})
            return cls(
                tensors["weights"].numpy(),
                features,
                bias=float(config["bias"]),
                windows=tuple(config["windows"]),
                slope=float(config["slope"]),
                intercept=float(config["intercept"]),
                name=str(config["name"]),
                training=config["training"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"The scorer in {os.fspath(folder)!r} is incomplete or inconsistent: {error!r}"
            ) from error


def check_window_sizes(sizes: Sequence[int]) -> None:
    """Refuse (InputError) sizes that are not ascending whole numbers from 1 on."""
    fine = bool(sizes) and all(isinstance(size, int) and size >= 1 for size in sizes)
    if not fine or any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise InputError(f"Window sizes must be ascending whole numbers from 1 on, got {list(sizes)}")


def _batches(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Cut texts into runs of about `_BATCH_CHARACTERS`, as (start, stop)."""
    bounds = []
    start = size = 0
    for i, text in enumerate(texts):
        size += len(text) + 1
        if size >= _BATCH_CHARACTERS:
            bounds.append((start, i + 1))
            start, size = i + 1, 0
    if start < len(texts):
        bounds.append((start, len(texts)))
    return bounds


def _word_positions(text: str, stream: WordStream) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where words begin and end (one past), in characters of the text that `stream` was made of."""
    first_bytes = stream.origin[stream.starts]
    last_bytes = stream.origin[stream.starts + stream.lengths - 1]
    if text.isascii():
        return first_bytes, last_bytes + 1
    raw = np.frombuffer(fold_characters(text).encode(), dtype=np.uint8)  # as many characters as the text
    character = np.cumsum((raw & 0xC0) != 0x80) - 1  # bytes 10xxxxxx continue a character
    return character[first_bytes], character[last_bytes] + 1
