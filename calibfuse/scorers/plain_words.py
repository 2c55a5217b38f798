"""The words of whole batches of text in plain form: lower case, disguises such as "sh1t", "f**k" or "fuuuck" undone.

Texts are joined into one byte array, and nothing loops over texts, words or characters in Python.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibfuse.scorers.words import masked_words
from calibfuse.vocabulary.spelling import WordUnmasker

_SPACE = 32
_STAR = ord("*")
_DROP = 1  # invisible characters (zero-width space, soft hyphen) are folded to this byte and removed
_DIGIT_AS_LETTER = {"0": "o", "1": "i", "3": "e", "4": "a", "5": "s", "7": "t", "!": "i", "@": "a", "$": "s"}
_MASKED_REST = re.compile(rb"(?<=[a-z\x80-\xff])\*+")
_CONTRACTION = re.compile(rb"(?<![a-z0-9\x80-\xff])'(s|m|d|t|ve|ll|re)(?![a-z0-9\x80-\xff])")
_LOOKALIKES = dict(zip("аеорсухіјѕԁԛԝһαεορυι", "aeopcyxijsdqwhaeopui", strict=True))
_HIDING = np.frombuffer(b"*#%", dtype=np.uint8)
_HIDING_BESIDE = np.frombuffer(b"@$!&^'", dtype=np.uint8)
_INVISIBLE = "\u00ad\u200b\u200c\u200d\u2060\ufeff"


@dataclass(frozen=True, eq=False)
class WordStream:
    """The words of a batch of texts in plain form, as the bytes " word word word ": n-grams can touch words' edges."""

    data: NDArray[np.uint8]  # [bytes] plain form
    origin: NDArray[np.int64]  # [bytes] byte of the joined UTF-8 text each one came from (for spaces: no meaning)
    starts: NDArray[np.int64]  # [words] first byte of each word in `data`; `data[start - 1]` is a space
    lengths: NDArray[np.int64]  # [words] bytes of each word
    text_index: NDArray[np.int64]  # [words] which text the word belongs to, ascending
    n_texts: int

    def __len__(self) -> int:
        return len(self.starts)

    def word(self, index: int) -> bytes:
        """The plain form of one word."""
        return self.data[self.starts[index] :][: self.lengths[index]].tobytes()


_BYTES = np.arange(256, dtype=np.uint8)
_LOWER = np.where((_BYTES >= ord("A")) & (_BYTES <= ord("Z")), _BYTES + 32, _BYTES).astype(np.uint8)
_IS_LETTER = ((_BYTES >= ord("a")) & (_BYTES <= ord("z"))) | (_BYTES >= 128)  # and bytes of non-ASCII characters
_IS_LETTER_OR_DIGIT = _IS_LETTER | ((_BYTES >= ord("0")) & (_BYTES <= ord("9")))
_STANDS_FOR = np.zeros(256, dtype=np.uint8)  # the letter a digit or sign may stand for, 0 where it stands for none
_STANDS_FOR[[ord(sign) for sign in _DIGIT_AS_LETTER]] = [ord(letter) for letter in _DIGIT_AS_LETTER.values()]


class _FoldTable(dict[int, str]):
    """`str.translate` table that maps each character to one character: accents off, lookalikes and width undone."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if code < 128:
            folded = char
        elif char in _INVISIBLE:
            folded = chr(_DROP)
        elif char in "\u2018\u2019\u02bc":
            folded = "'"
        elif 0xD800 <= code <= 0xDFFF or unicodedata.category(char)[0] in "PZSC":
            folded = " "
        else:
            first = unicodedata.normalize("NFKD", char)[0].lower()
            folded = first if len(first) == 1 else char
            folded = _LOOKALIKES.get(folded, folded)
        self[code] = folded
        return folded


_FOLD = _FoldTable()


def fold_characters(text: str) -> str:
    """Write accented, wide and lookalike characters as plain ones; as many characters as before."""
    return text if text.isascii() else text.translate(_FOLD)


def _shifted(mask: NDArray[Any], by: int) -> NDArray[Any]:
    """`mask` moved by `by` places (positive: later), zeros moving in."""
    out = np.zeros_like(mask)
    if by > 0:
        out[by:] = mask[:-by]
    else:
        out[:by] = mask[-by:]
    return out


def _undo_disguises(codes: NDArray[np.uint8], *, unmask: bool) -> NDArray[np.bool_]:
    """Replace signs that stand for letters, in place; [bytes] bool, whether a byte belongs to a word."""
    if unmask:
        hides, beside = np.isin(codes, _HIDING), np.isin(codes, _HIDING_BESIDE)
        for _ in range(2):
            hides |= beside & (_shifted(hides, 1) | _shifted(hides, -1))
        codes[hides] = _STAR
    stands_for = _STANDS_FOR[codes]
    signs = (codes == ord("@")) | (codes == ord("$"))
    for _ in range(2):  # twice, so that two signs in a row ("a$$") are both reached
        is_letter = _IS_LETTER[codes]
        before, after = _shifted(is_letter, 1), _shifted(is_letter, -1)
        hit = (stands_for > 0) & ~is_letter & ((before & after) | (signs & (before | after)))
        np.copyto(codes, stands_for, where=hit)
    is_letter = _IS_LETTER[codes]
    in_word = _IS_LETTER_OR_DIGIT[codes]
    hides = (codes == _STAR) | (codes == ord("#")) | (codes == ord("%"))
    if hides.any():
        codes[hides] = _STAR
        for run in _MASKED_REST.finditer(codes.tobytes()):
            start, stop = run.span()
            # a star counts as a letter inside a word ("f**k", "s*it"), or as the rest of a word of which one letter is
            # left ("f***"); "**bold**" is markup
            if is_letter[stop] or (stop - start >= 2 and not is_letter[start - 2]):
                in_word[start:stop] = True
    # contractions without their word are left out: generated text often begins so
    for match in _CONTRACTION.finditer(codes.tobytes()):
        start, stop = match.span(1)
        if not in_word[start - 2] and not in_word[stop]:
            in_word[start:stop] = False
    return in_word


def _keep_mask(codes: NDArray[np.uint8], in_word: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Say which bytes stay: apostrophes inside words, invisible bytes and the repeats of stretched letters go."""
    is_letter = _IS_LETTER[codes]
    drop = (codes == _DROP) | ((codes == ord("'")) & _shifted(is_letter, 1) & _shifted(is_letter, -1))
    same = _shifted(codes, 1) == codes
    same[:1] = False
    triple = same & _shifted(same, 1)
    stretched = triple | _shifted(triple, -1)
    drop |= stretched & same & is_letter
    drop |= (codes == _STAR) & same & in_word
    keep: NDArray[np.bool_] = ~drop
    return keep


def _join_single_letters(stream: WordStream) -> WordStream:
    """Join three or more single letters in a row into one word ("f u c k", "f.u.c.k")."""
    single = (stream.lengths == 1) & _IS_LETTER[stream.data[stream.starts]]
    joined = single & _shifted(single, 1)  # this one and the word before are single letters
    joined &= stream.text_index == _shifted(stream.text_index, 1)
    joined[:1] = False
    long_enough = joined & (_shifted(joined, 1) | _shifted(joined, -1))
    # within a run of pairs, each pair touches another one exactly when the run has three letters or more
    if not long_enough.any():
        return stream
    keep = np.ones(len(stream.data), dtype=np.bool_)
    keep[stream.starts[long_enough] - 1] = False
    return _as_stream(stream.data[keep], stream.origin[keep], stream.text_index[~long_enough], stream.n_texts)


def _as_stream(
    data: NDArray[np.uint8], origin: NDArray[np.int64], text_index: NDArray[np.int64], n_texts: int
) -> WordStream:
    """Cut bytes of the form " word word " into words."""
    spaces = np.flatnonzero(data == _SPACE)
    starts = spaces[:-1] + 1
    return WordStream(data, origin, starts, spaces[1:] - starts, text_index, n_texts)


_ENDINGS = ("s", "es", "ed", "er", "ers", "ing", "in", "y")


@cache
def _unmaskers() -> tuple[WordUnmasker, WordUnmasker]:
    """The readers of masked words: of the listed words, and of these with an ending."""
    words = masked_words()
    return WordUnmasker(words), WordUnmasker(
        word + ending for word in words for ending in _ENDINGS if word[-1] != ending
    )


def _read_masked(stream: WordStream, raw: NDArray[np.uint8]) -> WordStream:
    """Put words in the place of their masked spellings, which `raw`, the text before any change, still holds."""
    lower = _LOWER[raw]
    suspect = (stream.data != lower[np.minimum(stream.origin + 1, len(raw) - 1)]) & (stream.data != _SPACE)
    suspect |= (stream.data == _STAR) | (stream.data == ord("v"))
    words = np.flatnonzero(np.add.reduceat(suspect, stream.starts))
    data, origin, kept = [], [], 0
    for word in words.tolist():
        start, stop = int(stream.starts[word]), int(stream.starts[word] + stream.lengths[word])
        first, last = int(stream.origin[start]), int(stream.origin[stop - 1])
        while raw[last + 2] in _HIDING:  # of several stars the plain form keeps one
            last += 1
        spelling = raw[first + 1 : last + 2].tobytes().decode("utf-8", "replace")
        plain = next((found for unmask in _unmaskers() if (found := unmask(spelling))), None)
        if plain is None:
            continue
        data += [stream.data[kept:start], np.frombuffer(plain.encode(), dtype=np.uint8)]
        origin += [stream.origin[kept:start], np.linspace(first, last, len(plain)).astype(np.int64)]
        kept = stop
    if not data:
        return stream
    data.append(stream.data[kept:])
    origin.append(stream.origin[kept:])
    return _as_stream(np.concatenate(data), np.concatenate(origin), stream.text_index, stream.n_texts)


def split_words(texts: Sequence[str], *, unmask: bool = True) -> WordStream:
    """Bring texts into plain form and cut them into words; `unmask` writes masked words as those that they stand for.

    Example:
        >>> stream = split_words(["It's a D@MN shame!", "f u n, soooo fun"])
        >>> [stream.word(i).decode() for i in range(len(stream))]
        ['its', 'a', 'damn', 'shame', 'fun', 'so', 'fun']
        >>> len(split_words(["'ve", "we 'll"]))
        1
    """
    encoded = [fold_characters(text).encode() for text in texts]
    text_starts = np.cumsum([0] + [len(part) + 1 for part in encoded], dtype=np.int64)
    # one line feed before, between and after: texts never touch, and every word has two edges
    raw = np.frombuffer(b"\n" + b"\n".join(encoded) + b"\n", dtype=np.uint8)
    codes = _LOWER[raw]
    in_word = _undo_disguises(codes, unmask=unmask)
    keep = _keep_mask(codes, in_word)
    origin = np.flatnonzero(keep)
    in_word = in_word[origin]
    codes = np.where(in_word, codes[origin], np.uint8(_SPACE))
    solid = in_word | _shifted(in_word, -1)  # of several separators only the last before a word stays
    solid[-1] = True  # the line feed at the end closes the last word
    data, origin = codes[solid], origin[solid] - 1
    spaces = np.flatnonzero(data == _SPACE)
    # a separator stands before a word; the word lies in the text that its first byte came from
    text_index = np.searchsorted(text_starts, origin[np.minimum(spaces[:-1] + 1, len(origin) - 1)], side="right") - 1
    stream = _join_single_letters(_as_stream(data, origin, text_index, len(texts)))
    return _read_masked(stream, raw) if unmask and len(stream) else stream
