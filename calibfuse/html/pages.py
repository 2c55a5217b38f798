"""Pages from jinja2 templates, which lie beside the code that fills them; one look for all, in html/base.html.jinja.

A page is one file that loads nothing. Everything is escaped but charts: what a model or a tokenizer says is text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from calibfuse.html import require
from calibfuse.html.charts import CHART_STYLE

Mask = Callable[[str], str]  # replaces the letters of offensive words, one character by one


@dataclass(frozen=True)
class Cell:
    """A figure in a table.

    Attributes:
        text: the figure.
        interval: its ends.
        change: against what it is compared with.
        verdict: "good" or "bad" where the change has a direction, else empty.
    """

    text: str
    interval: tuple[str, str] | None = None
    change: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        headers: titles of the columns.
        rows: cells; the first of each row names it.
    """

    headers: list[str]
    rows: list[list[Cell]]


def render(template: str, **values: object) -> str:
    """Fill a template.

    Args:
        template: its path below the package.
        **values: what it shows.

    Returns:
        The page.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    environment.globals["chart_style"] = CHART_STYLE
    page: str = environment.get_template(template).render(**values)
    return page


def visible(text: str) -> str:
    """Spaces and line ends of a token made visible."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥")


def unchanged(text: str) -> str:
    """A mask that masks nothing."""
    return text
