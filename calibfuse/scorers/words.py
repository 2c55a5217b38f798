"""The bundled lists of words: strong swear words and slurs, and names of groups of people with sentences about them."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

_LISTS: dict[str, Any] = json.loads(resources.files("calibfuse.scorers").joinpath("words.json").read_text("utf-8"))

ADJECTIVES: tuple[str, ...] = tuple(_LISTS["adjectives"])
"""Names of groups that stand before a noun: "a ___ person"."""
PLURALS: tuple[str, ...] = tuple(_LISTS["plurals"])
"""Names of groups that are nouns: "the ___ in our street"."""


def strong_words() -> tuple[str, ...]:
    """Strong swear words and slurs, lower case."""
    return tuple(_LISTS["strong"])


def masked_words() -> tuple[str, ...]:
    """Words that people mask: the strong ones, and some that harmless people write out as well."""
    return (*strong_words(), *_LISTS["masked"])


def ambiguous_words() -> tuple[str, ...]:
    """Words that are rude in one sense, or look like a rude one, and are ordinary in another."""
    return tuple(_LISTS["ambiguous"])


def identity_terms() -> tuple[str, ...]:
    """All listed names of groups, adjectives first."""
    return (*ADJECTIVES, *PLURALS)


def identity_templates() -> tuple[tuple[tuple[str, ...], dict[str, list[str]]], ...]:
    """Names of groups with "neutral" and "hostile" sentences that have a slot "{term}", kind by kind."""
    templates = _LISTS["templates"]
    return (ADJECTIVES, templates["adjectives"]), (PLURALS, templates["plurals"])
