"""HTML pages from jinja2 templates, which lie beside the code that fills them; one look, in html/base.html.jinja.

A page is one file that loads nothing. Everything is escaped but charts: what a model or a tokenizer says is text.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibfuse.errors import MissingDependencyError

Mask = Callable[[str], str]  # replaces the letters of offensive words, one character by one


@dataclass(frozen=True)
class Cell:
    """A figure in a table."""

    text: str
    interval: tuple[str, str] | None = None  # its ends
    change: str = ""  # against what it is compared with
    verdict: str = ""  # "good" or "bad" where the change has a direction


@dataclass(frozen=True)
class Table:
    """A table of a page; the first cell of each row names it."""

    headers: list[str]
    rows: list[list[Cell]]


def require(package: str) -> Any:  # noqa: ANN401
    """Import a package of the extra `eval`; commands call this first, so that no work is lost for want of one.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"Pages and charts need the package {package}: pip install 'calibfuse[eval]'."
        ) from error


def render(template: str, **values: object) -> str:
    """Fill a template, named by its path below the package; MissingDependencyError without jinja2."""
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page: str = environment.get_template(template).render(**values)
    return page


def visible(text: str) -> str:
    """Spaces and line ends of a token made visible."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥")
