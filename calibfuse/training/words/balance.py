"""Keeps the calibrator from learning that groups of people are not to be mentioned.

Sorting text by toxicity also sorts it by topic: passages that name a group are flagged far more often than others, so a
model of the clean pile avoids the group's name (Xu et al. 2021). So for every term, flagged passages that hold it are
left out at random until its flagged share is the text's overall share.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibfuse.scorers.words import ADJECTIVES, PLURALS
from calibfuse.training.data import PassageStore
from calibfuse.training.words.counts import suspected_names, words_of

logger = logging.getLogger(__name__)

_SINGULARS = (
    "man woman boy girl jew arab turk greek briton immigrant refugee migrant foreigner veteran mother father wife "
    "husband "
    "feminist lesbian homosexual muslim christian catholic hindu mormon buddhist atheist transsexual transgendered "
    "islam"
).split()
# of "middle-aged", "middle eastern", "puerto rican": words are looked for one by one
_SECOND_PARTS = ("aged", "eastern", "rican")
TERMS: tuple[str, ...] = tuple(
    sorted({term for term in (*ADJECTIVES, *PLURALS, *_SINGULARS, *_SECOND_PARTS) if " " not in term})
)


@dataclass(frozen=True)
class Balance:
    """Which flagged passages are left out."""

    excluded: NDArray[np.bool_]  # [passages]
    holders: dict[str, NDArray[np.int64]]  # term -> sorted indices of the passages that hold it


def balance_terms(store: PassageStore, seed: int, terms: Sequence[str] | None = None) -> Balance:
    """Choose the flagged passages to leave out."""
    flagged = store.labels == 0
    excluded = np.zeros(len(store), dtype=bool)
    base = float(flagged.mean())
    if base in (0.0, 1.0):
        return Balance(excluded, {})
    holders = passages_with_terms(store, sorted({*TERMS, *suspected_names(store)}) if terms is None else terms)
    keep = np.ones(len(store))
    for passages in holders.values():
        bad = passages[flagged[passages]]
        clean = len(passages) - len(bad)
        if len(bad):
            wanted = clean * base / (1.0 - base)
            keep[bad] = np.minimum(keep[bad], wanted / len(bad))
    excluded = flagged & (np.random.default_rng([seed, 4]).random(len(store)) >= keep)
    logger.info("identity balance: %s of %s flagged passages left out", f"{excluded.sum():,}", f"{flagged.sum():,}")
    return Balance(excluded, holders)


def passages_with_terms(store: PassageStore, terms: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """The passages that hold each term as a whole word, whatever its capitals: term -> sorted indices."""
    found: dict[str, list[int]] = {term: [] for term in terms}
    for index in range(len(store)):
        for term in found.keys() & words_of(store.text(index)):
            found[term].append(index)
    return {term: np.array(indices, dtype=np.int64) for term, indices in found.items()}
