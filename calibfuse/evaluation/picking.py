"""The strongest alpha within a fluency budget, and its place in a calibrator's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibfuse.errors import CheckpointError, InputError
from calibfuse.evaluation.budget import increase, perplexity_metric
from calibfuse.evaluation.evaluate import Evaluation, MethodResult
from calibfuse.hub import ALLOWED_FILES, CONFIG_NAME, README_NAME, read_json, write_files
from calibfuse.model_card import calibrator_card

_TOXICITY = "mean_toxicity"  # the least noisy of the toxicity metrics


@dataclass(frozen=True, eq=False)
class Choice:
    """What was picked.

    Attributes:
        result: of the chosen method; None: none lowers toxicity within the budget.
        budget: largest relative increase of the perplexity.
        measured_by: metric of the perplexity: the judge's where there is one, else the target's.
        reason: one sentence or two.
    """

    result: MethodResult | None
    budget: float
    measured_by: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        key = None if self.result is None else self.result.method.key
        return {"method": key, "budget": self.budget, "measured_by": self.measured_by, "reason": self.reason}


def pick_alpha(evaluation: Evaluation, max_perplexity_increase: float) -> Choice:
    """The method with the lowest mean toxicity whose perplexity stays within a budget.

    Args:
        evaluation: of several strengths; baselines are not picked.
        max_perplexity_increase: against plain decoding, 0.05 is 5 %; at least 0.

    Returns:
        The choice. Point estimates decide; the reason gives the interval.

    Raises:
        InputError: a negative budget.
    """
    if not max_perplexity_increase >= 0.0:
        raise InputError(f"The perplexity budget must be at least 0, got {max_perplexity_increase}.")
    name = perplexity_metric(evaluation)
    whose = "the judge" if name == "perplexity" else "the target"

    strengths = [result for result in evaluation.results[1:] if "fusion" in result.method.settings]
    strengths = [result for result in strengths if "baseline" not in result.method.settings]
    affordable = [result for result in strengths if increase(result, name) <= max_perplexity_increase]
    effective = [result for result in affordable if result.differences[_TOXICITY].value < 0.0]
    if not effective:
        reason = f"none of the {len(strengths)} strengths lowers toxicity within {max_perplexity_increase:.1%} "
        return Choice(None, max_perplexity_increase, name, f"{reason}more perplexity under {whose}.")
    best = min(effective, key=lambda result: result.estimates[_TOXICITY].value)
    toxicity, perplexity = best.changes["toxic_share"], best.changes[name]
    reason = (
        f"toxic continuations {toxicity.value:+.1%}, perplexity under {whose} {perplexity.value:+.1%} "
        f"[{perplexity.low:+.1%}, {perplexity.high:+.1%}]."
    )
    if best is strengths[-1]:
        reason += " It is the largest strength that was tried; a larger one may do more."
    return Choice(best, max_perplexity_increase, name, reason)


def write_recommendation(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], fusion: Mapping[str, Any]
) -> None:
    """Write fusion options into a calibrator's folder, where `from_pretrained` finds them; weights stay as they are.

    Args:
        source: folder of the calibrator.
        destination: the same folder, or another one that gets a copy.
        fusion: the options, see FusionConfig.to_dict.

    Raises:
        CheckpointError: the source is no calibrator, or the destination cannot be written.
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
            raise CheckpointError(
                f"Cannot read the calibrator in {str(origin)!r}: {error.strerror or error}."
            ) from error
    contents.pop(CONFIG_NAME, None)
    contents[README_NAME] = calibrator_card({**config.get("training", {}), "fusion": config["fusion"]}).encode("utf-8")
    contents[CONFIG_NAME] = (json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    write_files(goal, contents)
