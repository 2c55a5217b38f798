"""What counts as a score, and the refusal of everything else: a failed score is an error, never a zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from calibfuse.errors import ScorerError


@runtime_checkable
class ToxicityScorer(Protocol):
    """Anything that gives texts a probability of being toxic."""

    @property
    def name(self) -> str:
        """What reports call this scorer."""
        ...

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """A probability of being toxic for each text, float64 (len(texts),) in [0, 1], else a ScorerError."""
        ...


def check_texts(texts: Sequence[str], name: str) -> None:
    """Refuse (ScorerError) one string in place of a sequence, or an element that is no string."""
    if isinstance(texts, str):
        raise ScorerError(f"Scorer {name!r} expects a list of texts, got one string; pass [text]")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ScorerError(f"Scorer {name!r} expects strings, but text {i} is {type(text).__name__}")


def check_scores(values: object, n_texts: int, name: str, *, may_be_nan: bool = False) -> NDArray[np.float64]:
    """What a scorer gave for `n_texts` texts as float64 (n_texts,).

    ScorerError: not numbers, wrong count, or a value that is not finite or outside [0, 1]; names the first text.
    """
    try:
        scores = np.asarray(values)
        if scores.dtype.kind in "US":  # digits would be converted in silence
            raise TypeError("elements of type str")
        scores = scores.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ScorerError(f"Scorer {name!r} returned something that is no list of numbers ({error})") from error
    if scores.shape != (n_texts,):
        raise ScorerError(f"Scorer {name!r} was given {n_texts} texts and returned an array of shape {scores.shape}")
    holds = (scores >= 0.0) & (scores <= 1.0)  # nan fails both comparisons
    wrong = np.flatnonzero(~(holds | np.isnan(scores)) if may_be_nan else ~holds)
    if len(wrong):
        first = int(wrong[0])
        raise ScorerError(
            f"Scorer {name!r} returned {scores[first]} for text {first} ({len(wrong)} of {n_texts} texts concerned); "
            "a score is a probability in [0, 1]"
        )
    return scores
