"""How single tokens are written for people: partial characters, special tokens, and words that are masked.

A token is often a part of a word or even of a character, so neither decoding nor masking it alone is right.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from calibfuse.html import Mask
from calibfuse.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenSpeller:
    """Writes tokens of one tokenizer; VocabularyError where it cannot be turned into byte strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary.from_tokenizer(tokenizer)

    def label(self, token_id: int) -> str:
        r"""A token by itself: its text, the name of a special one, or bytes as \xe2 where no character is whole."""
        if token_id >= len(self._vocabulary):
            return f"<id {token_id}>"
        data = self._vocabulary.token_bytes(token_id)
        if not data:
            name = self._tokenizer.convert_ids_to_tokens(token_id)
            return name if isinstance(name, str) and name else f"<id {token_id}>"
        return data.decode("utf-8", errors="backslashreplace")

    def stream(self) -> Callable[[int], str]:
        """A function that gives the text which each further token of one sequence adds.

        A character belongs to the token that completes it. Special tokens and ids beyond the vocabulary add nothing.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        size = len(self._vocabulary)
        return lambda token_id: decoder.decode(self._vocabulary.token_bytes(token_id) if token_id < size else b"")


def mask_in_context(before: str, piece: str, mask: Mask) -> str:
    """A piece of text, which may end a word that began in `before`, as it looks when the whole text is masked.

    Example:
        >>> mask_in_context("what the he", "ck", lambda text: text.replace("heck", "h***"))
        '**'
    """
    word = "" if before[-1:].isspace() else before[before.rfind(" ") + 1 :]
    masked = mask(word + piece)
    return masked[len(word) :] if len(masked) == len(word) + len(piece) else mask(piece)


def mask_pieces(pieces: Sequence[str], mask: Mask) -> list[str]:
    """Mask a text that is cut into pieces of any kind; a word is masked in all pieces that it spans."""
    text = "".join(pieces)
    masked = mask(text)
    if len(masked) != len(text):
        return [mask(piece) for piece in pieces]
    result, start = [], 0
    for piece in pieces:
        result.append(masked[start : start + len(piece)])
        start += len(piece)
    return result
