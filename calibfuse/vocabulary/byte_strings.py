r"""How each family of tokenizers spells text, recognised from the tokens, and undone into plain bytes.

The same bytes mean the same in every family: a word that starts after a space carries that space in front.

| spelling | example | bytes |
|---|---|---|
| byte-level alphabet (GPT-2, Llama-3, Qwen) | `Ġthe`, `âĤ¬` | b" the", the three bytes of the euro sign |
| metaspace (SentencePiece: Llama-2, T5) | `▁the`, `<0x0A>` | b" the", b"\n" |
| continuation prefix (WordPiece: BERT) | `the`, `##ing`, `,` | b" the", b"ing", b"," |
| word suffix (GPT-1, CLIP) | `the</w>` | b"the " |
| raw bytes (tiktoken), or one character per byte (ByT5) | b" the", `\xe9` | as they are |
| none of these | `the` | b"the" |

Families can combine (CLIP is byte-level with a word suffix). `encode_tokens` is vectorised; `token_to_bytes` does one
token in the obvious way and is what the tests compare it with. Sources: the GPT-2 byte alphabet (Radford et al. 2019),
SentencePiece (Kudo and Richardson 2018), BERT's basic tokenizer (Devlin et al. 2019).

Left out: normalisation. A tokenizer that lower-cases or applies NFKC maps several texts to one token; its bytes are
those of the normalised text.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from calibfuse.errors import VocabularyError
from calibfuse.vocabulary.characters import Characters
from calibfuse.vocabulary.token_table import CONTROL_TOKEN, Hints, TokenTable

METASPACE = "\u2581"
# To be raised by whoever changes the bytes of any token: disk caches of vocabularies are keyed by it.
SPELLING_VERSION = 2
# A mark on one token in twenty is a convention of the vocabulary; a stray one is text.
_CLEAR_SHARE = 0.05
# The blocks that BERT's basic tokenizer calls Chinese characters.
_CJK_RANGES = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
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
_UNDEFINED = 256
_SUBSTITUTES = sum(ord(character) >= 0x100 for character in BYTE_ALPHABET)
_BEYOND_ALPHABET = max(map(ord, BYTE_ALPHABET)) + 1  # stands for all later code points
_BYTE_OF_CODE_POINT = np.full(_BEYOND_ALPHABET + 1, _UNDEFINED, dtype=np.uint16)
for _character, _byte in BYTE_ALPHABET.items():
    _BYTE_OF_CODE_POINT[ord(_character)] = _byte


@dataclass(frozen=True)
class Spelling:
    """How the tokens of one vocabulary spell their text.

    Attributes:
        byte_level: characters are GPT-2's byte alphabet.
        byte_characters: characters U+0000 to U+00FF are bytes (ByT5).
        metaspace: U+2581 is a space and `<0xNN>` a byte.
        continuation_prefix: marks a piece inside a word; without it a piece starts a word.
        word_suffix: marks the last piece of a word.
    """

    byte_level: bool = False
    byte_characters: bool = False
    metaspace: bool = False
    continuation_prefix: str | None = None
    word_suffix: str | None = None


def recognise(characters: Characters, hints: Hints) -> Spelling:
    """Recognise how a vocabulary spells text, from its tokens; hints decide where the tokens leave doubt.

    Args:
        characters: the ordinary tokens; empty strings (control tokens, tokens added by hand, holes) do not count.
        hints: what the tokenizer says about itself.

    Returns:
        The spelling. Vocabularies without any mark of a family are taken as plain text.
    """
    prefix = hints.continuation_prefix or "##"
    suffix = hints.word_suffix or "</w>"
    spaced = _share(characters.starting_with(METASPACE) | characters.ending_with(METASPACE), characters)
    continued = _share(characters.starting_with(prefix), characters)
    suffixed = _share(characters.ending_with(suffix), characters)

    has_suffix = suffixed >= _CLEAR_SHARE or (hints.word_suffix is not None and suffixed > 0)
    if spaced >= _CLEAR_SHARE:
        return Spelling(metaspace=True)
    if continued >= _CLEAR_SHARE and not has_suffix:
        return Spelling(continuation_prefix=prefix)
    if _is_byte_level(characters, hints.byte_level):
        return Spelling(byte_level=True, word_suffix=suffix if has_suffix else None)
    if _is_one_character_per_byte(characters):
        return Spelling(byte_characters=True)
    if has_suffix:
        return Spelling(word_suffix=suffix)
    if hints.continuation_prefix is not None or hints.whole_words:
        return Spelling(continuation_prefix=prefix)
    return Spelling(metaspace=bool(hints.metaspace) or spaced > 0)


def _share(flagged: npt.NDArray[np.bool_], characters: Characters) -> float:
    """The share of flagged strings among those that are not empty."""
    return int(np.count_nonzero(flagged)) / max(characters.filled, 1)


def _is_byte_level(characters: Characters, hint: bool | None) -> bool:
    """Whether the characters are GPT-2's byte alphabet; the decoder decides where the tokens could be either."""
    values = _to_byte_values(characters.code_points)
    undefined = values == _UNDEFINED
    inside = (characters.lengths > 0) & ~characters.holding(undefined)
    if _share(inside, characters) < 0.5:
        return False
    # Text hardly has the 68 characters from U+0100 that stand for bytes, nor `Ġ` (space) in one token of a hundred.
    present = np.bincount(values[(characters.code_points >= 0x100) & ~undefined], minlength=1)
    spaces = _share(characters.starting_with("Ġ"), characters)
    if _share(inside, characters) >= 0.95 and (np.count_nonzero(present) == _SUBSTITUTES or spaces >= 0.01):
        return True
    return bool(hint)


def _is_one_character_per_byte(characters: Characters) -> bool:
    """All of U+0000 to U+00FF are tokens, most of which no text has, and hardly anything else is."""
    if np.count_nonzero(characters.lengths) > 1024:
        return False
    single = characters.code_points[characters.offsets[:-1][characters.lengths == 1]]
    return len(np.unique(single[single < 256])) == 256


def spelling_of(table: TokenTable) -> Spelling:
    """The spelling of a table's ordinary tokens, which are neither control tokens nor added by hand nor raw bytes."""
    return recognise(Characters.of(_ordinary_tokens(table)), table.hints)


def _ordinary_tokens(table: TokenTable) -> list[str]:
    """Token strings by id, empty for all tokens that stand outside the vocabulary's spelling."""
    if set(map(type, table.tokens)) == {str}:  # nearly always; saves the slower look at each
        ordinary = list(cast("list[str]", table.tokens))
    else:
        ordinary = [token if isinstance(token, str) else "" for token in table.tokens]
    for token_id in table.special | table.literal:
        if token_id < len(ordinary):
            ordinary[token_id] = ""
    return ordinary


def token_to_bytes(table: TokenTable, token_id: int, spelling: Spelling) -> bytes:
    """The bytes of one token, in the obvious way: slow, for exceptional tokens and as the oracle of the tests.

    Args:
        table: the tokens by id.
        token_id: 0 <= token_id < len(table.tokens).
        spelling: how the table's ordinary tokens are spelled.

    Returns:
        The bytes; empty for control tokens and holes.

    Raises:
        VocabularyError: the token holds a lone surrogate that stands for no byte.
    """
    token = table.tokens[token_id]
    if not token or token_id in table.special:
        return b""
    if isinstance(token, bytes):
        return token
    if token_id in table.literal:
        # SentencePiece-like decoders turn U+2581 into a space in tokens added by hand as well.
        return _utf8(token.replace(METASPACE, " ") if spelling.metaspace else token, table.name)
    if _is_control(token, spelling):
        return b""
    byte_token = _BYTE_TOKEN.fullmatch(token)
    if spelling.metaspace and byte_token:
        return bytes([int(byte_token.group(1), 16)])
    if spelling.byte_characters and all(ord(character) < 256 for character in token):
        return token.encode("latin-1")
    space = ""
    if spelling.word_suffix is not None and token.endswith(spelling.word_suffix):
        token, space = token[: -len(spelling.word_suffix)], " "
    if spelling.byte_level and all(character in BYTE_ALPHABET for character in token):
        return bytes(BYTE_ALPHABET[character] for character in token) + space.encode()
    if spelling.continuation_prefix is not None:
        token = _undo_word_piece(token, spelling.continuation_prefix)
    if spelling.metaspace:
        token = token.replace(METASPACE, " ")
    return _utf8(token + space, table.name)


@dataclass(frozen=True, eq=False)
class EncodedTokens:
    """The bytes of all tokens of a table.

    Attributes:
        data: uint8 [total_bytes], one token after the other.
        offsets: int64 [size + 1].
        is_fallback: bool [size]. True for byte tokens (`<0x2C>`) and for inner pieces of a word whose first character
            stands outside words (`##,`): the tokenizer makes them only where no other token has their bytes.
    """

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    is_fallback: npt.NDArray[np.bool_]


def encode_tokens(table: TokenTable) -> EncodedTokens:
    """Turn all tokens of a table into bytes; equal to `token_to_bytes` for each id, vectorised.

    Args:
        table: the tokens by id.

    Returns:
        The bytes of every token.

    Raises:
        VocabularyError: a token holds a lone surrogate that stands for no byte.
    """
    characters = Characters.of(_ordinary_tokens(table))
    spelling = recognise(characters, table.hints)
    exceptional = _exceptional_ids(table, characters, spelling)
    exceptions = {token_id: token_to_bytes(table, token_id, spelling) for token_id in exceptional}
    is_fallback = _fallbacks(table, characters, spelling, exceptional)
    characters = characters.without_strings(exceptional)
    if spelling.word_suffix is not None:
        space = "Ġ" if spelling.byte_level else " "
        characters = characters.with_endings_replaced(spelling.word_suffix, space)
    if spelling.continuation_prefix is not None:
        characters = characters.with_words_marked(spelling.continuation_prefix, stands_without_space)
    if spelling.metaspace:
        characters = characters.with_character_replaced(METASPACE, " ")
    if spelling.byte_level:
        data, lengths = _to_byte_values(characters.code_points).astype(np.uint8), characters.lengths
    else:
        data, lengths = characters.to_utf8()
    return EncodedTokens(*_with_exceptions(data, lengths, exceptions), is_fallback)


def is_fallback_token(table: TokenTable, token_id: int, spelling: Spelling) -> bool:
    """Whether one token is a fallback, in the obvious way; see `EncodedTokens.is_fallback`."""
    token, prefix = table.tokens[token_id], spelling.continuation_prefix
    if not isinstance(token, str) or token_id in table.special | table.literal:
        return False
    if spelling.metaspace:
        return _BYTE_TOKEN.fullmatch(token) is not None
    if prefix is None or not token.startswith(prefix) or token == prefix or _is_control(token, spelling):
        return False
    return stands_without_space(token[len(prefix)])


def _fallbacks(
    table: TokenTable, characters: Characters, spelling: Spelling, exceptional: list[int]
) -> npt.NDArray[np.bool_]:
    """`is_fallback_token` of every id, vectorised."""
    found = np.zeros(len(table.tokens), dtype=np.bool_)
    if spelling.metaspace:
        found[[token_id for token_id in exceptional if is_fallback_token(table, token_id, spelling)]] = True
    elif spelling.continuation_prefix is not None:
        prefix = spelling.continuation_prefix
        pieces = np.flatnonzero(characters.starting_with(prefix) & (characters.lengths > len(prefix)))
        first, inverse = np.unique(
            characters.code_points[characters.offsets[pieces] + len(prefix)], return_inverse=True
        )
        apart = np.array([stands_without_space(chr(code)) for code in first], dtype=np.bool_)
        found[pieces] = apart[inverse]
    return found


def _to_byte_values(code_points: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
    """The byte for which each character stands in the byte-level alphabet; `_UNDEFINED` where for none."""
    return _BYTE_OF_CODE_POINT[np.minimum(code_points, _BEYOND_ALPHABET)]


def _exceptional_ids(table: TokenTable, characters: Characters, spelling: Spelling) -> list[int]:
    """Ids whose bytes do not follow the vocabulary's ordinary spelling."""
    size = len(table.tokens)
    ids = {token_id for token_id in table.special | table.literal if token_id < size}
    if spelling.byte_characters:
        return list(range(size))
    if set(map(type, table.tokens)) != {str}:
        ids.update(token_id for token_id, token in enumerate(table.tokens) if isinstance(token, bytes))
    bracketed = characters.starting_with("<") | characters.starting_with("[")
    for token_id in np.flatnonzero(bracketed).tolist():
        token = table.tokens[token_id]
        if isinstance(token, str) and (_is_control(token, spelling) or _BYTE_TOKEN.fullmatch(token)):
            ids.add(token_id)
    odd = (characters.code_points >= 0xD800) & (characters.code_points <= 0xDFFF)  # surrogates
    if spelling.byte_level:
        odd = _to_byte_values(characters.code_points) == _UNDEFINED
    ids.update(np.flatnonzero(characters.holding(odd)).tolist())
    return sorted(ids)


def _is_control(token: str, spelling: Spelling) -> bool:
    if CONTROL_TOKEN.fullmatch(token):
        return True
    return spelling.continuation_prefix is not None and _BRACKETED_TOKEN.fullmatch(token) is not None


def _undo_word_piece(token: str, prefix: str) -> str:
    """Drop the continuation prefix, or put the space in front that a word has and punctuation has not."""
    if token.startswith(prefix) and token != prefix:
        return token[len(prefix) :]
    return token if stands_without_space(token[:1]) else " " + token


def stands_without_space(character: str) -> bool:
    """Whether BERT's basic tokenizer makes this character a word of its own: punctuation and CJK ideographs."""
    code_point = ord(character)
    if code_point < 0x80:
        return not character.isalnum()
    if any(low <= code_point <= high for low, high in _CJK_RANGES):
        return True
    return unicodedata.category(character).startswith("P")


def _utf8(text: str, name: str) -> bytes:
    """UTF-8, where U+DC80 to U+DCFF stand for the raw bytes that Python's own escape gives them."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise VocabularyError(
            f"Token {text!r:.60} of {name} holds a lone surrogate, which is no text and stands for no byte; "
            "repair the tokenizer or remove the token."
        ) from None


def _with_exceptions(
    data: npt.NDArray[np.uint8], lengths: npt.NDArray[np.int64], exceptions: dict[int, bytes]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Put the bytes of the exceptional tokens, of length 0 so far, between the others."""
    ids = sorted(exceptions)
    inserted = [exceptions[token_id] for token_id in ids]
    irregular = np.zeros(len(lengths), dtype=np.bool_)
    irregular[ids] = True
    lengths = lengths.copy()
    lengths[ids] = np.fromiter(map(len, inserted), dtype=np.int64, count=len(inserted))
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    merged = np.empty(offsets[-1], dtype=np.uint8)
    from_exception = np.repeat(irregular, lengths)
    merged[~from_exception] = data
    merged[from_exception] = np.frombuffer(b"".join(inserted), dtype=np.uint8)
    return merged, offsets
