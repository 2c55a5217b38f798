"""Masked and split spellings of lowered words ("f**k", "sh!t", "f u c k") in a text that grows token by token.

The rule of vocabulary/spelling.py, for words of four letters and more that begin and end with a letter: "f***" and
"$hit" look like markup, footnotes and prices.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from calibfuse.vocabulary import Vocabulary
from calibfuse.vocabulary.spelling import masked_patterns

LEAST_ADDED = 0.1  # nats; a completion that adds less is none: "fuck" + "ing" after what "fuck" has cost
SIGNS = frozenset(b"*#%&^'!@$|013457-")
SEPARATORS = frozenset(b" ._*-")

_LEAST_LETTERS = 4  # of a word; products ("c*m") and initials ("A S S") look like shorter ones
_LEAST_SHOWN = 3  # letters that must be seen where the number of signs is not the number of letters
_KNOWN = 10_000  # spellings that are remembered
_MASKED = re.compile(rb"(?<![a-z0-9*#%&^!@$|-])[a-z][a-z*#%&^'!@$|013457-]*\Z")
_SPLIT = re.compile(rb"(?<![a-z0-9'])(?:[a-z][ ._*-]){2,}[a-z][ ._*-]?\Z")
# The apostrophe of "don't", but not of "f*'ing", and a dash between words, but not in "f--k".
_PUNCTUATION = re.compile(r"(?<![*#%&^])'|(?<=[a-z][a-z])--")
_TOKEN = re.compile(rb"[a-z*#%&^!@$|013457-]*[*#%&^!@$|013457-]([a-z]+)(?![a-z])")  # the end of a word, with signs
_IS_SIGN = np.isin(np.arange(256), list(SIGNS))


def masked_variants(shifts: Mapping[str, float]) -> dict[str, float]:
    """Spellings of lowered words that are letters alone, "v" for "u", with their shifts."""
    return {
        word[:at] + "v" + word[at + 1 :]: shift
        for word, shift in shifts.items()
        if shift < 0.0 and len(word) >= _LEAST_LETTERS
        for at, letter in enumerate(word)
        if letter == "u"
    }


class MaskedWords:
    """What tokens add that complete a disguised word.

    `spaced` and `bare`: ends of words -> tokens whose first letters they are, behind a space and without one.
    """

    def __init__(
        self,
        shifts: Mapping[bytes, float],
        spaced: Mapping[bytes, Sequence[int]],
        bare: Mapping[bytes, Sequence[int]],
        vocabulary: Vocabulary,
    ) -> None:
        self._spaced, self._bare = ({end.decode(): ids for end, ids in each.items()} for each in (spaced, bare))
        self._shifts = {word.decode(): shift for word, shift in shifts.items()}
        self._words = [word for word, shift in self._shifts.items() if shift < 0.0 and len(word) >= _LEAST_LETTERS]
        self._by_first: dict[str, list[str]] = defaultdict(list)
        self._by_beginning: dict[str, list[str]] = defaultdict(list)  # all letters but the last
        for word in self._words:
            self._by_first[word[0]].append(word)
            self._by_beginning[word[:-1]].append(word)
        self._signed = self._tokens_with_signs(vocabulary)
        self._known: dict[tuple[str | None, str | None], dict[int, float]] = {}

    def _tokens_with_signs(self, vocabulary: Vocabulary) -> dict[str, list[int]]:
        """Ends of words, without their first letter -> tokens that spell them with signs: "it" -> "!t"."""
        by_letters: dict[str, set[str]] = defaultdict(set)  # the last letters of an end -> the end
        for end in {word[cut:] for word in self._words for cut in range(1, len(word))}:
            for start in range(len(end)):
                by_letters[end[start:]].add(end)
        signs = np.append(0, np.cumsum(_IS_SIGN[vocabulary.data]))[vocabulary.offsets]
        found: dict[str, list[int]] = defaultdict(list)
        for token in np.flatnonzero((np.diff(signs) > 0) & ~vocabulary.is_special).tolist():
            match = _TOKEN.match(vocabulary.token_bytes(token).lower())
            ends = by_letters.get(match[1].decode()) if match else None
            if match and ends:
                exact, _ = masked_patterns(match[0].decode())
                for end in filter(exact.fullmatch, ends):
                    found[end].append(token)
        return found

    def openings(self) -> Iterator[tuple[bytes, int, float]]:
        """(letters before, token, shift) of tokens with signs that complete a word whose beginning is plain."""
        best: dict[tuple[bytes, int], float] = {}
        for word in self._words:
            for cut in range(1, len(word)):
                for token, shift in self._completing(word, cut, cut, self._signed):
                    key = (word[:cut].encode(), token)
                    best[key] = min(shift, best.get(key, 0.0))
        return ((letters, token, shift) for (letters, token), shift in best.items())

    def after(self, text: bytes) -> dict[int, float]:
        """Tokens that complete a disguised word at the end of a text in lower case, and what they are given."""
        masked, split = (match and match[0].decode() for match in (_MASKED.search(text), _SPLIT.search(text)))
        if masked and (masked.isalpha() or _PUNCTUATION.search(masked)):
            masked = None
        if not masked and not split:
            return {}
        found = self._known.get((masked, split))
        if found is None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            found = self._known[masked, split] = {}
            for token, shift in (*self._masked(masked or ""), *self._split(split or "")):
                found[token] = min(shift, found.get(token, 0.0))
        return found

    def _masked(self, spelling: str) -> Iterator[tuple[int, float]]:
        if not spelling:
            return
        exact, loose = masked_patterns(spelling)
        seen = sum(map(str.isalpha, spelling))
        for word in self._by_first.get(spelling[:1], ()):
            for cut in range(1, len(word)):
                fits = exact.fullmatch(word, 0, cut)
                if not fits and "--" not in spelling and seen + len(word) - cut >= _LEAST_SHOWN:
                    fits = loose.fullmatch(word, 0, cut)
                if fits:
                    begun = cut if spelling[-1].isalpha() and cut >= _LEAST_LETTERS else 0
                    yield from self._completing(word, cut, begun, self._bare, self._signed)

    def _split(self, spelling: str) -> Iterator[tuple[int, float]]:
        if not spelling:
            return
        letters = "".join(filter(str.isalpha, spelling))
        if not spelling[-1:].isalpha():
            table = self._bare
        elif spelling[-2] == " ":
            table = self._spaced
        else:
            return  # after "f.u.c" a point comes first
        for start in range(len(letters) - _LEAST_LETTERS + 2):
            for word in self._by_beginning.get(letters[start:], ()):
                begun = len(word) - 1 if len(word) > _LEAST_LETTERS else 0
                yield from self._completing(word, len(word) - 1, begun, table)

    def _completing(
        self, word: str, cut: int, begun: int, *tables: Mapping[str, Sequence[int]]
    ) -> Iterator[tuple[int, float]]:
        """The tokens that are the end of a word, less what its first `begun` letters have cost already."""
        added = self._shifts[word] - min(0.0, self._shifts.get(word[:begun], 0.0))
        if added <= -LEAST_ADDED:
            yield from ((token, added) for table in tables for token in table.get(word[cut:], ()))
