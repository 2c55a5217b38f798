"""From files to the training texts of a linear scorer: read, leave out repeats, add what labelled data teach wrongly.

A group's name stands mostly in toxic comments, and a linear scorer learns it as an insult; in neutral and in hostile
sentences alike, and put into texts of both kinds, it stops telling the classes apart (counterfactual data augmentation,
Lu et al. 2018; Dixon et al. 2018). The sentences share no form with the Identity Phrase Templates of the tests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibfuse.errors import DataError, InputError
from calibfuse.scorers.labelled_files import (
    Fold,
    LabelledTexts,
    read_labelled,
    read_pairs,
    read_scored_texts,
    read_texts,
)
from calibfuse.scorers.linear import FeatureConfig, NgramHasher
from calibfuse.scorers.plain_words import WordStream, split_words
from calibfuse.scorers.words import ambiguous_words, identity_templates, identity_terms, strong_words

_SENTENCES_PER_TERM = 12
_INSERTIONS_PER_TERM = 20
_INSERTIONS_PER_STRONG_WORD = 30
_CARRIER_WORDS = 20  # longer carriers would only repeat what the training texts hold already
_RUN = 8  # words of a passage that counts as a copy; shorter texts are looked for as a whole
_SHORTEST = 4  # words; anything shorter is common speech, not a copy


@dataclass(frozen=True, kw_only=True)
class ScorerData:
    """What a linear scorer learns from."""

    data: Sequence[str | os.PathLike[str]] = ()  # rows with a text and its toxicity, 0 to 1
    pairs: Sequence[str | os.PathLike[str]] = ()  # rows with "toxic" texts and "neutral" rewrites
    realtoxicityprompts: Sequence[str | os.PathLike[str]] = ()  # prompts and continuations with Perspective's scores
    fold: Fold = Fold()  # part of the texts of `realtoxicityprompts`
    exclude: Sequence[str | os.PathLike[str]] = ()  # drop texts that repeat these texts
    background: Sequence[str] = ()  # texts that count as not toxic
    text_field: str | None = None  # key or column of the text in `data` (default: found by name)
    label_field: str | None = None  # of the toxicity in `data` (default: found by name)
    where: Mapping[str, str] = field(default_factory=dict)  # only such rows of `data`
    distrust_lowercase: bool = False  # leave out texts of `data` labelled clean without a capital letter
    identity_terms: bool = False  # make names of groups of people neutral
    ambiguous_words: bool = False  # let the context of words such as screw decide
    strong_words: bool = False  # teach the bundled list of swear words and slurs
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
        fields = {"text_field": source.text_field, "label_field": source.label_field}
        read = read_labelled(source.data, **fields, where=source.where)
        parts.append(_without_lowercase_clean(read) if source.distrust_lowercase else read)
    if source.realtoxicityprompts:
        parts.append(read_scored_texts(source.realtoxicityprompts, source.fold))
    if source.pairs:
        parts.append(read_pairs(source.pairs))
    if not parts:
        raise DataError("A scorer needs labelled texts: files with labels or pairs")
    labelled = sum(parts[1:], parts[0])
    n_excluded = 0
    if source.exclude:
        repeats = overlapping_texts(labelled.texts, read_texts(source.exclude))
        n_excluded = int(repeats.sum())
        labelled = labelled.take(np.flatnonzero(~repeats))
        if not len(labelled):
            raise DataError("Every training text repeats a text of the excluded files; nothing is left to learn from")
    if source.background:
        labelled = labelled + LabelledTexts.build(source.background, [0.0] * len(source.background))
    files = {"data": source.data, "pairs": source.pairs, "realtoxicityprompts": source.realtoxicityprompts}
    switches = ("distrust_lowercase", "identity_terms", "ambiguous_words", "strong_words")
    facts = {
        **{name: [Path(each).name for each in paths] for name, paths in (files | {"excluded": source.exclude}).items()},
        "where": dict(source.where),
        "fold": f"{source.fold.part}/{source.fold.parts}",
        **{name: getattr(source, name) for name in switches},
    }
    return GatheredTexts(labelled, n_excluded, facts)


def _without_lowercase_clean(labelled: LabelledTexts) -> LabelledTexts:
    """Leave out texts labelled clean without a capital letter: machine-rewritten copies, whose label is often wrong.

    The features ignore case, so leaving out one kind of case teaches nothing about it.
    """
    trusted = [label > 0.5 or text != text.lower() for text, label in zip(labelled.texts, labelled.labels, strict=True)]
    return labelled.take(np.flatnonzero(trusted))


def added_texts(source: ScorerData, carriers: LabelledTexts) -> LabelledTexts | None:
    """Make the added texts that were asked for out of training texts; None without any."""
    seed, parts = source.seed, []
    if source.identity_terms:
        parts.append(identity_sentences(per_term=_SENTENCES_PER_TERM, seed=seed))
        parts.append(insert_words(identity_terms(), carriers, per_word=_INSERTIONS_PER_TERM, seed=seed))
    if source.ambiguous_words:
        parts.append(insert_words(ambiguous_words(), carriers, per_word=_INSERTIONS_PER_TERM, seed=seed + 2))
    if source.strong_words:
        count = _INSERTIONS_PER_STRONG_WORD
        parts.append(insert_words(strong_words(), carriers, per_word=count, label=1.0, seed=seed + 1))
    return sum(parts[1:], parts[0]) if parts else None


def identity_sentences(*, per_term: int = 12, seed: int = 0) -> LabelledTexts:
    """Make neutral (label 0) and as many hostile sentences (label 1), `per_term` each, for every name of a group."""
    if per_term < 1:
        raise InputError(f"per_term must be at least 1, got {per_term}")
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    labels: list[float] = []
    for terms, templates in identity_templates():
        for term in terms:
            for tone, label in (("neutral", 0.0), ("hostile", 1.0)):
                drawn = rng.integers(len(templates[tone]), size=per_term).tolist()
                texts += [templates[tone][choice].format(term=term) for choice in drawn]
                labels += [label] * per_term
    return LabelledTexts.build(texts, labels)


def insert_words(
    words: Sequence[str], carriers: LabelledTexts, *, per_word: int, label: float | None = None, seed: int = 0
) -> LabelledTexts:
    """Put each word into `per_word` random texts at random places; they keep the carriers' labels, or take `label`.

    Without `label`, half of the draws go to texts labelled above 0.5. DataError: no carriers, or of one class only.
    """
    rng = np.random.default_rng(seed)
    toxic = np.flatnonzero(carriers.labels > 0.5)
    clean = np.flatnonzero(carriers.labels < 0.2)
    if not len(clean) or (label is None and not len(toxic)):
        raise DataError(f"Words need carriers of both classes; got {len(toxic)} toxic and {len(clean)} clean texts")
    texts: list[str] = []
    labels: list[float] = []
    for word in words:
        for i in range(per_word):
            pool = toxic if label is None and i % 2 else clean
            index = int(pool[rng.integers(len(pool))])
            carrier = carriers.texts[index].split()
            if pool is clean:
                start = int(rng.integers(max(1, len(carrier) - _CARRIER_WORDS + 1)))
                carrier = carrier[start : start + _CARRIER_WORDS]  # any part of a clean text is clean
            place = int(rng.integers(len(carrier) + 1))
            texts.append(" ".join([*carrier[:place], word, *carrier[place:]]))
            labels.append(float(carriers.labels[index]) if label is None else label)
    return LabelledTexts.build(texts, labels)


def overlapping_texts(texts: Sequence[str], others: Sequence[str]) -> NDArray[np.bool_]:
    """Say which texts share a passage with other texts, bool [texts]; data sets should be disjoint.

    A passage is eight neighbouring words, or all words of a text of four to seven, whatever their case and punctuation.

    Example:
        >>> overlapping_texts(["We met, by the river!", "something else"], ["Yesterday we met by the river."]).tolist()
        [True, False]
    """
    stream, other_stream = split_words(texts), split_words(others)
    result = np.zeros(len(texts), dtype=np.bool_)
    n_words = np.bincount(stream.text_index, minlength=len(texts))
    for length in range(_SHORTEST, _RUN + 1):
        wanted = n_words >= _RUN if length == _RUN else n_words == length
        if not wanted.any() or not len(other_stream):
            continue
        runs, exists = _run_hashes(stream, length)
        known, known_exists = _run_hashes(other_stream, length)
        chosen = exists & wanted[stream.text_index]
        hits = np.isin(runs[chosen], known[known_exists])
        result[stream.text_index[chosen][hits]] = True
    return result


def _run_hashes(stream: WordStream, length: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """A hash of the run of `length` words from each word on, uint64 [words], and where such a run exists."""
    words = NgramHasher(FeatureConfig()).word_states(stream).astype(np.uint64)
    mixed = np.zeros(len(words), dtype=np.uint64)
    for i in range(length):
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed[: len(words) - i] ^= words[i:]
        mixed ^= mixed >> np.uint64(29)
    exists = np.zeros(len(words), dtype=np.bool_)
    last = len(words) - length + 1
    if last > 0:
        exists[:last] = stream.text_index[:last] == stream.text_index[length - 1 :]
    return mixed, exists
