"""Extra training texts: sentences about groups of people, and words put into other texts.

What it is for: two things that labelled comments teach wrongly. A group's name stands mostly in toxic comments, and a
linear scorer learns it as an insult; in neutral and in hostile sentences alike, and put into texts of both kinds, it
stops telling the classes apart. Strong words that the labelled data avoid (slurs) are put into clean texts, which makes
those toxic. The sentences are our own and share no form with the Identity Phrase Templates that we test on.

Source: counterfactual data augmentation (Lu et al. 2018; Dixon et al. 2018 for toxicity).
Left out: grammar, which a bag of n-grams does not need; languages other than English.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibfuse.errors import DataError, InputError
from calibfuse.scorers.training import LabelledTexts
from calibfuse.scorers.words import identity_templates

__all__ = ["identity_sentences", "insert_words"]

_CARRIER_WORDS = 20  # longer carriers would only repeat what the training texts hold already


def identity_sentences(*, per_term: int = 12, weight: float = 1.0, seed: int = 0) -> LabelledTexts:
    """Make neutral (label 0) and, in the same number, hostile sentences (label 1) for every name of a group.

    Args:
        per_term: sentences of each kind per name, drawn with replacement; at least 1.
        weight: weight of each sentence in the loss.
        seed: of the draw.

    Raises:
        InputError: `per_term` below 1.
    """
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
    return LabelledTexts.build(texts, labels, weight)


def insert_words(
    words: Sequence[str],
    carriers: LabelledTexts,
    *,
    per_word: int,
    label: float | None = None,
    weight: float = 1.0,
    seed: int = 0,
) -> LabelledTexts:
    """Put each word into `per_word` random texts at random places.

    Args:
        words: what is put in; may be several words each.
        carriers: texts to put them into. With `label` None, half of the draws go to texts labelled above 0.5.
        per_word: texts per word, at least 1.
        label: label of the results; None keeps the carriers' own.
        weight: weight of each result in the loss.
        seed: of the draws.

    Raises:
        DataError: no carriers, or, with `label` None, carriers of one class only.
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
    return LabelledTexts.build(texts, labels, weight)
