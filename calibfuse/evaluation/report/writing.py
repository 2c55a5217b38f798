"""The report of an evaluation: as data, and as files (report.json, report.md, report.html, curve.svg)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from calibfuse.evaluation.budget import BudgetComparison
from calibfuse.evaluation.evaluate import Evaluation, MethodResult
from calibfuse.evaluation.report.page import curve_chart, to_html
from calibfuse.evaluation.report.tables import to_markdown, versions
from calibfuse.html import Mask
from calibfuse.hub import write_files


def to_data(
    evaluation: Evaluation, *, with_examples: bool = True, within_budget: BudgetComparison | None = None
) -> dict[str, Any]:
    """Everything as JSON values; numbers that JSON lacks (infinite, none) become null.

    Args:
        evaluation: the results.
        with_examples: also continuations, as they are.
        within_budget: the comparison at one fluency, if it was made.

    Returns:
        A dictionary that `json.dumps(..., allow_nan=False)` accepts.
    """
    data = {
        "format": "calibfuse-evaluation",
        "format_version": 1,
        "facts": evaluation.facts,
        "versions": versions(),
        "methods": [_method_data(result, with_examples) for result in evaluation.results],
        "fluency_budget": None if within_budget is None else within_budget.to_dict(),
    }
    return cast("dict[str, Any]", _without_nan(data))


def _method_data(result: MethodResult, with_examples: bool) -> dict[str, Any]:
    method, neutrality = result.method, result.neutrality
    data: dict[str, Any] = {
        **{name: getattr(method, name) for name in ("key", "title", "family", "alpha", "is_default")},
        "settings": dict(method.settings),
        "metrics": {name: asdict(each) for name, each in result.estimates.items()},
        "change_against_plain": {name: asdict(each) for name, each in result.changes.items()},
        "difference_to_plain": {name: asdict(each) for name, each in result.differences.items()},
        "suites": {name: asdict(each) for name, each in result.suites.items()},
        "holistic_bias": None if result.holistic_bias is None else result.holistic_bias.to_dict(),
        **{
            name: None if value is None else asdict(value)
            for name, value in (("speed", result.speed), ("utility", result.utility), ("neutrality", neutrality))
        },
    }
    if neutrality is not None:
        data["neutrality"] |= {"kept": neutrality.kept, "kept_by_group": neutrality.groups()}
    if with_examples:
        for name, examples in (("first", result.measured.first), ("worst", result.measured.worst)):
            data[f"{name}_examples"] = [asdict(each) for each in examples]
    return data


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(
    evaluation: Evaluation,
    folder: str | os.PathLike[str],
    *,
    mask: Mask | None = None,
    within_budget: BudgetComparison | None = None,
) -> None:
    """Write the files.

    Args:
        evaluation: the results.
        folder: made when missing; older reports in it are replaced.
        mask: makes offensive words of the page and of report.md unreadable; None shows them. report.json holds text
            as it is.
        within_budget: the comparison at one fluency, if it was made.

    Raises:
        CheckpointError: the files cannot be written; nothing half-written is left.
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    data = to_data(evaluation, within_budget=within_budget)
    contents = {
        "report.json": json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": to_markdown(evaluation, within_budget=within_budget, mask=mask),
        "report.html": to_html(evaluation, mask=mask, within_budget=within_budget),
    }
    curve = curve_chart(evaluation)
    if curve is not None:
        contents["curve.svg"] = curve.svg()
    write_files(folder, {name: text.encode("utf-8") for name, text in contents.items()})
