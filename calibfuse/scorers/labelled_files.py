"""Labelled texts, and the files that hold them: rows with a label, toxic texts with rewrites, RealToxicityPrompts.

RealToxicityPrompts (Gehman et al. 2020) holds prompts and how their authors went on, each with Perspective's score. A
fold takes a part of its texts, so that one scorer can sort text for training and another judge the result.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibfuse.errors import DataError, InputError
from calibfuse.textfiles import read_rows

# Fields in which a row's text and label are looked for, in this order, when none is given.
TEXT_FIELDS = ("text", "comment_text", "comment", "content", "sentence")
LABEL_FIELDS = ("toxic", "toxicity", "toxic_fraction", "label", "target")

_REWRITES_PER_ROW = 2  # so that both classes stay of similar size

Paths = Sequence[str | os.PathLike[str]]
Scored = tuple[str, float]  # a text with its toxicity, in [0, 1]


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Texts with their toxicity."""

    texts: list[str]
    labels: NDArray[np.float64]  # [texts] toxicity in [0, 1]; fractions of annotators are fine

    @classmethod
    def build(cls, texts: Sequence[str], labels: Sequence[float]) -> LabelledTexts:
        """Build from parallel sequences; DataError for unequal lengths or labels outside [0, 1]."""
        values = np.asarray(labels, dtype=np.float64)
        if values.shape != (len(texts),):
            raise DataError(f"{len(texts)} texts but {values.size} labels")
        wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
        if len(wrong):
            raise DataError(f"Label of text {int(wrong[0])} is {values[wrong[0]]}; labels lie in [0, 1]")
        return cls(list(texts), values)

    def __len__(self) -> int:
        return len(self.texts)

    def __add__(self, other: LabelledTexts) -> LabelledTexts:
        return LabelledTexts(self.texts + other.texts, np.concatenate([self.labels, other.labels]))

    def take(self, index: NDArray[np.int64]) -> LabelledTexts:
        """The texts at some positions."""
        return LabelledTexts([self.texts[i] for i in index.tolist()], self.labels[index])


@dataclass(frozen=True)
class Fold:
    """A part of a collection of texts, drawn by a hash of each text: the `part`th, from 1, of `parts`."""

    part: int = 1
    parts: int = 1

    @classmethod
    def parse(cls, text: str) -> Fold:
        """From "1/2"; anything else is an InputError."""
        match = re.fullmatch("([0-9]+)/([0-9]+)", text)
        if match is None:
            raise InputError(f"Expected a fold such as 1/2, got {text!r}.")
        fold = cls(int(match[1]), int(match[2]))
        if not 1 <= fold.part <= fold.parts:
            raise InputError(f"Fold {text!r}: the part must lie between 1 and {fold.parts}.")
        return fold

    def __contains__(self, text: object) -> bool:
        return int(hashlib.sha256(str(text).encode()).hexdigest(), 16) % self.parts == self.part - 1


def read_labelled(
    paths: Paths,
    *,
    text_field: str | None = None,
    label_field: str | None = None,
    where: Mapping[str, str] | None = None,
) -> LabelledTexts:
    """Read rows with a text and a label, 0 to 1; texts without any visible character are left out.

    Without a field's name `TEXT_FIELDS` and `LABEL_FIELDS` are tried; `where` keeps rows whose fields have these
    values, compared as text. DataError, as of the other readers: a bad file or row, or no row.
    """
    conditions = dict(where or {})

    def of_row(row: Mapping[str, Any], place: str) -> list[Scored]:
        if any(str(row.get(key)) != value for key, value in conditions.items()):
            return []
        text = _text(_field(row, (text_field,) if text_field else TEXT_FIELDS, place, "text"), place)
        label = _label(_field(row, (label_field,) if label_field else LABEL_FIELDS, place, "label"), place)
        return [(text, label)] if text.strip() else []

    return _gather(paths, of_row, f"no usable row{f' where {conditions}' if conditions else ''}")


def read_pairs(paths: Paths) -> LabelledTexts:
    """Read rows with a text in the field `toxic` (label 1) and a rewrite, or a list of them, in `neutral` (label 0)."""

    def of_row(row: Mapping[str, Any], place: str) -> list[Scored]:
        rewrites = _field(row, ("neutral",), place, "neutral rewrite")
        toxic = _text(_field(row, ("toxic",), place, "toxic text"), place)
        neutral = [_text(each, place) for each in (rewrites if isinstance(rewrites, list) else [rewrites])]
        return [(toxic, 1.0), *((text, 0.0) for text in neutral[:_REWRITES_PER_ROW])]

    return _gather(paths, of_row, "no usable row")


def read_texts(paths: Paths) -> list[str]:
    """Read every string in the fields of rows that hold texts, labelled or not, pairs included."""

    def of_row(row: Mapping[str, Any], place: str) -> list[Scored]:
        values = [row.get(name) for name in (*TEXT_FIELDS, "toxic", "neutral")]
        every = [each for value in values for each in (value if isinstance(value, list) else [value])]
        return [(each, 0.0) for each in every if isinstance(each, str)]

    return _gather(paths, of_row, "no field with text").texts


def read_scored_texts(paths: Paths, fold: Fold = Fold()) -> LabelledTexts:
    """Read prompts and continuations of RealToxicityPrompts as texts of their own, those of a fold."""

    def of_row(row: Mapping[str, Any], place: str) -> list[Scored]:
        return [part for part in scored_parts(row, place) if part is not None and part[0] in fold]

    return _gather(paths, of_row, f"no scored text (part {fold.part} of {fold.parts})")


def scored_parts(row: Mapping[str, Any], place: str) -> tuple[Scored | None, Scored | None]:
    """Prompt and continuation of a row of RealToxicityPrompts; None for what has no text or no score."""
    if "prompt" not in row:
        raise DataError(f"{place} has no field 'prompt'; expected rows of RealToxicityPrompts")
    return _part(row, "prompt", place), _part(row, "continuation", place)


def _gather(paths: Paths, of_row: Callable[[Mapping[str, Any], str], list[Scored]], nothing: str) -> LabelledTexts:
    """What a function makes of each row of some files; each file must give at least one text."""
    found: list[Scored] = []
    for path in paths:
        before = len(found)
        for line, row in read_rows(path):
            found += of_row(row, f"{path}, line {line}")
        if len(found) == before:
            raise DataError(f"{path} has {nothing}")
    return LabelledTexts.build(*zip(*found, strict=True))


def _field(row: Mapping[str, Any], names: Sequence[str], where: str, what: str) -> object:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise DataError(
        f"{where} has no {what}: expected a field {' or '.join(map(repr, names))}, found {sorted(map(str, row))}"
    )


def _label(value: object, where: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = float("nan")
    if not 0.0 <= number <= 1.0:
        raise DataError(f"{where} has the label {value!r}; expected a number from 0 (not toxic) to 1")
    return number


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} has a {type(value).__name__} where its text should be")
    return value


def _part(row: Mapping[str, Any], name: str, place: str) -> Scored | None:
    """A part in its original form, {"text": ..., "toxicity": ...}, or the flat one."""
    value: Any = row.get(name)
    toxicity: Any = row.get(f"{name}_toxicity")
    if isinstance(value, Mapping):
        toxicity, value = value.get("toxicity"), value.get("text")
    if toxicity is None or not isinstance(value, str) or not value.strip():
        return None
    if not isinstance(toxicity, int | float) or not 0.0 <= toxicity <= 1.0:
        raise DataError(f"{place} has the toxicity {toxicity!r} of its {name}; expected a number from 0 to 1")
    return value, float(toxicity)
