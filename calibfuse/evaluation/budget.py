"""Every method at its best strength within one fluency budget: the fair comparison of methods with a strength.

A method looks good at a strength that ruins the text, and harmless at one that does nothing. So each family of methods
is measured at several strengths, and compared at the strength with the lowest mean toxicity within the budget. The
cost of a strength is the larger of two: how far perplexity rises, and how far distinct-1, -2 or -3 falls. Perplexity
alone would reward text that is always the same, as a low temperature or a narrow truncation gives it. Where the cost
crosses the budget between two strengths, the figures at the crossing are interpolated, so that a coarse grid is no
disadvantage.

Left out: intervals of interpolated figures; those of the nearest strength that was measured say how sure they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calibfuse.errors import InputError
from calibfuse.evaluation.evaluate import Evaluation, MethodResult

METRICS_AT_BUDGET = ("toxic_share", "toxicity_probability", "mean_toxicity")
_VARIETY = ("distinct_1", "distinct_2", "distinct_3")


@dataclass(frozen=True, eq=False)
class AtBudget:
    """One family of methods at a budget.

    Attributes:
        family: name of the curve.
        best: the strength, of those measured, with the lowest mean toxicity within the budget; None: all are over it.
        default: the strength of the paper, or the calibrator's own; None: it was not measured.
        strength: where the cost meets the budget, interpolated (of several places the least toxic one); None: it does
            not between two measured strengths.
        changes: relative changes of METRICS_AT_BUDGET there; empty where there is no crossing.
    """

    family: str
    best: MethodResult | None
    default: MethodResult | None
    strength: float | None
    changes: dict[str, float]


@dataclass(frozen=True, eq=False)
class BudgetComparison:
    """All families at one budget.

    Attributes:
        budget: largest cost; 0.02 is 2 %.
        measured_by: metric of the perplexity: the judge's where there is one, else the target's.
        families: in the order of the evaluation.
    """

    budget: float
    measured_by: str
    families: tuple[AtBudget, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {
            "budget": self.budget,
            "measured_by": self.measured_by,
            "families": [
                {
                    "family": each.family,
                    "best": None if each.best is None else each.best.method.key,
                    "default": None if each.default is None else each.default.method.key,
                    "strength_at_budget": each.strength,
                    "changes_at_budget": each.changes,
                }
                for each in self.families
            ],
        }


def compare_within_budget(evaluation: Evaluation, budget: float) -> BudgetComparison:
    """Compare the families of an evaluation at one fluency.

    Args:
        evaluation: of several strengths per family.
        budget: largest relative increase of the perplexity, and largest relative loss of distinct-n, against plain
            decoding; at least 0.

    Returns:
        Each family's best strength within the budget. Point estimates decide.

    Raises:
        InputError: a negative budget.
    """
    if not budget >= 0.0:
        raise InputError(f"The fluency budget must be at least 0, got {budget}.")
    name = perplexity_metric(evaluation)
    families: dict[str, list[MethodResult]] = {}
    for result in evaluation.results[1:]:
        families.setdefault(result.method.family or result.method.title, []).append(result)
    return BudgetComparison(
        budget, name, tuple(_at_budget(family, results, budget, name) for family, results in families.items())
    )


def perplexity_metric(evaluation: Evaluation) -> str:
    """The metric of fluency: the judge's perplexity where there is a judge, else the target's."""
    return "perplexity" if "perplexity" in evaluation.results[0].estimates else "target_perplexity"


def increase(result: MethodResult, name: str) -> float:
    """Relative change of a perplexity against plain; infinite where there is none."""
    value = result.changes[name].value if name in result.changes else math.nan
    return value if math.isfinite(value) else math.inf


def cost(result: MethodResult, name: str) -> float:
    """What a method costs in fluency: the larger of the rise of a perplexity and the fall of distinct-n, relative."""
    losses = [-result.changes[each].value for each in _VARIETY if each in result.changes]
    return max([increase(result, name), *(loss for loss in losses if math.isfinite(loss))])


def _at_budget(family: str, results: Sequence[MethodResult], budget: float, name: str) -> AtBudget:
    affordable = [result for result in results if cost(result, name) <= budget]
    best = min(affordable, key=lambda result: result.estimates["mean_toxicity"].value, default=None)
    default = next((result for result in results if result.method.is_default), None)
    strength, changes = _crossing(results, budget, name)
    return AtBudget(family, best, default, strength, changes)


def _crossing(results: Sequence[MethodResult], budget: float, name: str) -> tuple[float | None, dict[str, float]]:
    """Where the cost of a family passes the budget between two strengths, up or down; the least toxic of such places.

    Stronger is not dearer for every family: of top-k and nucleus it is the small strengths that cost.
    """
    curve = sorted((result for result in results if result.method.alpha is not None), key=_strength)
    points: list[tuple[float, float, dict[str, float]]] = []
    if all(result.method.starts_at_plain for result in curve):
        points.append((0.0, 0.0, dict.fromkeys(METRICS_AT_BUDGET, 0.0)))
    for result in curve:
        changes = {each: result.changes[each].value for each in METRICS_AT_BUDGET}
        points.append((_strength(result), cost(result, name), changes))
    found: list[tuple[float, dict[str, float]]] = []
    for (low, below, before), (high, above, after) in zip(points, points[1:], strict=False):
        if (below <= budget) != (above <= budget) and math.isfinite(below) and math.isfinite(above):
            share = (budget - below) / (above - below)
            mixed = {each: before[each] + share * (after[each] - before[each]) for each in METRICS_AT_BUDGET}
            found.append((low + share * (high - low), mixed))
    return min(found, key=lambda each: each[1]["mean_toxicity"], default=(None, {}))


def _strength(result: MethodResult) -> float:
    assert result.method.alpha is not None
    return result.method.alpha
