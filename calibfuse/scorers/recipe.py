"""From files to the training texts of a linear scorer: read, exclude overlaps, add what labelled data teach wrongly.

Left out: reading text without labels, which the caller brings along.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from calibfuse.errors import DataError
from calibfuse.scorers.augmentation import identity_sentences, insert_words
from calibfuse.scorers.labelled_files import Fold, read_labelled, read_pairs, read_scored_texts, read_texts
from calibfuse.scorers.overlap import overlapping_texts
from calibfuse.scorers.training import LabelledTexts
from calibfuse.scorers.words import ADJECTIVES, PLURALS, ambiguous_words, strong_words

__all__ = ["GatheredTexts", "ScorerData", "added_texts", "gather"]

_IDENTITY_WEIGHT = 1.0  # of an added sentence about a group, against 1 for a labelled text
_SENTENCES_PER_TERM = 12
_INSERTIONS_PER_TERM = 20
_INSERTIONS_PER_STRONG_WORD = 30


@dataclass(frozen=True, kw_only=True)
class ScorerData:
    """What a linear scorer learns from."""

    data: Sequence[str | os.PathLike[str]] = ()  # files of rows with text and label
    pairs: Sequence[str | os.PathLike[str]] = ()  # files of rows with a toxic text and neutral rewrites
    realtoxicityprompts: Sequence[str | os.PathLike[str]] = ()  # files of prompts and continuations with scores
    fold: Fold = Fold()  # part of the texts of `realtoxicityprompts`
    exclude: Sequence[str | os.PathLike[str]] = ()  # files whose texts must not be learned from
    background: Sequence[str] = ()  # texts that count as not toxic
    text_field: str | None = None  # of `data`; None: found by name
    label_field: str | None = None  # of `data`; None: found by name
    where: Mapping[str, str] = field(default_factory=dict)  # only such rows of `data`
    distrust_lowercase: bool = False  # leave out texts of `data` labelled clean that have no capital letter
    identity_terms: bool = False  # add texts that make names of groups neutral
    ambiguous_words: bool = False  # add texts that let the context of an ambiguous word decide
    strong_words: bool = False  # add texts that teach the bundled list
    seed: int = 0  # of the draws


@dataclass(frozen=True, eq=False)
class GatheredTexts:
    """Training texts, and what there is to tell about them."""

    labelled: LabelledTexts
    n_excluded: int
    facts: dict[str, Any]


def gather(source: ScorerData) -> GatheredTexts:
    """Read the training texts; DataError for a file that cannot be used, or when nothing is left to learn from."""
    parts = []
    if source.data:
        read = read_labelled(
            source.data, text_field=source.text_field, label_field=source.label_field, where=source.where
        )
        parts.append(_without_lowercase_clean(read) if source.distrust_lowercase else read)
    if source.realtoxicityprompts:
        parts.append(read_scored_texts(source.realtoxicityprompts, source.fold))
    if source.pairs:
        parts.append(read_pairs(source.pairs))
    if not parts:
        raise DataError("A scorer needs labelled texts: files with labels or pairs")
    labelled = sum(parts[1:], parts[0])
    n_before = len(labelled)
    if source.exclude:
        repeats = overlapping_texts(labelled.texts, read_texts(source.exclude))
        labelled = labelled.take(np.flatnonzero(~repeats))
        if not len(labelled):
            raise DataError("Every training text repeats a text of the excluded files; nothing is left to learn from")
    if source.background:
        labelled = labelled + LabelledTexts.build(source.background, [0.0] * len(source.background))
    facts = {
        "data": [Path(path).name for path in source.data],
        "pairs": [Path(path).name for path in source.pairs],
        "where": dict(source.where),
        "realtoxicityprompts": [Path(path).name for path in source.realtoxicityprompts],
        "fold": f"{source.fold.part}/{source.fold.parts}",
        "excluded": [Path(path).name for path in source.exclude],
        "distrust_lowercase": source.distrust_lowercase,
        "identity_terms": source.identity_terms,
        "ambiguous_words": source.ambiguous_words,
        "strong_words": source.strong_words,
    }
    return GatheredTexts(labelled, n_before - len(labelled) + len(source.background), facts)


def _without_lowercase_clean(labelled: LabelledTexts) -> LabelledTexts:
    """Leave out texts labelled clean that have no capital letter.

    Some collections were enlarged by machine-rewritten copies, all in lower case, whose "not toxic" is often wrong.
    The features ignore case, so leaving out one kind of case teaches nothing about it.
    """
    trusted = [label > 0.5 or text != text.lower() for text, label in zip(labelled.texts, labelled.labels, strict=True)]
    return labelled.take(np.flatnonzero(trusted))


def added_texts(source: ScorerData, carriers: LabelledTexts) -> LabelledTexts | None:
    """Make the added texts that were asked for out of training texts; None without any."""
    parts = []
    if source.identity_terms:
        parts.append(identity_sentences(per_term=_SENTENCES_PER_TERM, weight=_IDENTITY_WEIGHT, seed=source.seed))
        terms = (*ADJECTIVES, *PLURALS)
        parts.append(
            insert_words(terms, carriers, per_word=_INSERTIONS_PER_TERM, weight=_IDENTITY_WEIGHT, seed=source.seed)
        )
    if source.ambiguous_words:
        parts.append(insert_words(ambiguous_words(), carriers, per_word=_INSERTIONS_PER_TERM, seed=source.seed + 2))
    if source.strong_words:
        parts.append(
            insert_words(
                strong_words(), carriers, per_word=_INSERTIONS_PER_STRONG_WORD, label=1.0, seed=source.seed + 1
            )
        )
    if not parts:
        return None
    return sum(parts[1:], parts[0])
