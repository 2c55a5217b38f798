"""Hashed n-grams of words and characters, for whole batches of text at once.

Nothing loops over texts, words or characters in Python. Texts are joined into one byte array, written in a plain form
(lower case, disguises such as "sh1t", "f**k" or "fuuuck" undone), cut into words, and every n-gram becomes a bucket
number: feature hashing (Weinberger et al. 2009), character n-grams inside words as in Bojanowski et al. 2017.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibfuse.errors import InputError
from calibfuse.scorers.words import masked_words
from calibfuse.vocabulary.spelling import WordUnmasker

_SPACE = 32
_STAR = ord("*")
_DROP = 1  # invisible characters (zero-width space, soft hyphen) are folded to this byte and removed
_PRIME = np.uint32(0x01000193)
_MIX = np.uint32(0x85EBCA6B)
_LONGEST_HASHED = 64  # bytes of a word that get their own power of the hash's base; later ones share the last

_DIGIT_AS_LETTER = {"0": "o", "1": "i", "3": "e", "4": "a", "5": "s", "7": "t", "!": "i", "@": "a", "$": "s"}
_CONTRACTIONS = (b"s", b"m", b"d", b"t", b"ve", b"ll", b"re")
_LOOKALIKES = dict(zip("аеорсухіјѕԁԛԝһαεορυι", "aeopcyxijsdqwhaeopui", strict=True))
_HIDING = np.frombuffer(b"*#%", dtype=np.uint8)
_HIDING_BESIDE = np.frombuffer(b"@$!&^'", dtype=np.uint8)
_INVISIBLE = "\u00ad\u200b\u200c\u200d\u2060\ufeff"


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Which n-grams are counted, and into how many buckets they are hashed."""

    bucket_bits: int = 20  # the table has 2**bucket_bits weights
    char_min: int = 2  # shortest character n-gram, in bytes of the plain form, the word's edges included as spaces
    char_max: int = 5  # longest one
    word_bigrams: bool = True  # pairs of neighbouring words
    unmask: bool = True  # read "f**k" as the word that it stands for; False in scorers made before this was known
    seed: int = 0  # moves every feature to another bucket

    def __post_init__(self) -> None:
        """Refuse sizes that cannot work (InputError)."""
        if not 8 <= self.bucket_bits <= 24:
            raise InputError(f"bucket_bits must lie in 8..24, got {self.bucket_bits}")
        if not 1 <= self.char_min <= self.char_max <= 8:
            raise InputError(
                f"character n-grams need 1 <= char_min <= char_max <= 8, got {self.char_min}..{self.char_max}"
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed of the hash must lie in 0..2**32-1, got {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FeatureConfig:
        """Build a config from the form of `to_dict`; an unknown field, or a value out of range, is an InputError."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"Unknown feature settings {unknown}; known are {sorted(known)}")
        return cls(**{"unmask": False, **values})


@dataclass(frozen=True, eq=False)
class WordStream:
    """The words of a batch of texts in plain form, one after the other.

    The bytes are " word word word ": one space before each word and one after the last, so a word's edges are
    bytes of the stream and n-grams can touch them.
    """

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
        start = int(self.starts[index])
        return self.data[start : start + int(self.lengths[index])].tobytes()


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
    """Replace signs that stand for letters, in place; [bytes] bool, True for letters, digits and signs inside words."""
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
        # a star counts as a letter inside a word ("f**k", "s*it") ...
        run_from_letter = hides & _shifted(is_letter, 1)
        positions = np.flatnonzero(hides)
        breaks = np.flatnonzero(np.diff(positions) > 1) + 1
        run_starts = positions[np.concatenate([[0], breaks])]
        run_stops = positions[np.concatenate([breaks - 1, [len(positions) - 1]])] + 1
        padded = np.concatenate([is_letter, [False, False]])
        follows = padded[run_stops]
        precedes = run_from_letter[run_starts]
        # ... or as the rest of a word of which one letter is left ("f***"); "**bold**" is markup
        one_letter = precedes & ~padded[run_starts - 2] & (run_stops - run_starts >= 2)
        inside = precedes & (follows | one_letter)
        for start, stop in zip(run_starts[inside].tolist(), run_stops[inside].tolist(), strict=True):
            in_word[start:stop] = True
    return in_word


def _leave_out_contractions(codes: NDArray[np.uint8], in_word: NDArray[np.bool_]) -> None:
    """Take contractions without their word out of `in_word`, in place: generated text often begins so."""
    begins = np.flatnonzero((codes == ord("'")) & ~_shifted(in_word, 1) & _shifted(in_word, -1)) + 1
    padded_codes, padded = (np.concatenate([each, np.zeros(4, each.dtype)]) for each in (codes, in_word))
    for ending in _CONTRACTIONS:
        size = len(ending)
        hit = ~padded[begins + size]
        for place, letter in enumerate(ending):
            hit &= padded[begins + place] & (padded_codes[begins + place] == letter)
        for place in range(size):
            in_word[begins[hit] + place] = False


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
    _leave_out_contractions(codes, in_word)
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


class NgramHasher:
    """Turns words into bucket numbers under one `FeatureConfig`."""

    def __init__(self, config: FeatureConfig) -> None:
        self.config = config
        self._shift = np.uint32(32 - config.bucket_bits)
        self._powers = np.ones(_LONGEST_HASHED, dtype=np.uint32)
        for i in range(1, _LONGEST_HASHED):
            self._powers[i] = (int(self._powers[i - 1]) * int(_PRIME)) & 0xFFFFFFFF

    def _start(self, kind: int) -> np.uint32:
        """The first state of the hash for one kind of feature, so that kinds do not share buckets by rule."""
        state: np.uint32 = np.uint32(((self.config.seed + 1) * 0x9E3779B1 + kind * 0x7FEB352D) & 0xFFFFFFFF)
        return state

    def _bucket(self, state: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Mix hash states so that their upper bits depend on all bits, and keep `bucket_bits` of them."""
        mixed: NDArray[np.uint32] = state ^ (state >> np.uint32(15))
        mixed *= _MIX
        mixed ^= mixed >> np.uint32(13)
        mixed *= np.uint32(0xC2B2AE35)
        mixed >>= self._shift
        return mixed

    def word_states(self, stream: WordStream) -> NDArray[np.uint32]:
        """[words] uint32: one hash per word, before mixing."""
        if not len(stream):
            return np.zeros(0, dtype=np.uint32)
        values = stream.data.astype(np.uint32)
        values *= self._powers[np.minimum(self._places(stream), _LONGEST_HASHED - 1)]
        values[stream.data == _SPACE] = 0
        states: NDArray[np.uint32] = np.add.reduceat(values, stream.starts, dtype=np.uint32)
        return states

    @staticmethod
    def _places(stream: WordStream) -> NDArray[np.int64]:
        """[bytes] int64: how far each byte lies behind its word's first one (the space before it: 0)."""
        first = np.zeros(len(stream.data), dtype=np.int64)
        first[stream.starts] = stream.starts
        return np.maximum(np.arange(len(stream.data)) - np.maximum.accumulate(first), 0)

    def word_buckets(self, stream: WordStream) -> NDArray[np.uint32]:
        """[words] uint32: the bucket of each word as a whole."""
        return self._bucket(self.word_states(stream) ^ self._start(0))

    def bigram_buckets(self, stream: WordStream) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """[words] uint32, the bucket of each word with the one before it, and [words] bool: there is one."""
        states = self.word_states(stream)
        has_left = stream.text_index == _shifted(stream.text_index, 1)
        has_left[:1] = False
        pair = _shifted(states, 1) * np.uint32(0x27D4EB2F) + states
        return self._bucket(pair ^ self._start(1)), has_left

    def char_buckets(self, stream: WordStream) -> list[tuple[NDArray[np.uint32], NDArray[np.bool_]]]:
        """Hash all character n-grams that lie within a word and its two edges.

        For each n from `char_min` to `char_max`: buckets uint32 [bytes] of the n-gram beginning at each byte, and bool
        [bytes], whether one begins. N-grams that begin at the edge before a word belong to that word.
        """
        data = stream.data
        if not len(data):
            return []
        is_space = data == _SPACE
        values = data.astype(np.uint32)
        state = np.full(len(data), self._start(2), dtype=np.uint32)
        # the n-gram so far has no space after its first byte but at its end
        inside = np.ones(len(data), dtype=np.bool_)
        result = []
        for n in range(1, self.config.char_max + 1):
            here = _shifted(values, 1 - n) if n > 1 else values
            state = (state ^ here) * _PRIME
            space_here = _shifted(is_space, 1 - n) if n > 1 else is_space
            exists = inside.copy()
            exists[len(data) - n + 1 :] = False
            if n == 1:
                exists &= ~is_space
            if n >= self.config.char_min:
                result.append((self._bucket(state + np.uint32(n)), exists))
            if n > 1:
                inside &= ~space_here
        return result

    def ngram_counts(self, stream: WordStream) -> NDArray[np.int64]:
        """[words] int64: how many character n-grams each word has (edges included)."""
        total = np.zeros(len(stream), dtype=np.int64)
        for n in range(self.config.char_min, self.config.char_max + 1):
            total += np.maximum(stream.lengths + 2 - n + 1, 0) if n > 1 else stream.lengths
        return total
