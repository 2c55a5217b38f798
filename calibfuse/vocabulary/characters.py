"""Many strings as one array of code points, with the few edits that turn token strings into text, vectorised.

A loop over 200,000 tokens costs more than everything else; numpy does the same in milliseconds. The strings are not
bounded by separators, so any character may occur in them, lone surrogates included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Characters:
    """The characters of many strings, one after the other.

    Attributes:
        code_points: uint32 [total_characters].
        lengths: int64 [count], characters of each string; their sum is total_characters.
    """

    code_points: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def of(cls, strings: Sequence[str]) -> "Characters":
        """The characters of the given strings."""
        joined = "".join(strings).encode("utf-32-le", "surrogatepass")
        lengths = np.fromiter(map(len, strings), dtype=np.int64, count=len(strings))
        return cls(np.frombuffer(joined, dtype="<u4").astype(np.uint32, copy=False), lengths)

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 [count + 1]; string i is code_points[offsets[i]:offsets[i + 1]]."""
        offsets = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        return offsets

    @cached_property
    def filled(self) -> int:
        """Number of strings that are not empty."""
        return int(np.count_nonzero(self.lengths))

    def starting_with(self, text: str) -> npt.NDArray[np.bool_]:
        """Whether each string starts with `text`; bool [count]."""
        return self._holding(text, self.offsets[:-1])

    def ending_with(self, text: str) -> npt.NDArray[np.bool_]:
        """Whether each string ends with `text`; bool [count]."""
        return self._holding(text, self.offsets[1:] - len(text))

    def _holding(self, text: str, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        found = self.lengths >= len(text)
        candidates = np.flatnonzero(found)
        for rank, character in enumerate(text):
            matches = self.code_points[positions[candidates] + rank] == ord(character)
            found[candidates[~matches]] = False
            candidates = candidates[matches]
        return found

    def holding(self, flagged: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Whether each string holds a flagged character (bool [total_characters]); bool [count]."""
        flags_before = np.zeros(len(flagged) + 1, dtype=np.int64)
        np.cumsum(flagged, out=flags_before[1:])
        return np.diff(flags_before[self.offsets]) > 0

    def without_strings(self, indices: Sequence[int]) -> "Characters":
        """The same with the given strings emptied."""
        emptied = np.zeros(len(self.lengths), dtype=np.bool_)
        emptied[list(indices)] = True
        kept = self.code_points[~np.repeat(emptied, self.lengths)]
        return Characters(kept, np.where(emptied, 0, self.lengths))

    def with_character_replaced(self, character: str, replacement: str) -> "Characters":
        """The same with one character replaced by another everywhere."""
        hit = self.code_points == ord(character)
        return Characters(np.where(hit, np.uint32(ord(replacement)), self.code_points), self.lengths)

    def with_endings_replaced(self, suffix: str, replacement: str) -> "Characters":
        """The same with `suffix`, at the end of a string, replaced by a single character."""
        hit = self.ending_with(suffix)
        starts = self.offsets[1:][hit] - len(suffix)
        code_points = self.code_points.copy()
        code_points[starts] = ord(replacement)
        dropped = np.zeros(len(code_points), dtype=np.bool_)
        for rank in range(1, len(suffix)):
            dropped[starts + rank] = True
        return Characters(code_points[~dropped], self.lengths - (len(suffix) - 1) * hit)

    def with_words_marked(self, prefix: str, stands_without_space: Callable[[str], bool]) -> "Characters":
        """The same with `prefix` dropped where it starts a longer string, and a space put before the other strings.

        Args:
            prefix: marks a piece inside a word.
            stands_without_space: says of the first character of a string that no space belongs before it.
        """
        continued = self.starting_with(prefix) & (self.lengths > len(prefix))
        words = np.flatnonzero(~continued & (self.lengths > 0))
        first, inverse = np.unique(self.code_points[self.offsets[words]], return_inverse=True)
        spaced = words[~np.array([stands_without_space(chr(code)) for code in first], dtype=np.bool_)[inverse]]
        dropped = np.zeros(len(self.code_points), dtype=np.bool_)
        for rank in range(len(prefix)):
            dropped[self.offsets[:-1][continued] + rank] = True
        lengths = self.lengths - len(prefix) * continued
        position = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=position[1:])
        lengths[spaced] += 1
        return Characters(np.insert(self.code_points[~dropped], position[spaced], np.uint32(ord(" "))), lengths)

    def to_utf8(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """All strings as UTF-8: bytes one after the other (uint8 [total_bytes]), bytes of each (int64 [count])."""
        text = self.code_points.astype("<u4", copy=False).tobytes().decode("utf-32-le")
        sizes = np.ones(len(self.code_points) + 1, dtype=np.int64)
        for first_longer in (0x80, 0x800, 0x10000):
            sizes[1:] += self.code_points >= first_longer
        sizes[0] = 0
        ends = np.cumsum(sizes)[self.offsets]
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8), np.diff(ends)
