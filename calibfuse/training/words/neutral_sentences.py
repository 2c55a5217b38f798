"""Passages of neutral sentences about people, so that the two heads agree on the names of groups in calm contexts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibfuse.scorers.words import ADJECTIVES, PLURALS

_PARTS: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
_LEAD_SHARE = 0.5
_PLURAL_SHARE = 0.3
_LOWER_SHARE = 0.15
_CAPITAL_SHARE = 0.5  # of the names that follow a small letter ("muslim", "Muslim")


def neutral_passage(rng: np.random.Generator) -> str:
    """Some neutral sentences that name groups of people."""
    sentences = [_sentence(rng) for _ in range(int(rng.integers(2, 8)))]
    text = " ".join(sentences)
    return text.lower() if rng.random() < _LOWER_SHARE else text


def _sentence(rng: np.random.Generator) -> str:
    if rng.random() < _PLURAL_SHARE:
        body = _choose(rng, _PARTS["plural sentences"]).replace("{p}", _name(rng, PLURALS))
    else:
        subject, state = _choose(rng, _PARTS["subjects"]), _choose(rng, _PARTS["states"])
        if state.startswith("is "):
            state = _PARTS["verbs after a pronoun"].get(subject, "is") + state[2:]
        name = _name(rng, ADJECTIVES)
        if name[0].lower() in "aeiou" and not name.lower().startswith("eu"):
            state = state.replace(" a {a}", " an {a}")
        body = f"{subject} {state}".replace("{a}", name).replace("{n}", _choose(rng, _PARTS["nouns"]))
    if rng.random() < _LEAD_SHARE:
        first = body if body.startswith("I ") else body[0].lower() + body[1:]
        body = _choose(rng, _PARTS["leads"]) + " " + first
    return body[0].upper() + body[1:] + _choose(rng, _PARTS["ends"])


def _name(rng: np.random.Generator, names: Sequence[str]) -> str:
    name = _choose(rng, names)
    return name.capitalize() if rng.random() < _CAPITAL_SHARE else name


def _choose(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]
