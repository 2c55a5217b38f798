"""How much rarer each word is in the non-toxic text than in the reference's: what a calibrator minds word by word.

The two piles of passages tell some words apart so clearly that no model is needed. Their shifts travel with the
calibrator and are added wherever a word is completed, however a vocabulary spells it (calibrator/minded_words.py).
A word counts once for each passage that holds it, so that one passage of shouting does not make a word; and passages
that stand beside each other are not enough, so that one long document does not either. The words come from the sorting
of the text, not from a list. Names are not among them: those of groups of people because the identity balance
(balance.py) has taken the passages out that would make them so, others by their capitals (names.py).
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from calibfuse.training.data import PassageStore
from calibfuse.training.names import CapitalCounts

logger = logging.getLogger(__name__)

LEAST_PASSAGES = 15
"""A word is minded only if so many passages that the calibrator does not read hold it, ..."""
_APART = 8
"""... none of them so near to the one before in the order of the text, ..."""
LEAST_SHIFT = -1.5
"""... and if its shift is this or lower, nats: 15 times as frequent in flagged passages as in others, where a quarter
of the reference's text is flagged. What is rude in some contexts only ("sex", "kill") lies above it, insults below."""
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
    apart: Counter[str] = Counter()
    last: dict[str, int] = {}
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
            apart.update(word for word in words if index - last.get(word, -_APART - 1) > _APART)
            last.update(dict.fromkeys(words, index))
    if not passages[0] or not passages[1]:
        return {}
    found: dict[str, float] = {}
    for word, flagged in counts[0].items():
        if apart[word] < LEAST_PASSAGES or len(word) < _SHORTEST or capitals.is_name(word):
            continue
        clean = (counts[1][word] + 0.5) / passages[1]
        mixed = (1.0 - flagged_share) * clean + flagged_share * flagged / passages[0]
        shift = math.log(clean / mixed)
        if shift <= LEAST_SHIFT:
            found[word] = round(max(shift, LARGEST_SHIFT), 2)
    logger.info("%d words are minded by themselves", len(found))
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))
