"""Which texts repeat passages of other texts: data sets that should be disjoint often are not.

What it is for: the scorer that sorts training text and the scorer that judges the result must not have learned from
the same sentences. Every run of eight words is hashed; a text that shares one with the other set overlaps.
Left out: paraphrases.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calibfuse.scorers.features import FeatureConfig, NgramHasher, WordStream, split_words

__all__ = ["overlapping_texts"]

_RUN = 8  # words; shorter texts are looked for as a whole
_SHORTEST = 4  # words; anything shorter is common speech, not a copy


def overlapping_texts(texts: Sequence[str], others: Sequence[str]) -> NDArray[np.bool_]:
    """Say which texts share a passage with other texts.

    Args:
        texts: the texts in question.
        others: the texts they should not repeat.

    Returns:
        (len(texts),), bool: True where eight neighbouring words, or all words of a text of four to seven, occur in
        `others` in the same order, whatever their case and punctuation.

    Example:
        >>> overlapping_texts(["We met, by the river!", "something else"], ["Yesterday we met by the river."]).tolist()
        [True, False]
    """
    stream, other_stream = split_words(texts), split_words(others)
    result = np.zeros(len(texts), dtype=np.bool_)
    n_words = np.bincount(stream.text_index, minlength=len(texts))
    for length in range(_SHORTEST, _RUN + 1):
        wanted = n_words >= _RUN if length == _RUN else n_words == length
        if not wanted.any() or not len(other_stream):
            continue
        runs, exists = _run_hashes(stream, length)
        known, known_exists = _run_hashes(other_stream, length)
        chosen = exists & wanted[stream.text_index]
        hits = np.isin(runs[chosen], known[known_exists])
        result[stream.text_index[chosen][hits]] = True
    return result


def _run_hashes(stream: WordStream, length: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return [words] uint64, a hash of the run of `length` words from each word on, and where such a run exists."""
    words = NgramHasher(FeatureConfig()).word_states(stream).astype(np.uint64)
    mixed = np.zeros(len(words), dtype=np.uint64)
    for i in range(length):
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed[: len(words) - i] ^= words[i:]
        mixed ^= mixed >> np.uint64(29)
    exists = np.zeros(len(words), dtype=np.bool_)
    last = len(words) - length + 1
    if last > 0:
        exists[:last] = stream.text_index[:last] == stream.text_index[length - 1 :]
    return mixed, exists
