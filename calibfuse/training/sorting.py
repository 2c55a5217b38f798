"""Sorts unfiltered text into wanted and unwanted passages with a toxicity scorer.

Any object with a name and a `score` method serves (the protocol `calibfuse.scorers.ToxicityScorer`). Left out: the
scorers themselves, and any choice of the threshold.
"""

from collections.abc import Sequence

import numpy as np

from calibfuse.errors import InputError
from calibfuse.scorers.checks import ToxicityScorer, check_scores


class PassageSorter:
    """Labels batches of passages and counts; the `sorter` of `PassageStore.build`.

    Args:
        scorer: gives each passage a toxicity in [0, 1].
        threshold: passages scoring this or more are unwanted; in (0, 1].
    """

    def __init__(self, scorer: ToxicityScorer, threshold: float) -> None:
        if not 0.0 < threshold <= 1.0:
            raise InputError(f"The toxicity threshold must be above 0 and at most 1, got {threshold}.")
        self.scorer = scorer
        self.threshold = threshold
        self.non_toxic_count = 0
        self.toxic_count = 0

    @property
    def name(self) -> str:
        """Scorer and threshold, for fingerprints and model cards."""
        return f"{self.scorer.name} < {self.threshold:g}"

    def __call__(self, passages: Sequence[str]) -> np.ndarray:
        """Label one batch: bool [len(passages)], True = non-toxic."""
        scores = check_scores(self.scorer.score(passages), len(passages), self.scorer.name)
        labels = np.asarray(scores < self.threshold)
        self.non_toxic_count += int(labels.sum())
        self.toxic_count += int((~labels).sum())
        return labels
