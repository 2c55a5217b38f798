"""How each family of tokenizers spells text, recognised from the tokens, and undone into plain bytes.

The same bytes mean the same in every family: a word that starts after a space carries that space in front. Families can
combine (CLIP is byte-level with a word suffix). Normalisation is not undone: lower-cased text stays so.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibfuse.errors import VocabularyError
from calibfuse.vocabulary.token_table import BYTE_TOKEN, CONTROL_TOKEN, TokenTable

METASPACE = "\u2581"
# To be raised by whoever changes the bytes of any token: disk caches of vocabularies are keyed by it.
SPELLING_VERSION = 2
# A mark on one token in twenty is a convention of the vocabulary; a stray one is text.
_CLEAR_SHARE = 0.05
# The blocks that BERT's basic tokenizer calls Chinese characters.
_IDEOGRAPH = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)
# `[CLS]`, `[unused12]`: in WordPiece, brackets never join with letters, so no text can produce these.
_BRACKETED_TOKEN = re.compile(r"\[[^\[\]\s]+\]")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the 68 other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


BYTE_ALPHABET = _byte_alphabet()
_ALPHABET = frozenset(BYTE_ALPHABET)
_SUBSTITUTES = frozenset(character for character in BYTE_ALPHABET if ord(character) >= 0x100)
# For `str.translate`: each character to that of its byte; Latin-1 characters outside the alphabet to one beyond bytes.
_TO_BYTES = {code: 0x100 for code in range(0x100)} | {ord(character): byte for character, byte in BYTE_ALPHABET.items()}


@dataclass(frozen=True)
class Spelling:
    """How the tokens of one vocabulary spell their text."""

    byte_level: bool = False  # characters are GPT-2's byte alphabet
    byte_characters: bool = False  # characters U+0000 to U+00FF are bytes (ByT5)
    metaspace: bool = False  # U+2581 is a space and `<0xNN>` a byte
    continuation_prefix: str | None = None  # marks a piece inside a word; without it a piece starts a word
    word_suffix: str | None = None  # marks the last piece of a word


def spelling_of(table: TokenTable) -> Spelling:
    """The spelling of a table's ordinary tokens, neither control tokens nor literal nor raw bytes."""
    apart, hints = table.special | table.literal, table.hints
    tokens = [token for i, token in enumerate(table.tokens) if token and isinstance(token, str) and i not in apart]
    prefix = hints.continuation_prefix or "##"
    suffix = hints.word_suffix or "</w>"
    spaced = _share(tokens, [METASPACE in (token[0], token[-1]) for token in tokens])
    continued = _share(tokens, [token.startswith(prefix) for token in tokens])
    suffixed = _share(tokens, [token.endswith(suffix) for token in tokens])

    has_suffix = suffixed >= _CLEAR_SHARE or (hints.word_suffix is not None and suffixed > 0)
    if spaced >= _CLEAR_SHARE:
        return Spelling(metaspace=True)
    if continued >= _CLEAR_SHARE and not has_suffix:
        return Spelling(continuation_prefix=prefix)
    if _is_byte_level(tokens, hints.byte_level):
        return Spelling(byte_level=True, word_suffix=suffix if has_suffix else None)
    if _is_one_character_per_byte(tokens):
        return Spelling(byte_characters=True)
    if has_suffix:
        return Spelling(word_suffix=suffix)
    if hints.continuation_prefix is not None or hints.whole_words:
        return Spelling(continuation_prefix=prefix)
    return Spelling(metaspace=bool(hints.metaspace) or spaced > 0)


def _share(tokens: Sequence[str], flags: Sequence[bool]) -> float:
    return sum(flags) / max(len(tokens), 1)


def _is_byte_level(tokens: Sequence[str], hint: bool | None) -> bool:
    """Whether the characters are GPT-2's byte alphabet; the decoder decides where the tokens could be either."""
    inside = _share(tokens, [_ALPHABET.issuperset(token) for token in tokens])
    if inside < 0.5:
        return False
    # Text hardly has the 68 characters from U+0100 that stand for bytes, nor `Ġ` (space) in one token of a hundred.
    spaces = _share(tokens, [token[0] == "Ġ" for token in tokens])
    if inside >= 0.95 and (spaces >= 0.01 or _SUBSTITUTES <= set("".join(tokens))):
        return True
    return bool(hint)


def _is_one_character_per_byte(tokens: Sequence[str]) -> bool:
    """All of U+0000 to U+00FF are tokens, most of which no text has, and hardly anything else is."""
    return len(tokens) <= 1024 and set(map(chr, range(256))) <= set(tokens)


def encode_tokens(table: TokenTable) -> tuple[list[bytes], npt.NDArray[np.bool_]]:
    """The bytes of every token of a table, and which tokens are fallbacks.

    A fallback is a byte token (`<0x2C>`) or an inner piece of a word that begins with punctuation (`##,`): the
    tokenizer makes it only where no other token has its bytes.
    """
    spelling = spelling_of(table)
    tokens = [_to_bytes(table, token_id, spelling) for token_id in range(len(table.tokens))]
    is_fallback = np.zeros(len(tokens), dtype=np.bool_)
    if spelling.metaspace or spelling.continuation_prefix is not None:
        is_fallback[:] = [_is_fallback(table, token_id, spelling) for token_id in range(len(tokens))]
    return tokens, is_fallback


def _to_bytes(table: TokenTable, token_id: int, spelling: Spelling) -> bytes:
    token = table.tokens[token_id]
    if not token or token_id in table.special:
        return b""
    if isinstance(token, bytes):
        return token
    if token_id in table.literal:
        # SentencePiece-like decoders turn U+2581 into a space in tokens added by hand as well.
        return _utf8(token.replace(METASPACE, " ") if spelling.metaspace else token, table.name)
    if token[0] in "<[":
        if _is_control(token, spelling):
            return b""
        if spelling.metaspace and BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(token[3:5])
    space = ""
    if spelling.word_suffix is not None and token.endswith(spelling.word_suffix):
        token, space = token[: -len(spelling.word_suffix)], " "
    if spelling.byte_level or spelling.byte_characters:
        try:
            return (token.translate(_TO_BYTES) if spelling.byte_level else token).encode("latin-1") + space.encode()
        except UnicodeEncodeError:  # text: no byte stands for one of its characters
            pass
    if spelling.continuation_prefix is not None:
        token = _undo_word_piece(token, spelling.continuation_prefix)
    if spelling.metaspace:
        token = token.replace(METASPACE, " ")
    return _utf8(token + space, table.name)


def _is_fallback(table: TokenTable, token_id: int, spelling: Spelling) -> bool:
    token, prefix = table.tokens[token_id], spelling.continuation_prefix
    if not isinstance(token, str) or token_id in table.special or token_id in table.literal:
        return False
    if prefix is None:
        return BYTE_TOKEN.fullmatch(token) is not None
    inner = token.startswith(prefix) and token != prefix and not _is_control(token, spelling)
    return inner and _stands_without_space(token[len(prefix)])


def _is_control(token: str, spelling: Spelling) -> bool:
    if CONTROL_TOKEN.fullmatch(token):
        return True
    return spelling.continuation_prefix is not None and _BRACKETED_TOKEN.fullmatch(token) is not None


def _undo_word_piece(token: str, prefix: str) -> str:
    """Drop the continuation prefix, or put the space in front that a word has and punctuation has not."""
    if token.startswith(prefix) and token != prefix:
        return token[len(prefix) :]
    return token if _stands_without_space(token[:1]) else " " + token


def _stands_without_space(character: str) -> bool:
    """Whether BERT's basic tokenizer makes this character a word of its own: punctuation and CJK ideographs."""
    if character.isascii():
        return not character.isalnum()
    return _IDEOGRAPH.match(character) is not None or unicodedata.category(character).startswith("P")


def _utf8(text: str, name: str) -> bytes:
    """UTF-8, where U+DC80 to U+DCFF stand for the raw bytes that Python's own escape gives them."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise VocabularyError(
            f"Token {text!r:.60} of {name} holds a lone surrogate, which is no text and stands for no byte; "
            "repair the tokenizer or remove the token."
        ) from None
