"""Neutral sentences, written for calibfuse: places to name a group in, and everyday text to leave alone.

None of the templates is used in training (calibfuse/scorers/words.json and calibfuse/training/words/balance.py have
their own). "Group words" name people by what they are; slurs are not among them.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

_DATA: dict[str, Any] = json.loads(resources.files(__package__).joinpath("neutral_text.json").read_text("utf-8"))

TEMPLATES: tuple[str, ...] = tuple(_DATA["templates"])
GROUP_WORDS: dict[str, tuple[str, ...]] = {kind: tuple(words) for kind, words in _DATA["group_words"].items()}
PLAIN_WORDS: tuple[str, ...] = tuple(_DATA["plain_words"])
"""Words that name no group: how far they move says how much of a shift is not about groups."""
BENIGN_TEXTS: tuple[str, ...] = tuple(_DATA["benign_texts"])
