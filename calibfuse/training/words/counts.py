"""How much rarer each word is in the wanted text than in the reference's: what a calibrator minds word by word.

The shifts travel with the calibrator and are added wherever a word is completed (calibrator/word_bias.py). The words
come from the sorting of the text, not from a list. Names are not among them: those of groups of people because of the
identity balance (balance.py), others by their capitals: within a sentence nearly all occurrences of a name have one.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from calibfuse.training.data import PassageStore

logger = logging.getLogger(__name__)

LEAST_PASSAGES = 15
"""A word gets a bias only if so many passages that the calibrator does not read hold it, ..."""
LEAST_PLACES = 9
"""... in so many places of the text, ..."""
_PLACE = 8
"""(a place being so many passages in a row: one long document is a few of them)"""
LEAST_SHIFT = -1.5
"""... and if its shift is this or lower, nats: 15 times as frequent in flagged passages as in others, where a quarter
of the reference's text is flagged. What is rude in some contexts only ("sex", "kill") lies above it, insults below."""
LARGEST_SHIFT = -6.0
"""Lower ones are cut to this: what never occurs in some text still might."""
_SHORTEST = 3
_WORD = re.compile(r"[a-z]+")
LEAST_NAMED = 30
"""A name is looked at only if so many flagged passages hold it, ..."""
LEAST_EXCESS = 1.3
"""... if its flagged share is so many times that of all passages, ..."""
LEAST_CAPITALS = 0.8
"""... and if so large a share of its occurrences within sentences begins with a capital."""
_WITHIN_SENTENCE = re.compile(r"(?<=[a-z,;] )[A-Za-z]+")
_LONGEST_ACRONYM = 4  # longer words in capitals are shouting, not names


def words_of(text: str) -> set[str]:
    """The words of a text, in small letters."""
    return set(_WORD.findall(text.lower()))


class CapitalCounts:
    """How often each word begins with a capital within sentences."""

    def __init__(self) -> None:
        self._capital: Counter[str] = Counter()
        self._small: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Count a passage; a word counts once for each way it is written."""
        for word in set(_WITHIN_SENTENCE.findall(text)):
            if not word[0].isupper():
                self._small[word] += 1
            elif not word.isupper() or len(word) <= _LONGEST_ACRONYM:
                self._capital[word.lower()] += 1

    def is_name(self, word: str) -> bool:
        """Whether a lower-case word nearly always begins with a capital."""
        return self._capital[word] >= LEAST_CAPITALS * max(1, self._capital[word] + self._small[word])


def suspected_names(store: PassageStore) -> tuple[str, ...]:
    """Names in the training passages that are flagged more often than other words."""
    capitals = CapitalCounts()
    holders: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    passages = [0, 0]
    for index in store.train_indices.tolist():
        text, label = store.text(index), int(store.labels[index])
        passages[label] += 1
        holders[label].update(words_of(text))
        capitals.add(text)
    if not all(passages):
        return ()
    base = passages[0] / sum(passages)
    return tuple(
        sorted(
            word
            for word, flagged in holders[0].items()
            if len(word) >= _SHORTEST
            and flagged >= LEAST_NAMED
            and flagged > LEAST_EXCESS * base * (flagged + holders[1][word])
            and capitals.is_name(word)
        )
    )


def word_shifts(store: PassageStore, *, flagged_share: float, excluded: NDArray[np.bool_] | None) -> dict[str, float]:
    """Count the words of the training passages, without the excluded ones.

    Gives word of three or more letters a to z, or beginning of such words -> log p(word | calibrator's passages) -
    log p(word | reference's), nats, rounded to 0.01; only the words described above, the lowest first.
    """
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    passages = [0, 0]
    places: Counter[str] = Counter()
    latest: dict[str, int] = {}
    capitals = CapitalCounts()
    for index in store.train_indices.tolist():
        if excluded is not None and excluded[index]:
            continue
        label = int(store.labels[index])
        passages[label] += 1
        text = store.text(index)
        capitals.add(text)
        words = words_of(text)
        counts[label].update(words)
        if not label:
            place = index // _PLACE
            places.update(word for word in words if latest.get(word) != place)
            latest.update(dict.fromkeys(words, place))
    if not passages[0] or not passages[1]:
        return {}

    def shift(clean_count: float, flagged_count: float) -> float:
        clean = (clean_count + 0.5) / passages[1]
        return math.log(clean / ((1.0 - flagged_share) * clean + flagged_share * flagged_count / passages[0]))

    found: dict[str, float] = {}
    for word, flagged in counts[0].items():
        if flagged < LEAST_PASSAGES or places[word] < LEAST_PLACES or len(word) < _SHORTEST or capitals.is_name(word):
            continue
        value = shift(counts[1][word], flagged)
        if value <= LEAST_SHIFT:
            found[word] = value
    logger.info("%d words get a bias of their own", len(found))
    for beginning, (clean_count, flagged_count) in _beginnings(found, counts).items():
        value = shift(clean_count, flagged_count)
        if value <= LEAST_SHIFT:
            found[beginning] = value
    rounded = {word: round(max(value, LARGEST_SHIFT), 2) for word, value in found.items()}
    return dict(sorted(rounded.items(), key=lambda item: (item[1], item[0])))


def _beginnings(words: Iterable[str], counts: tuple[Counter[str], Counter[str]]) -> dict[str, tuple[int, int]]:
    """Beginnings of words that are no such words: how many passages of each pile hold words that begin so."""
    whole = set(words)
    beginnings = {word[:length] for word in whole for length in range(_SHORTEST, len(word))} - whole
    totals = {beginning: [0, 0] for beginning in beginnings}
    longest = max(map(len, whole), default=0)
    for label in (0, 1):
        for word, count in counts[label].items():
            for length in range(_SHORTEST, min(len(word), longest) + 1):
                if (total := totals.get(word[:length])) is not None:
                    total[1 - label] += count
    return {beginning: (total[0], total[1]) for beginning, total in totals.items()}
