"""The text of a target's ids as tokens of another vocabulary, kept up incrementally.

The bytes are cut into words before a space, where nearly every tokenizer cuts; a finished word is spelled once, in the
tokenizer's own way, the last word stays open. Special tokens have no bytes: a run inside a text is one start token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from calibfuse.vocabulary import Vocabulary

MAX_WORD = 64  # bytes; longer words (scripts without spaces, rulers) are cut at a character
_WHITESPACE = frozenset(b" \t\n\r\v\f")
_SPACE = 0x20


@dataclass(frozen=True)
class Spelling:
    """A word in own tokens."""

    ids: tuple[int, ...]
    ends: tuple[int, ...]  # after which byte each token ends; empty where the tokens do not spell the word exactly
    rest: bytes  # at the end, that no token spells yet (a part of a character)


@dataclass(frozen=True)
class SourcePrefix:
    """A prefix of a text in own tokens."""

    closed: tuple[int, ...]  # of the finished words, behind a start token
    word: bytes = b""  # the open one

    def at_start(self, start_id: int) -> bool:
        """Whether a document begins here: no text since the start token."""
        return not self.word and self.closed[-1] == start_id


class SourceText:
    """Spells text in one vocabulary.

    `tokenizer`: a transformers tokenizer or a `tokenizers.Tokenizer`; `start_id`: own token before every text;
    `readable`: ids below this have an embedding; None: all of them do.
    """

    def __init__(
        self, tokenizer: Any, vocabulary: Vocabulary, start_id: int, *, readable: int | None = None  # noqa: ANN401
    ) -> None:  # fmt: skip
        self._tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.start_id = start_id
        count = len(vocabulary) if readable is None else min(readable, len(vocabulary))
        self._bytes = [vocabulary.token_bytes(token_id) for token_id in range(count)]
        self._ids: dict[bytes, int] = {}
        for token_id, text in enumerate(self._bytes):
            if text:
                self._ids.setdefault(text, token_id)
        self._longest = max(map(len, self._ids))
        first = self._encode("a")
        # SentencePiece and WordPiece give the first word of a text a space that the text has not.
        self.adds_space = bool(first) and self._bytes[first[0]].startswith(b" ")
        self.spell = lru_cache(maxsize=65_536)(self._spell)

    def empty(self) -> SourcePrefix:
        """The prefix before any text."""
        return SourcePrefix((self.start_id,))

    def extend(self, prefix: SourcePrefix, pieces: Iterable[bytes]) -> SourcePrefix:
        """Go on with the bytes of further ids; empty ones are special tokens."""
        for piece in pieces:
            if not piece:
                if not prefix.at_start(self.start_id):
                    prefix = SourcePrefix((*prefix.closed, *self.spell(prefix.word).ids, self.start_id))
                continue
            word = prefix.word + piece
            if self.adds_space and prefix.at_start(self.start_id) and not piece.startswith(b" "):
                word = b" " + piece
            prefix = replace(prefix, word=word)
            while (end := _first_cut(prefix.word)) is not None:
                done = self.spell(prefix.word[:end]).ids
                prefix = SourcePrefix((*prefix.closed, *done), prefix.word[end:])
        return prefix

    def _spell(self, word: bytes) -> Spelling:
        """Own tokens of a word, in the tokenizer's own way where that spells it, else longest match first."""
        whole, rest = _whole_characters(word)
        if whole is not None:
            spelled = word[: len(word) - len(rest)]
            for text in (whole, whole[1:]) if whole.startswith(" ") else (whole,):
                found = self._encode(text)
                if b"".join(self._bytes[each] for each in found) == spelled:
                    return self._spelling(word, [*found, *self._match(rest)])
            if self._spelling(spelled, self._match(spelled)).rest:
                # Not even byte by byte: a tokenizer that loses text. Its own spelling is what the model knows.
                return Spelling(tuple(self._encode(whole)), (), b"")
        return self._spelling(word, self._match(word))

    def _spelling(self, word: bytes, ids: Sequence[int]) -> Spelling:
        ends = tuple(accumulate(len(self._bytes[each]) for each in ids))
        return Spelling(tuple(ids), ends, word[ends[-1] if ends else 0 :])

    def _match(self, text: bytes) -> list[int]:
        ids: list[int] = []
        at = 0
        while at < len(text):
            lengths = range(min(self._longest, len(text) - at), 0, -1)
            length = next((length for length in lengths if text[at : at + length] in self._ids), None)
            if length is None:
                break
            ids.append(self._ids[text[at : at + length]])
            at += length
        return ids

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoded if isinstance(encoded, list) else encoded.ids
        return [each for each in ids if each < len(self._bytes)]


def _first_cut(word: bytes) -> int | None:
    """Where the first finished word ends, if one does; hangs on no byte after the cut but the one it stands before."""
    for at in range(1, len(word)):
        if word[at] == _SPACE and word[at - 1] not in _WHITESPACE:
            return at
        if at >= MAX_WORD and word[at] & 0xC0 != 0x80:
            return at
    return None


def _whole_characters(word: bytes) -> tuple[str | None, bytes]:
    """The text and the bytes of an unfinished character at its end; None where it is no UTF-8."""
    try:
        return word.decode("utf-8"), b""
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return word[: error.start].decode("utf-8"), word[error.start :]
        return None, b""
