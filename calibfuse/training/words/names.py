"""Names that a sorting scorer suspects: found in the text by their capitals."""

from __future__ import annotations

import re
from collections import Counter

from calibfuse.training.data import PassageStore

LEAST_PASSAGES = 30
"""A name is looked at only if so many flagged passages hold it, ..."""
LEAST_EXCESS = 1.3
"""... if its flagged share is so many times that of all passages, ..."""
LEAST_CAPITALS = 0.8
"""... and if so large a share of its occurrences within sentences begins with a capital."""
_SHORTEST = 3
_WORD = re.compile(r"[a-z]+")
_WITHIN_SENTENCE = re.compile(r"(?<=[a-z,;] )[A-Za-z]+")
_LONGEST_ACRONYM = 4  # longer words in capitals are shouting, not names


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
        holders[label].update(set(_WORD.findall(text.lower())))
        capitals.add(text)
    if not all(passages):
        return ()
    base = passages[0] / sum(passages)
    return tuple(
        sorted(
            word
            for word, flagged in holders[0].items()
            if len(word) >= _SHORTEST
            and flagged >= LEAST_PASSAGES
            and flagged > LEAST_EXCESS * base * (flagged + holders[1][word])
            and capitals.is_name(word)
        )
    )
