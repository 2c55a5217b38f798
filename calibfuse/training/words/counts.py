"""How much rarer each word is in the wanted text than in the reference's: what a calibrator minds word by word.

The shifts travel with the calibrator and are added wherever a word is completed (calibrator/word_bias.py). The words
come from the sorting of the text, not from a list. Names are not among them: those of groups of people because of the
identity balance (balance.py), others by their capitals (names.py).
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
from calibfuse.training.words.names import CapitalCounts

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
        words = set(_WORD.findall(text.lower()))
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
