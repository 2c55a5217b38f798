"""The bundled lists of words: strong swear words and slurs, and names of groups of people with sentences about them."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

__all__ = [
    "ADJECTIVES",
    "PLURALS",
    "ambiguous_words",
    "identity_templates",
    "identity_terms",
    "masked_words",
    "strong_words",
]


@cache
def _lists() -> dict[str, Any]:
    text = resources.files("calibfuse.scorers").joinpath("words.json").read_text(encoding="utf-8")
    lists: dict[str, Any] = json.loads(text)
    return lists


ADJECTIVES: tuple[str, ...] = tuple(_lists()["adjectives"])
"""Names of groups that stand before a noun: "a ___ person"."""
PLURALS: tuple[str, ...] = tuple(_lists()["plurals"])
"""Names of groups that are nouns: "the ___ in our street"."""


def strong_words() -> tuple[str, ...]:
    """Return strong swear words and slurs, lower case, in the file's order."""
    return tuple(_lists()["strong"])


def masked_words() -> tuple[str, ...]:
    """Return words that people mask: the strong ones, and some that harmless people write out as well."""
    return (*strong_words(), *_lists()["masked"])


def ambiguous_words() -> tuple[str, ...]:
    """Return words that are rude in one sense, or look like a rude one, and are ordinary in another."""
    return tuple(_lists()["ambiguous"])


def identity_terms() -> tuple[str, ...]:
    """Return all listed names of groups, adjectives first."""
    return (*ADJECTIVES, *PLURALS)


def identity_templates() -> tuple[tuple[tuple[str, ...], dict[str, list[str]]], ...]:
    """Return names of groups with "neutral" and "hostile" sentences that have a slot "{term}", kind by kind."""
    templates = _lists()["templates"]
    return (ADJECTIVES, templates["adjectives"]), (PLURALS, templates["plurals"])
