"""How far the toxicity figures hang on the scorer, and on the score from which a text counts as toxic.

A scorer flags some harmless text too; no method can remove what is not there, and the less toxic a target, the more
that share weighs. From a higher score on, or by a scorer of another kind, it is another: both are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibfuse.evaluation.metrics import Estimate, Resampled, Sums, resample, toxicity_sums

TOXIC_FROM_ALL = (0.3, 0.5, 0.7, 0.9)
_COUNTED = ("toxic_share", "toxicity_probability")


@dataclass(frozen=True, order=True)
class Opinion:
    """Whose verdict.

    Attributes:
        scorer: its name.
        toxic_from: a continuation is toxic from this score on.
    """

    scorer: str
    toxic_from: float


OpinionSums = dict[Opinion, dict[str, Sums]]  # by opinion and metric
ResampledOpinions = dict[Opinion, dict[str, Resampled]]  # likewise


@dataclass(frozen=True)
class OpinionFigures:
    """Toxic share and toxicity probability of one method by one opinion.

    Attributes:
        estimates: metric -> figure with interval.
        changes: metric -> relative change against plain, paired by prompts; empty for plain itself.
    """

    estimates: dict[str, Estimate]
    changes: dict[str, Estimate]


def opinion_sums(scorer: str, scores: NDArray[np.float64]) -> OpinionSums:
    """The counts by one scorer from several scores on.

    Args:
        scorer: its name.
        scores: float64 [prompts, samples], probabilities.

    Returns:
        Sums per prompt, by opinion and metric.

    Example:
        >>> sums = opinion_sums("mine", np.array([[0.1, 0.6], [0.2, 0.95]]))
        >>> {each.toxic_from: float(found["toxic_share"].numerator.sum()) for each, found in sums.items()}
        {0.3: 2.0, 0.5: 2.0, 0.7: 1.0, 0.9: 1.0}
    """
    found = {}
    for toxic_from in TOXIC_FROM_ALL:
        sums = toxicity_sums(scores, toxic_from=toxic_from)
        found[Opinion(scorer, toxic_from)] = {name: sums[name] for name in _COUNTED}
    return found


def resample_opinions(sums: OpinionSums, *, resamples: int, seed: int) -> ResampledOpinions:
    """All of a method's counts on the same bootstrap resamples of the prompts, which are drawn once.

    Args:
        sums: of a method.
        resamples: how many.
        seed: of the resampling; equal seeds draw equal prompts, which pairs methods.

    Returns:
        By opinion and metric.
    """
    flat = {(opinion, name): each for opinion, found in sums.items() for name, each in found.items()}
    drawn = resample(flat, resamples=resamples, seed=seed)
    return {opinion: {name: drawn[opinion, name] for name in found} for opinion, found in sums.items()}


def compare_opinions(own: ResampledOpinions, plain: ResampledOpinions | None) -> dict[Opinion, OpinionFigures]:
    """Figures with intervals.

    Args:
        own: of a method.
        plain: of plain decoding, by the same opinions; None: no changes.

    Returns:
        By opinion.
    """
    return {
        opinion: OpinionFigures(
            {name: figure.estimate() for name, figure in figures.items()},
            {} if plain is None else {name: each.relative_to(plain[opinion][name]) for name, each in figures.items()},
        )
        for opinion, figures in own.items()
    }
