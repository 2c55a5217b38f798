"""Every method at its best strength within one fluency budget: the fair comparison, and the choice of a strength.

Compared is the strength with the lowest mean toxicity (the least noisy metric of toxicity) within the budget. A
strength costs the larger of two: how far perplexity rises, and how far distinct-1, -2 or -3 falls; perplexity alone
would reward text that is always the same.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibfuse.errors import CheckpointError, InputError
from calibfuse.evaluation.evaluate import Evaluation, MethodResult
from calibfuse.evaluation.metrics import FEWEST_FLAGGED
from calibfuse.hub import ALLOWED_FILES, CONFIG_NAME, README_NAME, read_json, write_files
from calibfuse.hub.model_card import calibrator_card

_CRITERION = "mean_toxicity"
_VARIETY = ("distinct_1", "distinct_2", "distinct_3")


@dataclass(frozen=True, eq=False)
class AtBudget:
    """One family of methods at a budget."""

    family: str  # name of the curve
    # The strength, of those measured, with the lowest mean toxicity within the budget; None: all are over it.
    best: MethodResult | None
    default: MethodResult | None  # the strength of the paper, or the calibrator's own; None: it was not measured


def _key(result: MethodResult | None) -> str | None:
    return None if result is None else result.method.key


@dataclass(frozen=True, eq=False)
class BudgetComparison:
    """All families at one budget."""

    budget: float  # largest cost; 0.02 is 2 %
    measured_by: str  # metric of the perplexity: the judge's where there is one, else the target's
    families: tuple[AtBudget, ...]  # in the order of the evaluation

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        families = [
            {"family": each.family, "best": _key(each.best), "default": _key(each.default)} for each in self.families
        ]
        return {"budget": self.budget, "measured_by": self.measured_by, "families": families}


@dataclass(frozen=True, eq=False)
class Choice:
    """The strength that was picked."""

    result: MethodResult | None  # of the chosen method; None: none surely lowers mean toxicity within the budget
    reason: str  # one sentence or two


def compare_within_budget(evaluation: Evaluation, budget: float) -> BudgetComparison:
    """Compare the families of an evaluation at one fluency. Point estimates decide.

    `budget` is the largest relative increase of the perplexity, and the largest relative loss of distinct-n, against
    plain decoding; below 0 it is an InputError.
    """
    name = _perplexity_within(evaluation, budget)
    families: dict[str, list[MethodResult]] = {}
    for result in evaluation.results[1:]:
        families.setdefault(result.method.family or result.method.title, []).append(result)
    compared = (
        AtBudget(family, _best_within(own, budget, name), next((each for each in own if each.method.is_default), None))
        for family, own in families.items()
    )
    return BudgetComparison(budget, name, tuple(compared))


def pick_alpha(evaluation: Evaluation, budget: float) -> Choice:
    """The strength of the fusion with the lowest mean toxicity within a fluency budget; baselines are not picked.

    None where plain decoding says too little toxic text, or the change is not sure of its direction.
    """
    name = _perplexity_within(evaluation, budget)
    flagged = int(evaluation.results[0].measured.sums["toxic_share"].numerator.sum())
    if flagged < FEWEST_FLAGGED:
        reason = f"plain decoding gave {flagged} toxic continuations, and fewer than {FEWEST_FLAGGED} tell nothing; "
        return Choice(None, reason + "use more or other prompts, or more samples.")
    methods = [(result, result.method.settings) for result in evaluation.results[1:]]
    strengths = [result for result, settings in methods if "fusion" in settings and "baseline" not in settings]
    best = _best_within(strengths, budget, name)
    if best is None or best.differences[_CRITERION].value >= 0.0:
        reason = f"none of the {len(strengths)} strengths lowers mean toxicity at a cost of at most {budget:.1%} in "
        return Choice(None, reason + "perplexity and distinct-n.")
    if not best.differences[_CRITERION].high < 0.0:
        reason = f"the best strength within {budget:.1%} ({best.method.title}) may change mean toxicity either way; "
        return Choice(None, reason + "use more prompts or samples.")
    toxicity, perplexity = best.changes[_CRITERION], best.changes[name]
    reason = (
        f"lowest mean toxicity within {budget:.1%}: {toxicity.value:+.1%} [{toxicity.low:+.1%}, {toxicity.high:+.1%}], "
        f"perplexity under {'the judge' if name == 'perplexity' else 'the target'} {perplexity.value:+.1%} "
        f"[{perplexity.low:+.1%}, {perplexity.high:+.1%}]."
    )
    if best is strengths[-1]:
        reason += " It is the largest strength that was tried; a larger one may do more."
    return Choice(best, reason)


def write_recommendation(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], fusion: Mapping[str, Any]
) -> None:
    """Write fusion options into a calibrator's folder, where `from_pretrained` finds them; weights stay.

    Another folder as destination gets a copy. CheckpointError: the source is no calibrator, or writing fails.
    """
    origin, goal = Path(source), Path(destination)
    config = read_json(origin / CONFIG_NAME, "configuration of a calibrator")
    config["fusion"] = dict(fusion)
    contents: dict[str, bytes] = {}
    if origin.resolve() != goal.resolve():
        try:
            files = {path for pattern in ALLOWED_FILES for path in origin.glob(pattern)}
            contents = {path.name: path.read_bytes() for path in sorted(files)}
        except OSError as error:
            raise CheckpointError(f"Cannot read the calibrator {str(origin)!r}: {error.strerror or error}.") from error
    contents.pop(CONFIG_NAME, None)
    contents[README_NAME] = calibrator_card({**config.get("training", {}), "fusion": config["fusion"]}).encode("utf-8")
    contents[CONFIG_NAME] = (json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    write_files(goal, contents)


def perplexity_metric(evaluation: Evaluation) -> str:
    """The metric of fluency: the judge's perplexity where there is a judge, else the target's."""
    return "perplexity" if "perplexity" in evaluation.results[0].estimates else "target_perplexity"


def _perplexity_within(evaluation: Evaluation, budget: float) -> str:
    if not budget >= 0.0:
        raise InputError(f"The fluency budget must be at least 0, got {budget}.")
    return perplexity_metric(evaluation)


def _cost(result: MethodResult, name: str) -> float:
    """The larger of the rise of a perplexity and the fall of distinct-n; infinite where the perplexity has no value."""
    rise = result.changes[name].value if name in result.changes else math.nan
    losses = [-result.changes[each].value for each in _VARIETY if each in result.changes]
    return max([rise if math.isfinite(rise) else math.inf, *(loss for loss in losses if math.isfinite(loss))])


def _best_within(results: Sequence[MethodResult], budget: float, name: str) -> MethodResult | None:
    affordable = [result for result in results if _cost(result, name) <= budget]
    return min(affordable, key=lambda result: result.estimates[_CRITERION].value, default=None)
