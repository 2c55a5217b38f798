"""The bundled list of strong swear words and slurs."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

__all__ = ["strong_words"]


@cache
def strong_words() -> tuple[str, ...]:
    """Return the bundled list, lower case, in the file's order."""
    text = resources.files("calibfuse.scorers").joinpath("strong_words.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["words"])
