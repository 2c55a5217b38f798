"""Sorts unfiltered text into non-toxic and reference-only passages with a toxicity scorer.

Used by `train-calibrator --from-unfiltered`. Any object with a name and a `score` method serves (the protocol
`calibfuse.scorers.ToxicityScorer`). Left out: the scorers themselves, and any choice of the threshold.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from calibfuse.errors import InputError, ScorerError

__all__ = ["PassageScorer", "PassageSorter", "SortingResult", "sort_passages"]


class PassageScorer(Protocol):
    """What sorting needs of a toxicity scorer."""

    @property
    def name(self) -> str:
        """What it is called, for reports."""
        ...

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Toxicity of each text: float64 [len(texts)], a probability in [0, 1]."""
        ...


@dataclass(frozen=True, eq=False)
class SortingResult:
    """Labels of the passages and how many fell on each side.

    Attributes:
        is_non_toxic: bool [passages]; True where the score is below the threshold.
        non_toxic_count: number of True labels.
        toxic_count: number of False labels.
        mean_score: mean of all scores, in [0, 1].
    """

    is_non_toxic: np.ndarray
    non_toxic_count: int
    toxic_count: int
    mean_score: float


class PassageSorter:
    """Labels batches of passages and counts; the `sorter` of `PassageStore.build`."""

    def __init__(self, scorer: PassageScorer, threshold: float) -> None:
        """Set up.

        Args:
            scorer: gives each passage a toxicity in [0, 1].
            threshold: passages scoring this or more are not non-toxic; in (0, 1].
        """
        if not 0.0 < threshold <= 1.0:
            raise InputError(f"The toxicity threshold must be above 0 and at most 1, got {threshold}.")
        self.scorer = scorer
        self.threshold = threshold
        self.non_toxic_count = 0
        self.toxic_count = 0
        self._score_sum = 0.0

    @property
    def name(self) -> str:
        """Scorer and threshold, for fingerprints and model cards."""
        return f"{self.scorer.name} < {self.threshold:g}"

    @property
    def mean_score(self) -> float:
        """Mean score of all passages seen; 0 before the first."""
        return self._score_sum / max(1, self.non_toxic_count + self.toxic_count)

    def __call__(self, passages: Sequence[str]) -> np.ndarray:
        """Label one batch.

        Args:
            passages: the texts.

        Returns:
            bool [len(passages)], True = non-toxic.
        """
        scores = np.asarray(self.scorer.score(passages), dtype=np.float64)
        if scores.shape != (len(passages),):
            raise ScorerError(
                f"Scorer {self.scorer.name!r} returned scores of shape {scores.shape} for {len(passages)} passages; "
                "expected one score each."
            )
        # written so that nan fails too
        if not bool(np.all((scores >= 0.0) & (scores <= 1.0))):
            bad = int(np.flatnonzero(~((scores >= 0.0) & (scores <= 1.0)))[0])
            raise ScorerError(
                f"Scorer {self.scorer.name!r} returned {scores[bad]} for passage {bad} of the batch; expected a "
                "probability in [0, 1]."
            )
        labels = np.asarray(scores < self.threshold)
        self.non_toxic_count += int(labels.sum())
        self.toxic_count += int((~labels).sum())
        self._score_sum += float(scores.sum())
        return labels


def sort_passages(
    passages: Iterable[str], scorer: PassageScorer, threshold: float, *, batch_size: int = 512
) -> SortingResult:
    """Label passages as non-toxic where the scorer gives less than the threshold.

    Args:
        passages: the texts; read in batches, so a generator is fine.
        scorer: gives each passage a toxicity in [0, 1].
        threshold: passages scoring this or more are not non-toxic; in (0, 1].
        batch_size: passages per call of the scorer.

    Returns:
        Labels and counts.
    """
    sorter = PassageSorter(scorer, threshold)
    labels = [sorter(batch) for batch in _batches(passages, batch_size)]
    return SortingResult(
        is_non_toxic=np.concatenate(labels) if labels else np.zeros(0, dtype=bool),
        non_toxic_count=sorter.non_toxic_count,
        toxic_count=sorter.toxic_count,
        mean_score=sorter.mean_score,
    )


def _batches(passages: Iterable[str], batch_size: int) -> Iterator[list[str]]:
    source = iter(passages)
    while batch := list(islice(source, batch_size)):
        yield batch
