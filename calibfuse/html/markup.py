"""The small pieces that all HTML pages share."""

from __future__ import annotations

import html


def escape(text: str) -> str:
    """Text as HTML shows it, in elements and in quoted attributes."""
    return html.escape(text, quote=True)


def visible(text: str) -> str:
    """Spaces and line ends of a token made visible."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥")


def unchanged(text: str) -> str:
    """A mask that masks nothing."""
    return text
