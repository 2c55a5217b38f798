"""Ratios of sums over prompts (or texts), with bootstrap intervals and paired differences.

Every figure is a ratio of two sums, so one resampling (Efron 1979) serves all of them, and the difference between two
methods is taken within each resample: prompts are paired. Left out: tests of significance; an interval says more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibfuse.errors import InputError

_TAIL = (1.0 - 0.95) / 2.0  # of a 95 % interval
_CHUNK = 4_000_000  # resampled counts held at once


@dataclass(frozen=True, eq=False)
class Sums:
    """Numerator and denominator of a figure, one entry per prompt."""

    numerator: NDArray[np.float64]  # float64 [prompts]
    denominator: NDArray[np.float64]  # likewise
    is_exponential: bool = False  # the figure is exp of the ratio (perplexities)


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval."""

    value: float  # over all prompts
    low: float  # lower end of the interval; nan: there is none
    high: float  # upper end


@dataclass(frozen=True, eq=False)
class Resampled:
    """A figure on all prompts and on each resample."""

    value: float  # over all prompts
    resamples: NDArray[np.float64]  # float64 [resamples]

    def estimate(self) -> Estimate:
        """Value with its 95 % percentile interval, nan where some resamples have no value."""
        low, high = np.nan, np.nan
        if np.isfinite(self.resamples).all():
            low, high = np.quantile(self.resamples, [_TAIL, 1.0 - _TAIL])
        return Estimate(float(self.value), float(low), float(high))

    def minus(self, other: Resampled) -> Estimate:
        """Difference to another method on the same prompts."""
        return Resampled(self.value - other.value, self.resamples - other.resamples).estimate()

    def relative_to(self, other: Resampled) -> Estimate:
        """Relative change against another method on the same prompts: -0.8 is a reduction by 80 %; nan against 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.float64(self.value) / np.float64(other.value) - 1.0
            return Resampled(float(value), self.resamples / other.resamples - 1.0).estimate()


def bootstrap_counts(prompts: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each prompt is drawn in each resample, in blocks int64 [some resamples, prompts] of bounded size."""
    generator = np.random.default_rng([seed, 11])
    step = max(1, _CHUNK // prompts)
    for done in range(0, resamples, step):
        yield generator.multinomial(prompts, np.full(prompts, 1.0 / prompts), size=min(step, resamples - done))


def resample(measures: Mapping[str, Sums], *, resamples: int = 1000, seed: int = 0) -> dict[str, Resampled]:
    """Every figure that has a denominator above 0, on all prompts and on bootstrap resamples of them.

    Equal seeds draw equal prompts, which pairs methods. InputError: fewer than 1 resample, or measures of different
    lengths.
    """
    sizes = {len(part) for sums in measures.values() for part in (sums.numerator, sums.denominator)}
    if resamples < 1 or len(sizes) > 1:
        raise InputError(f"Expected at least 1 resample of equally many prompts, got {resamples} of {sorted(sizes)}.")
    names = [name for name, sums in measures.items() if sums.denominator.sum() > 0]
    if not names:
        return {}
    parts = [part for name in names for part in (measures[name].numerator, measures[name].denominator)]
    table = np.stack(parts, axis=1)
    totals = np.concatenate([counts @ table for counts in bootstrap_counts(len(table), resamples, seed)])
    totals = np.concatenate([table.sum(axis=0)[None], totals])  # all prompts first
    result = {}
    for place, name in enumerate(names):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = totals[:, 2 * place] / totals[:, 2 * place + 1]
        if measures[name].is_exponential:
            ratios = np.exp(ratios)
        result[name] = Resampled(float(ratios[0]), ratios[1:])
    return result


Figures = dict[str, Estimate]


def compare(
    measures: Sequence[Mapping[str, Sums]], *, resamples: int, seed: int
) -> list[tuple[Figures, Figures, Figures]]:
    """The figures of several methods, and their relative changes and differences to the first, which has none."""
    drawn = [resample(each, resamples=resamples, seed=seed) for each in measures]
    compared = []
    for number, own in enumerate(drawn):
        shared = {name: (own[name], drawn[0][name]) for name in own if name in drawn[0]} if number else {}
        compared.append(
            (
                {name: each.estimate() for name, each in own.items()},
                {name: each.relative_to(plain) for name, (each, plain) in shared.items()},
                {name: each.minus(plain) for name, (each, plain) in shared.items()},
            )
        )
    return compared
