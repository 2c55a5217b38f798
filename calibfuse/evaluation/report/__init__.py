"""The report of an evaluation: as data, as Markdown, and as one HTML page."""

from calibfuse.evaluation.report.page import to_data, write_report
from calibfuse.evaluation.report.tables import to_markdown

__all__ = ["to_data", "to_markdown", "write_report"]
