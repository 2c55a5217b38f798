"""Offending words masked for the screen: the first letter stays, so that a reader still sees what was said.

Words are masked that the scorer finds toxic when they stand alone, and those on the bundled list of strong words.
Left out: insults made of harmless words; this is no filter.
"""

from __future__ import annotations

from functools import cache

from calibfuse.errors import InputError
from calibfuse.scorers.linear import LinearScorer
from calibfuse.scorers.plain_words import split_words
from calibfuse.scorers.words import strong_words

_STEMS = (b"fuck", b"faggot", b"bitch")  # unmistakable wherever they stand in a word
_BEGINNINGS = (b"nigger", b"nigga", b"shitt", b"retarded")  # ... and these at its beginning ("snigger" is harmless)


@cache
def _plain_strong_words() -> frozenset[bytes]:
    words = split_words(strong_words())
    return frozenset(words.word(i) for i in range(len(words)))


def _is_strong(word: bytes) -> bool:
    return word in _plain_strong_words() or any(stem in word for stem in _STEMS) or word.startswith(_BEGINNINGS)


def mask_offensive(text: str, scorer: LinearScorer, *, threshold: float = 0.85) -> str:
    """Replace the letters of offending words by stars, all but the first and, in words of four and more, the last.

    Words that score at least `threshold` alone are masked; the text keeps its length. InputError: a threshold outside
    [0, 1].
    """
    if not 0.0 <= threshold <= 1.0:
        raise InputError(f"The threshold of masking must lie in [0, 1], got {threshold}")
    words = scorer.word_scores(text)
    stream = split_words([text]) if words else None
    characters = list(text)
    for index, word in enumerate(words):
        if word.score >= threshold or (stream is not None and _is_strong(stream.word(index))):
            letters = [i for i in range(word.start, word.end) if not characters[i].isspace()]
            for i in letters[1:-1] if len(letters) >= 4 else letters[1:]:
                characters[i] = "*"
    return "".join(characters)
