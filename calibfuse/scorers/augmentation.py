"""Extra training texts made by putting words into other texts.

What it is for: two things that labelled comments teach wrongly. A group's name stands mostly in toxic comments; put
into texts of both kinds, at the label they have, it stops telling them apart. Strong words that the labelled data
avoid (slurs) are put into clean texts, which makes those toxic.

Source: counterfactual data augmentation (Lu et al. 2018; Dixon et al. 2018 for toxicity).
Left out: grammar; a bag of n-grams does not need it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibfuse.errors import DataError
from calibfuse.scorers.training import LabelledTexts

__all__ = ["insert_words"]

_CARRIER_WORDS = 20  # longer carriers would only repeat what the training texts hold already


def insert_words(
    words: Sequence[str],
    carriers: LabelledTexts,
    *,
    per_word: int,
    label: float | None = None,
    weight: float = 1.0,
    seed: int = 0,
) -> LabelledTexts:
    """Put each word into random texts at random places.

    Args:
        words: what is put in; may be several words each.
        carriers: texts to put them into. With `label` None, half of the draws go to texts labelled above 0.5.
        per_word: texts per word, at least 1.
        label: label of the results; None keeps the carriers' own.
        weight: weight of each result in the loss.
        seed: of the draws.

    Returns:
        `len(words) * per_word` texts of about 20 words.

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
