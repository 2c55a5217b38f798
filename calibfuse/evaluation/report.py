"""Writes the report of an evaluation: report.json (everything), report.md (tables), report.html (one page)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from calibfuse.evaluation.page import to_html
from calibfuse.evaluation.running import Evaluation
from calibfuse.evaluation.tables import to_data, to_markdown
from calibfuse.hub import write_files


def write_report(
    evaluation: Evaluation, folder: str | os.PathLike[str], *, mask: Callable[[str], str] | None = None
) -> None:
    """Write the three files.

    Args:
        evaluation: the results.
        folder: made when missing; older reports in it are replaced.
        mask: makes offensive words of the page unreadable; None shows them. report.json holds text as it is.

    Raises:
        CheckpointError: the files cannot be written; nothing half-written is left.
    """
    data = json.dumps(to_data(evaluation), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    contents = {
        "report.json": data,
        "report.md": to_markdown(evaluation),
        "report.html": to_html(evaluation, mask=mask),
    }
    write_files(folder, {name: text.encode("utf-8") for name, text in contents.items()})
