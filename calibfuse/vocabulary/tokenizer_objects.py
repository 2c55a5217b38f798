"""Token tables of tokenizers in memory: a `tokenizers.Tokenizer`, or what does what a transformers tokenizer does."""

import json
import re
from dataclasses import replace
from typing import Any

import tokenizers

from calibfuse.errors import VocabularyError, reason_of
from calibfuse.vocabulary.token_table import Hints, TokenTable, added_roles, decoder_hints, table_from_ids

_UNKNOWN_ID = re.compile(rb'"unk_id":\s*(\d+)')
# Every role but padding: an ordinary word that a user lent as padding ("!" in GPT-2) keeps its text.
_CONTROL_ROLES = ("bos", "eos", "unk", "sep", "cls", "mask")
_TRANSFORMERS = ("all_special_ids", "pad_token_id", "get_vocab", "convert_ids_to_tokens")


def read_object(tokenizer: Any) -> TokenTable:  # noqa: ANN401
    """The token table of a tokenizer in memory, which is not changed."""
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return _from_library(tokenizer, "the given tokenizers.Tokenizer")
    if all(hasattr(tokenizer, name) for name in _TRANSFORMERS):
        return _from_transformers(tokenizer)
    raise VocabularyError(
        "Expected a transformers tokenizer, a tokenizers.Tokenizer, a path or a Hub id, "
        f"got {type(tokenizer).__name__}."
    )


def _from_library(tokenizer: Any, name: str) -> TokenTable:  # noqa: ANN401 (the stubs lack half of what is used)
    added = {i: (token.content, token.special) for i, token in tokenizer.get_added_tokens_decoder().items()}
    # Asking id by id is faster than `get_vocab`, and in order. A model of n tokens without holes has the ids up to n.
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    tokens: list[str | bytes | None] = list(map(tokenizer.id_to_token, range(max([size - 1, *added]) + 1)))
    if None in tokens[:size] or any(tokenizer.model.id_to_token(i) is None for i in added if i < size):
        listed = table_from_ids(tokenizer.get_vocab(with_added_tokens=True).items(), {}, name=name).tokens
        tokens = [tokenizer.id_to_token(i) for i in range(max(len(listed), len(tokens)))]
    for token_id, (content, _) in added.items():
        tokens[token_id] = content
    special, literal = added_roles(added, tokenizer.model.id_to_token)
    special = special.union(_unknown_ids(tokenizer))
    return TokenTable(tokens, special, literal - special, name, _hints(tokenizer))


def _unknown_ids(tokenizer: Any) -> list[int]:  # noqa: ANN401
    if hasattr(tokenizer.model, "unk_token"):
        unknown = tokenizer.model.unk_token
        token_id = tokenizer.token_to_id(unknown) if unknown else None
        return [] if token_id is None else [token_id]
    # A Unigram model shows the id nowhere but at the head of its serialised form.
    found = _UNKNOWN_ID.search(tokenizer.model.__getstate__()[:200])
    return [int(found.group(1))] if found else []


def _hints(tokenizer: Any) -> Hints:  # noqa: ANN401
    names = ("continuing_subword_prefix", "end_of_word_suffix")
    settings = {name: getattr(tokenizer.model, name, None) for name in names}
    settings["type"] = type(tokenizer.model).__name__
    return decoder_hints(settings, _serialised(tokenizer.decoder), _serialised(tokenizer.pre_tokenizer))


def _serialised(part: Any) -> object:  # noqa: ANN401
    """A part as parsed JSON; None where there is none, or one written in Python, which has no serialised form."""
    if part is None:
        return None
    try:
        return json.loads(part.__getstate__())
    except Exception:  # the library raises bare Exception for parts written in Python
        return None


def _from_transformers(tokenizer: Any) -> TokenTable:  # noqa: ANN401
    name = str(getattr(tokenizer, "name_or_path", "") or "the given tokenizer")
    decoder = getattr(tokenizer, "added_tokens_decoder", None) or {}
    added = {int(token_id): (str(token.content), bool(token.special)) for token_id, token in decoder.items()}
    special = {token_id for token_id in tokenizer.all_special_ids if isinstance(token_id, int)}
    if tokenizer.pad_token_id not in added:
        controls = {getattr(tokenizer, f"{role}_token_id", None) for role in _CONTROL_ROLES}
        special = {token_id for token_id in special if token_id != tokenizer.pad_token_id or token_id in controls}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        return _from_python(tokenizer, added, special, name)
    table = _from_library(backend, name)
    return replace(table, special=table.special | special, literal=table.literal - special)


def _from_python(tokenizer: Any, added: dict[int, tuple[str, bool]], special: set[int], name: str) -> TokenTable:  # noqa: ANN401
    """A slow transformers tokenizer. It lists each string once, so that ids with equal strings look like holes."""
    try:
        # The list holds added tokens as well: those beyond the model's own size are not the model's.
        size = getattr(tokenizer, "vocab_size", 0)
        items = [(token, i) for token, i in tokenizer.get_vocab().items() if i not in added or i < size]
        table = table_from_ids(items, added, special, name=name)
        unlisted = [token_id for token_id, token in enumerate(table.tokens) if token is None]
        tokens = tokenizer.convert_ids_to_tokens(unlisted)
    except VocabularyError:
        raise
    except Exception as error:  # tokenizers with code of their own raise whatever they like
        raise VocabularyError(
            f"The tokenizer {name} cannot list its vocabulary ({type(error).__name__}: {reason_of(error)})."
        ) from error
    controls = {table.tokens[token_id] for token_id in table.special}
    for token_id, token in zip(unlisted, tokens, strict=True):
        if token not in controls:  # for a real hole, many give their unknown token
            table.tokens[token_id] = token
    return table
