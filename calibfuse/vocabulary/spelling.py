"""Masked spellings: which word "f**k", "sh!t", "fvck" or "f u c k" stands for.

Left out: letters left out or swapped ("fck", "fcuk"), which are other words to these rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["WordUnmasker", "masked_patterns"]

MASK_SIGNS = "*#%&^_-+.?~'"
"""Signs that hide a letter, or stand beside one that does; letters may stand on both sides of them."""
LETTERS_OF_SIGN = {"0": "o", "1": "il", "3": "e", "4": "a", "5": "s", "7": "t", "!": "i", "@": "a", "$": "s", "|": "il"}
"""Signs that stand for a letter by their looks."""

_SPLIT = re.compile(r"[^\W_](?:[\s._*\-]+[^\W_])+")  # "f u c k", "f.u.c.k"
_RUNS = re.compile(rf"[{re.escape(MASK_SIGNS)}]{{2,}}|.", re.DOTALL)
_FEWEST_SHOWN = 2  # letters that must be seen where the number of signs is not the number of letters
_LONGER_BY = 4  # letters that a run of signs may hide beyond its own length


class WordUnmasker:
    """Finds the word that a masked spelling stands for; of several (lower case) that it fits, the first is taken."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = tuple(dict.fromkeys(words))
        self._known = frozenset(self._words)
        self._by_first: dict[str, list[str]] = {}
        for word in self._words:
            self._by_first.setdefault(word[0], []).append(word)
        self._found: dict[str, str | None] = {}

    def __call__(self, spelling: str) -> str | None:
        """The word that a spelling stands for; None where it hides nothing or fits no word.

        Example:
            >>> unmask = WordUnmasker(["damn", "darned"])
            >>> [unmask(each) for each in ("d*mn", "D@mn", "d a m n", "d***ed", "damn", "d*r")]
            ['damn', 'damn', 'damn', 'darned', None, None]
        """
        if spelling not in self._found:
            if len(self._found) > 100_000:
                self._found.clear()
            self._found[spelling] = self._find(spelling.lower())
        return self._found[spelling]

    def _find(self, spelling: str) -> str | None:
        if spelling in self._known:
            return None
        if _SPLIT.fullmatch(spelling):
            joined = re.sub(r"[\s._*\-]+", "", spelling)
            if joined in self._known:
                return joined
        shown = [char for char in spelling if char.isalpha()]
        if not shown or len(shown) == len(spelling) and "v" not in spelling:
            return None
        first = LETTERS_OF_SIGN.get(spelling[0], spelling[0])
        candidates = [word for letter in first for word in self._by_first.get(letter, ())]
        exact, loose = masked_patterns(spelling)
        for word in candidates:
            if exact.fullmatch(word):
                return word
        if len(shown) < _FEWEST_SHOWN or not spelling[-1].isalnum():
            return None
        return next((word for word in candidates if loose.fullmatch(word)), None)


def masked_patterns(spelling: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of the words that a spelling stands for: a letter for each sign, and any number for a run of signs."""
    exact = re.compile("".join(map(_letter_pattern, spelling)))
    return exact, re.compile("".join(map(_loose_pattern, _RUNS.findall(spelling))))


def _letter_pattern(char: str) -> str:
    if char == "v":
        return "[uv]"
    if char in "@!":  # beside their looks, both are written for any vowel
        return "[aeiou]"
    if char in LETTERS_OF_SIGN:
        return f"[{LETTERS_OF_SIGN[char]}]"
    return "[a-z]" if char in MASK_SIGNS else re.escape(char)


def _loose_pattern(part: str) -> str:
    return _letter_pattern(part) if len(part) == 1 else f"[a-z]{{1,{len(part) + _LONGER_BY}}}"
