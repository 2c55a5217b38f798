"""Reads tokenizer files into token tables: the kind of a file is told from its content, never from its name alone.

Files are parsed here rather than loaded through their library: that needs no further package and no merge tables.
"""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calibfuse.errors import VocabularyError
from calibfuse.vocabulary.sentencepiece import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, read_pieces
from calibfuse.vocabulary.token_table import Hints, TokenTable, decoder_hints, table_from_ids

TOKENIZER_KINDS = "tokenizer.json, a SentencePiece .model, .tiktoken, a WordPiece vocab.txt or vocab.json"
# Ten times the largest tokenizer.json in use: a model's weights, given by mistake, are not read into memory.
_MAX_FILE_SIZE = 400_000_000
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]{1,10}")


@dataclass
class _Side:
    """What the files beside a vocabulary say: added tokens by id, control tokens, and the padding token, by string."""

    added: dict[int, tuple[str, bool]] = field(default_factory=dict)
    special: set[str] = field(default_factory=set)
    padding: set[str] = field(default_factory=set)


def read_file(path: Path, *, beside: Sequence[Path] = ()) -> TokenTable:
    """Read one tokenizer file, with JSON files of a transformers tokenizer beside it that name added tokens."""
    name = str(path)
    data = _read_bytes(path)
    if not data.strip():
        raise VocabularyError(f"The tokenizer file {name} is empty; expected {TOKENIZER_KINDS}.")
    side = _read_side(beside)
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
        table = _from_json(_parse_json(data, name), name, side)
    elif _TIKTOKEN_LINE.fullmatch(data.split(b"\n", 1)[0].rstrip()):
        table = _from_tiktoken(data, name, side)
    elif data[0] == 0x0A:  # field 1, length-delimited: how a SentencePiece model begins
        table = _from_sentencepiece(data, name, side)
    else:
        table = _from_word_list(data, name, side)
    # The files beside name control tokens; padding counts only where it is no ordinary word lent for it.
    apart = table.special | table.literal
    special = {i for i, token in enumerate(table.tokens) if token in side.special}
    special.update(i for i in apart if table.tokens[i] in side.padding)
    return replace(table, special=table.special | special, literal=table.literal - special)


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_FILE_SIZE:
            raise VocabularyError(f"{path} is no tokenizer file; expected {TOKENIZER_KINDS}.")
        return path.read_bytes()
    except OSError as error:
        raise VocabularyError(f"Cannot read the tokenizer file {path}: {error.strerror or error}.") from error


def _parse_json(data: bytes, name: str) -> dict[str, Any]:
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise VocabularyError(f"The tokenizer file {name} is no valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise VocabularyError(f"The JSON in {name} is no tokenizer; expected {TOKENIZER_KINDS}.")
    return content


def _from_json(content: dict[str, Any], name: str, side: _Side) -> TokenTable:
    model = content.get("model")
    try:
        if isinstance(model, dict) and isinstance(model.get("vocab"), (dict, list)):
            return _from_tokenizer_json(content, model, name)
    except VocabularyError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise VocabularyError(f"The vocabulary in {name} is damaged ({error!r}); download it again.") from error
    if content and all(type(token_id) is int for token_id in content.values()):
        return table_from_ids(content.items(), side.added, name=name)
    raise VocabularyError(f"The JSON in {name} is no tokenizer; expected {TOKENIZER_KINDS}.")


def _from_tokenizer_json(content: dict[str, Any], model: dict[str, Any], name: str) -> TokenTable:
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        items, unknown = list(vocab.items()), vocab.get(model.get("unk_token"))
    else:  # Unigram: [token, score] in the order of ids
        items, unknown = [(entry[0], i) for i, entry in enumerate(vocab)], model.get("unk_id")
    entries = content.get("added_tokens") or []
    added = {entry["id"]: (str(entry["content"]), bool(entry.get("special"))) for entry in entries}
    hints = decoder_hints(model, content.get("decoder"), content.get("pre_tokenizer"))
    return table_from_ids(items, added, [] if unknown is None else [unknown], name=name, hints=hints)


def _from_tiktoken(data: bytes, name: str, side: _Side) -> TokenTable:
    """Lines of base64 bytes and their rank; the control tokens that follow are in the files beside it, if anywhere."""
    items: list[tuple[str | bytes, int]] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            items.append((base64.b64decode(token, validate=True), int(rank)))
        except ValueError as error:
            raise VocabularyError(
                f"Line {number} of {name} is no base64 token and its rank; download it again."
            ) from error
    return table_from_ids(items, side.added, name=name)


def _from_sentencepiece(data: bytes, name: str, side: _Side) -> TokenTable:
    try:
        pieces = read_pieces(data)
    except ValueError as error:
        raise VocabularyError(
            f"{name} is a damaged SentencePiece model or no tokenizer ({error}); expected {TOKENIZER_KINDS}."
        ) from error
    control = [token_id for token_id, (_, kind) in enumerate(pieces) if kind in (CONTROL, UNKNOWN, UNUSED)]
    own = {token_id: (text, False) for token_id, (text, kind) in enumerate(pieces) if kind == USER_DEFINED}
    items = [(text, token_id) for token_id, (text, _) in enumerate(pieces)]
    hints = Hints(byte_level=False, metaspace=True)
    return table_from_ids(items, {**own, **side.added}, control, name=name, hints=hints)


def _from_word_list(data: bytes, name: str, side: _Side) -> TokenTable:
    """WordPiece vocab.txt, one token a line; split at newlines only: other line separators are tokens of some lists."""
    try:
        lines = data.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{name} is no tokenizer file; expected {TOKENIZER_KINDS}.") from error
    if "[UNK]" not in lines:
        raise VocabularyError(
            f"{name} is no tokenizer file (a WordPiece vocab.txt has a line [UNK]); expected {TOKENIZER_KINDS}."
        )
    items = [(token, token_id) for token_id, token in enumerate(lines)]
    hints = Hints(byte_level=False, continuation_prefix="##")
    return table_from_ids(items, side.added, name=name, hints=hints)


def _read_side(paths: Sequence[Path]) -> _Side:
    """Read tokenizer_config.json, special_tokens_map.json and added_tokens.json, told apart by their content."""
    side = _Side()
    for path in paths:
        settings = _parse_json(_read_bytes(path), str(path))
        for key, value in settings.items():
            if type(value) is int and path.name == "added_tokens.json":
                side.added.setdefault(value, (key, False))
            elif key == "pad_token":
                side.padding.update(_contents([value]))
            elif key.endswith("_token"):
                side.special.update(_contents([value]))
            elif key in ("additional_special_tokens", "extra_special_tokens"):
                side.special.update(_contents(value))
        entries = settings.get("added_tokens_decoder")
        for token_id, entry in (entries if isinstance(entries, dict) else {}).items():
            if token_id.isdecimal() and len(token_id) <= 10 and isinstance(entry, dict):
                side.added[int(token_id)] = (str(entry.get("content", "")), bool(entry.get("special")))
    return side


def _contents(tokens: object) -> list[str]:
    """Token strings from a list or mapping of strings or serialised added tokens; other settings hold none."""
    entries = list(tokens.values()) if isinstance(tokens, dict) else tokens
    if not isinstance(entries, list):
        return []
    found = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return [token for token in found if isinstance(token, str)]
