"""Writes the report of an evaluation: report.json (everything), report.md, report.html, curve.svg."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from calibfuse.evaluation.budget import BudgetComparison
from calibfuse.evaluation.evaluate import Evaluation
from calibfuse.evaluation.page import curve_file, to_html
from calibfuse.evaluation.tables import to_data, to_markdown
from calibfuse.hub import write_files


def write_report(
    evaluation: Evaluation,
    folder: str | os.PathLike[str],
    *,
    mask: Callable[[str], str] | None = None,
    within_budget: BudgetComparison | None = None,
) -> None:
    """Write the files.

    Args:
        evaluation: the results.
        folder: made when missing; older reports in it are replaced.
        mask: makes offensive words of the page unreadable; None shows them. report.json holds text as it is.
        within_budget: the comparison at one fluency, if it was made.

    Raises:
        CheckpointError: the files cannot be written; nothing half-written is left.
    """
    data = (
        json.dumps(to_data(evaluation, within_budget=within_budget), indent=1, ensure_ascii=False, allow_nan=False)
        + "\n"
    )
    contents = {
        "report.json": data,
        "report.md": to_markdown(evaluation, within_budget=within_budget),
        "report.html": to_html(evaluation, mask=mask, within_budget=within_budget),
    }
    curve = curve_file(evaluation)
    if curve:
        contents["curve.svg"] = curve
    write_files(folder, {name: text.encode("utf-8") for name, text in contents.items()})
