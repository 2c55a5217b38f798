"""How much rarer each word is in the non-toxic text than in the reference's: what a calibrator minds word by word.

The two piles of passages tell some words apart so clearly that no model is needed. Their shifts travel with the
calibrator and are added wherever a word is completed, however a vocabulary spells it (calibrator/minded_words.py).
A word counts once for each passage that holds it, so that one passage of shouting does not make a word. The words come
from the sorting of the text, not from a list; names of groups of people are not among them as far as the identity
balance (balance.py) has taken the passages out that would make them so.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from calibfuse.training.data import PassageStore

logger = logging.getLogger(__name__)

LEAST_PASSAGES = 15
"""A word is minded only if so many passages that the calibrator does not read hold it, ..."""
LEAST_SHIFT = -1.9
"""... and if its shift is this or lower, nats: 24 times as frequent in flagged passages as in others, where a quarter
of the reference's text is flagged. Names of politicians lie above it, insults below."""
LARGEST_SHIFT = -6.0
"""Lower ones are cut to this: what never occurs in some text still might."""
_SHORTEST = 3
_WORD = re.compile(r"[a-z]+")


def word_shifts(store: PassageStore, *, flagged_share: float, excluded: NDArray[np.bool_] | None) -> dict[str, float]:
    """Count the words of the training passages.

    Args:
        store: labelled passages.
        flagged_share: share of the passages, in (0, 1), that only the reference head reads.
        excluded: bool [passages], those left out of the training; None: none.

    Returns:
        Word of three or more letters a to z -> log p(word | calibrator's passages) - log p(word | reference's), nats,
        rounded to 0.01; only the words described above, the lowest first.
    """
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    passages = [0, 0]
    for index in store.train_indices.tolist():
        if excluded is not None and excluded[index]:
            continue
        label = int(store.labels[index])
        passages[label] += 1
        counts[label].update(set(_WORD.findall(store.text(index).lower())))
    if not passages[0] or not passages[1]:
        return {}
    found: dict[str, float] = {}
    for word, flagged in counts[0].items():
        if flagged < LEAST_PASSAGES or len(word) < _SHORTEST:
            continue
        clean = (counts[1][word] + 0.5) / passages[1]
        mixed = (1.0 - flagged_share) * clean + flagged_share * flagged / passages[0]
        shift = math.log(clean / mixed)
        if shift <= LEAST_SHIFT:
            found[word] = round(max(shift, LARGEST_SHIFT), 2)
    logger.info("%d words are minded by themselves", len(found))
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))
