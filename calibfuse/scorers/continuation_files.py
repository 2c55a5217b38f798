"""Read RealToxicityPrompts as labelled texts: prompts and how their authors went on, each with Perspective's score.

Gehman et al. 2020; in its original form (`{"prompt": {"text": ..., "toxicity": ...}, "continuation": {...}}`) and in
the flat one (`prompt`, `prompt_toxicity`, `continuation`, `continuation_toxicity`). A fold takes a part of the texts,
so that one scorer can sort text for training and another, which has read none of the same, can judge the result.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibfuse.errors import DataError, InputError
from calibfuse.scorers.training import LabelledTexts
from calibfuse.textfiles import read_rows

__all__ = ["Fold", "ScoredText", "read_scored_rows", "read_scored_texts"]


@dataclass(frozen=True)
class Fold:
    """A part of a collection of texts, drawn by a hash of each text.

    Attributes:
        part: which, from 1 to `parts`.
        parts: how many there are.
    """

    part: int = 1
    parts: int = 1

    @classmethod
    def parse(cls, text: str) -> Fold:
        """From "1/2".

        Raises:
            InputError: no such fold.
        """
        part, _, parts = text.partition("/")
        if not (part.isascii() and parts.isascii() and part.isdigit() and parts.isdigit()):
            raise InputError(f"Expected a fold such as 1/2, got {text!r}.")
        fold = cls(int(part), int(parts))
        if not 1 <= fold.part <= fold.parts:
            raise InputError(f"Fold {text!r}: the part must lie between 1 and {fold.parts}.")
        return fold

    def __contains__(self, text: object) -> bool:
        """Whether a text falls into it."""
        return int(hashlib.sha256(str(text).encode()).hexdigest(), 16) % self.parts == self.part - 1


@dataclass(frozen=True)
class ScoredText:
    """A text with Perspective's score of it, in [0, 1]."""

    text: str
    toxicity: float


def read_scored_rows(path: str | os.PathLike[str]) -> Iterator[tuple[ScoredText | None, ScoredText | None]]:
    """Read prompts and continuations.

    Args:
        path: .jsonl, plain or compressed.

    Yields:
        Prompt and continuation of each row; None for what has no text or no score.

    Raises:
        DataError: a file that cannot be used, or a row without a prompt.
    """
    for line, row in read_rows(path):
        place = f"{path}, line {line}"
        if "prompt" not in row:
            raise DataError(f"{place} has no field 'prompt'; expected rows of RealToxicityPrompts")
        yield _part(row, "prompt", place), _part(row, "continuation", place)


def _part(row: Mapping[str, Any], name: str, place: str) -> ScoredText | None:
    value: Any = row.get(name)
    toxicity: Any = row.get(f"{name}_toxicity")
    if isinstance(value, Mapping):
        toxicity, value = value.get("toxicity"), value.get("text")
    if toxicity is None or not isinstance(value, str) or not value.strip():
        return None
    if not isinstance(toxicity, int | float) or not 0.0 <= toxicity <= 1.0:
        raise DataError(f"{place} has the toxicity {toxicity!r} of its {name}; expected a number from 0 to 1")
    return ScoredText(value, float(toxicity))


def read_scored_texts(paths: Sequence[str | os.PathLike[str]], fold: Fold | None = None) -> LabelledTexts:
    """Read the prompts and the continuations as texts of their own.

    Args:
        paths: .jsonl files, plain or compressed.
        fold: only texts of this part; None: all.

    Returns:
        The texts, their scores as labels.

    Raises:
        DataError: a file that cannot be used, or one without a scored text in the fold.
    """
    chosen = fold or Fold()
    texts: list[ScoredText] = []
    for path in paths:
        before = len(texts)
        texts += [part for row in read_scored_rows(path) for part in row if part is not None and part.text in chosen]
        if len(texts) == before:
            raise DataError(f"{path} has no scored text (part {chosen.part} of {chosen.parts})")
    return LabelledTexts.build([each.text for each in texts], [each.toxicity for each in texts])
