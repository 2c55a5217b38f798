"""Read labelled texts: .jsonl and .csv rows with a label, or with a toxic text and its neutral rewrites.

Plain or compressed (.gz, .xz). Whatever is wrong with a file gives one sentence with its name and line.
Left out: text without labels (`calibfuse.textfiles` streams it), data sets of the Hub.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from calibfuse.errors import DataError
from calibfuse.scorers.training import LabelledTexts
from calibfuse.textfiles import read_rows

__all__ = ["LABEL_FIELDS", "TEXT_FIELDS", "read_labelled", "read_pairs", "read_texts"]

TEXT_FIELDS = ("text", "comment_text", "comment", "content", "sentence")
"""Fields in which a row's text is looked for, in this order, when none is given."""
LABEL_FIELDS = ("toxic", "toxicity", "toxic_fraction", "label", "target")
"""Fields in which a row's label is looked for, in this order, when none is given."""


def _field(row: Mapping[str, Any], names: Sequence[str], where: str, what: str) -> object:
    """Return the first of the fields that a row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise DataError(
        f"{where} has no {what}: expected a field {' or '.join(map(repr, names))}, found {sorted(map(str, row))}"
    )


def _label(value: object, where: str) -> float:
    """Turn a label into toxicity in [0, 1]."""
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


def read_labelled(
    paths: Sequence[str | os.PathLike[str]],
    *,
    text_field: str | None = None,
    label_field: str | None = None,
    where: Mapping[str, str] | None = None,
    weight: float = 1.0,
) -> LabelledTexts:
    """Read rows with a text and a label.

    Args:
        paths: .jsonl or .csv files, plain or compressed.
        text_field: field of the text; None tries `TEXT_FIELDS`.
        label_field: field of the label, 0 to 1; None tries `LABEL_FIELDS`.
        where: only rows whose fields have these values, compared as text, e.g. {"split": "train"}.
        weight: weight of each text in the loss.

    Returns:
        The texts, those without any visible character left out.

    Raises:
        DataError: a file that cannot be used, a row without text or label, or no row at all.
    """
    texts: list[str] = []
    labels: list[float] = []
    for path in paths:
        before = len(texts)
        for line, row in read_rows(path):
            place = f"{path}, line {line}"
            if any(str(row.get(key)) != value for key, value in (where or {}).items()):
                continue
            text = _text(_field(row, (text_field,) if text_field else TEXT_FIELDS, place, "text"), place)
            label = _label(_field(row, (label_field,) if label_field else LABEL_FIELDS, place, "label"), place)
            if text.strip():
                texts.append(text)
                labels.append(label)
        if len(texts) == before:
            raise DataError(f"{path} has no usable row{f' where {dict(where)}' if where else ''}")
    return LabelledTexts.build(texts, labels, weight)


def read_pairs(
    paths: Sequence[str | os.PathLike[str]],
    *,
    toxic_field: str = "toxic",
    neutral_field: str = "neutral",
    neutral_limit: int = 2,
    weight: float = 1.0,
) -> LabelledTexts:
    """Read rows with a toxic text and one or several neutral rewrites of it.

    Args:
        paths: .jsonl or .csv files, plain or compressed.
        toxic_field: field of the toxic text.
        neutral_field: field of its rewrite, or of a list of rewrites.
        neutral_limit: rewrites taken of each row at most, so that both classes stay of similar size.
        weight: weight of each text in the loss.

    Returns:
        The texts, toxic ones labelled 1 and rewrites 0.

    Raises:
        DataError: a file that cannot be used, a row without one of the fields, or no row at all.
    """
    texts: list[str] = []
    labels: list[float] = []
    for path in paths:
        before = len(texts)
        for line, row in read_rows(path):
            place = f"{path}, line {line}"
            toxic = _text(_field(row, (toxic_field,), place, "toxic text"), place)
            rewrites = _field(row, (neutral_field,), place, "neutral rewrite")
            neutral = [_text(value, place) for value in (rewrites if isinstance(rewrites, list) else [rewrites])]
            texts += [toxic, *neutral[:neutral_limit]]
            labels += [1.0] + [0.0] * len(neutral[:neutral_limit])
        if len(texts) == before:
            raise DataError(f"{path} has no usable row")
    return LabelledTexts.build(texts, labels, weight)


def read_texts(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Read every text of rows, labelled or not, pairs included.

    Args:
        paths: .jsonl or .csv files, plain or compressed.

    Returns:
        All strings in the fields that hold texts.

    Raises:
        DataError: a file that cannot be used, or one without any text.
    """
    texts: list[str] = []
    for path in paths:
        before = len(texts)
        for _, row in read_rows(path):
            for name in (*TEXT_FIELDS, "toxic", "neutral"):
                value = row.get(name)
                texts += [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if len(texts) == before:
            raise DataError(f"{path} has no field with text")
    return texts
