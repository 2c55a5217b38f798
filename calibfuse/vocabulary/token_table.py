"""What every tokenizer is reduced to before its tokens become bytes: token strings by id, and what is known of them."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from calibfuse.errors import VocabularyError

# Above every vocabulary in use (about 260,000) by an order of magnitude; a stray id of 4e9 must not allocate gigabytes.
MAX_VOCABULARY_SIZE = 4_194_304
# `<|endoftext|>`, with DeepSeek's full-width bars too: control syntax by convention; some tokenizer files hold such
# tokens as ordinary entries.
CONTROL_TOKEN = re.compile(r"<[|\uff5c][^|\uff5c<>\s]+[|\uff5c]>")
# `<think>`, `</s>`, `<start_of_image>`, `[INST]`, `|||EMAIL|||`: a name between brackets or bars.
_BRACKETED_NAME = re.compile(r"<[^<>\s]*[^\W\d_][^<>\s]*>|\[[^\[\]\s]*[^\W\d_][^\[\]\s]*\]|\|{2,}[^|\s]+\|{2,}")
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Elements that only lay text out; some vocabularies (Gemma) have them as added tokens. `<s>`, which HTML has too, marks
# a sentence in most vocabularies, and `<search>` or `<output>` a step of a model.
_HTML_TAG = re.compile(
    r"</?(?:a|b|blockquote|body|br|caption|code|div|em|footer|h[1-6]|head|header|hr|html|i|iframe|img|li|ol|p|pre|span"
    r"|strong|sub|sup|table|tbody|td|tfoot|th|thead|tr|u|ul)/?>",
    re.IGNORECASE,
)
_WHITE_SPACE_SPLITTERS = frozenset({"Whitespace", "WhitespaceSplit", "BertPreTokenizer"})


@dataclass(frozen=True)
class Hints:
    """What a tokenizer says about how its tokens are spelled; all optional, consulted where the tokens leave doubt."""

    byte_level: bool | None = None  # its decoder undoes the byte-level alphabet; None where it has no decoder
    metaspace: bool | None = None  # its decoder turns U+2581 into a space; None likewise
    continuation_prefix: str | None = None  # what marks a piece inside a word ("##")
    word_suffix: str | None = None  # what marks the last piece of a word ("</w>")
    whole_words: bool = False  # tokens are whole words split at white space (a word-level model)


@dataclass(frozen=True)
class TokenTable:
    """The tokens of one tokenizer by id, before they are turned into bytes."""

    tokens: list[str | bytes | None]  # None for a hole in the id range
    special: frozenset[int]  # ids of control tokens
    literal: frozenset[int]  # of tokens added by hand that stand for their own text, outside the model's spelling
    name: str  # where the tokenizer came from, for messages
    hints: Hints = field(default_factory=Hints)

    def fingerprint(self) -> str | None:
        """Hex digest of all that decides the bytes of the tokens; None for raw bytes, which need no decoding."""
        kinds = set(map(type, self.tokens))
        if not kinds <= {str, type(None)}:
            return None
        holes = [token_id for token_id, token in enumerate(self.tokens) if token is None] if type(None) in kinds else []
        strings = cast("list[str]", [token or "" for token in self.tokens] if holes else self.tokens)
        digest = hashlib.blake2b(b"calibfuse token table 1", digest_size=32)
        digest.update(np.fromiter(map(len, strings), dtype="<i8", count=len(strings)).tobytes())
        digest.update("".join(strings).encode("utf-8", "surrogatepass"))
        digest.update(repr((sorted(self.special), sorted(self.literal), holes, self.hints)).encode())
        return digest.hexdigest()


def table_from_ids(
    items: Iterable[tuple[str | bytes, int]],
    added: Mapping[int, tuple[str, bool]],
    special: Iterable[int] = (),
    *,
    name: str,
    hints: Hints | None = None,
) -> TokenTable:
    """Lay tokens out by id; ids that nobody claims are holes (None).

    Where two strings of `items` claim one id, the one that sorts last wins, so that the order does not matter. `added`:
    id -> (content, is special) of tokens added outside the model, which win; `special`: further ids of control tokens.
    """
    pairs, control = list(items), list(special)
    highest = -1
    for token, token_id in itertools.chain(pairs, ((content, i) for i, (content, _) in added.items())):
        if type(token_id) is not int or not 0 <= token_id < MAX_VOCABULARY_SIZE:
            raise VocabularyError(
                f"Token ids must be integers from 0 to {MAX_VOCABULARY_SIZE - 1}, but {name} gives {token_id!r:.60} to "
                f"{token!r:.60}."
            )
        if not isinstance(token, (str, bytes)):
            raise VocabularyError(f"Tokens must be strings or bytes, but {name} has {token!r:.60} at id {token_id}.")
        highest = max(highest, token_id)
    for token_id in control:
        if type(token_id) is not int or token_id < 0:
            raise VocabularyError(f"Ids of control tokens must be integers from 0, but {name} gives {token_id!r:.60}.")
    tokens: list[str | bytes | None] = [None] * (highest + 1)
    for token, token_id in pairs:
        other = tokens[token_id]
        if other is None or _sort_key(token) > _sort_key(other):
            tokens[token_id] = token
    marks, literal = added_roles(added, tokens.__getitem__)
    for token_id, (content, _) in added.items():
        tokens[token_id] = content
    return TokenTable(tokens, marks | frozenset(control), literal, name, hints or Hints())


def is_mark(content: str) -> bool:
    """Whether an added token is a control mark by its looks, whatever its special flag says.

    Real tokenizer files leave the flag off `<think>`, `<|fim_prefix|>`, `<｜User｜>` (DeepSeek), `<|12.54|>` (Whisper)
    and `</s>` (Phi-3). A mark is a name in angle or square brackets or between bars, without white space, but no byte
    token, no tag of HTML that lays text out, and no bracket around no letter.

    Example:
        >>> [is_mark(token) for token in ("<think>", "<|12.54|>", "[INST]", "<td>", "[1]", "word")]
        [True, True, True, False, False, False]
    """
    content = content.strip()
    if CONTROL_TOKEN.fullmatch(content):
        return True
    return bool(
        _BRACKETED_NAME.fullmatch(content) and not _HTML_TAG.fullmatch(content) and not BYTE_TOKEN.fullmatch(content)
    )


def added_roles(
    added: Mapping[int, tuple[str, bool]], model_token: Callable[[int], str | bytes | None]
) -> tuple[frozenset[int], frozenset[int]]:
    """Ids of the added tokens (id -> content, is special) that are control tokens, and of those that are literal.

    The others are the model's own tokens under the same id, spelled as the model spells them.
    """
    special = frozenset(i for i, (content, is_special) in added.items() if is_special or is_mark(content))
    literal = {i for i, (content, _) in added.items() if model_token(i) != content}
    return special, frozenset(literal - special)


def _sort_key(token: str | bytes) -> tuple[bool, str | bytes]:
    return isinstance(token, bytes), token


def decoder_hints(model: Mapping[str, Any], decoder: object, pre_tokenizer: object) -> Hints:
    """What the parts of a tokenizer.json, as parsed JSON, say about the spelling of its tokens.

    Of the model, its "type", "continuing_subword_prefix" and "end_of_word_suffix" count.
    """
    steps, splitters = _steps(decoder), _steps(pre_tokenizer)
    kinds = {step.get("type") for step in steps}
    metaspace = bool(kinds & {"Metaspace", "ByteFallback"}) or "\\u2581" in json.dumps(steps)
    prefixes = [step.get("prefix") for step in steps if step.get("type") == "WordPiece"]
    suffixes = [step.get("suffix") for step in steps if step.get("type") == "BPEDecoder"]
    byte_level = True if "ByteLevel" in kinds else False if metaspace or prefixes or suffixes else None
    return Hints(
        byte_level=byte_level,
        metaspace=metaspace if steps else None,
        continuation_prefix=_first_text(model.get("continuing_subword_prefix"), *prefixes),
        word_suffix=_first_text(model.get("end_of_word_suffix"), *suffixes),
        whole_words=model.get("type") == "WordLevel"
        and any(step.get("type") in _WHITE_SPACE_SPLITTERS for step in splitters),
    )


def _first_text(*values: object) -> str | None:
    return next((value for value in values if isinstance(value, str) and value), None)


def _steps(part: object) -> list[dict[str, Any]]:
    if not isinstance(part, dict):
        return []
    nested = [step for key in ("decoders", "pretokenizers") for child in part.get(key) or [] for step in _steps(child)]
    return nested or [part]
