"""Token tables of tokenizers in memory: `tokenizers.Tokenizer`, transformers tokenizers, tiktoken encodings.

They are told apart by what they can do, never by the name of their class, so this module imports none of the libraries.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from calibfuse.errors import VocabularyError, reason_of
from calibfuse.vocabulary.token_table import Hints, TokenTable, added_roles, decoder_hints, table_from_ids

_UNKNOWN_ID = re.compile(rb'"unk_id":\s*(\d+)')
# Every role but padding: an ordinary word that a user lent as padding ("!" in GPT-2) keeps its text.
_CONTROL_ROLES = ("bos", "eos", "unk", "sep", "cls", "mask")


class _AddedToken(Protocol):
    content: str
    special: bool


class _Part(Protocol):
    """A decoder or pre-tokenizer of the tokenizers library; pickling it yields JSON."""

    def __getstate__(self) -> bytes: ...


class _Model(_Part, Protocol):
    def id_to_token(self, id: int) -> str | None: ...


@runtime_checkable
class LibraryTokenizer(Protocol):
    """What is used of a `tokenizers.Tokenizer`."""

    model: _Model
    decoder: _Part | None
    pre_tokenizer: _Part | None

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]: ...  # noqa: D102
    def get_vocab_size(self, with_added_tokens: bool = True) -> int: ...  # noqa: D102
    def get_added_tokens_decoder(self) -> dict[int, _AddedToken]: ...  # noqa: D102
    def id_to_token(self, id: int) -> str | None: ...  # noqa: D102
    def token_to_id(self, token: str) -> int | None: ...  # noqa: D102


@runtime_checkable
class TransformersTokenizer(Protocol):
    """What is used of a transformers tokenizer; a fast one has a `backend_tokenizer` besides."""

    all_special_ids: list[int]
    pad_token_id: int | None

    def get_vocab(self) -> dict[str, int]: ...  # noqa: D102
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...  # noqa: D102


@runtime_checkable
class TiktokenEncoding(Protocol):
    """What is used of a `tiktoken.Encoding`."""

    name: str
    n_vocab: int
    special_tokens_set: set[str]

    def encode_single_token(self, text_or_bytes: str) -> int: ...  # noqa: D102
    def decode_single_token_bytes(self, token: int) -> bytes: ...  # noqa: D102


def read_object(tokenizer: object) -> TokenTable:
    """The token table of a tokenizer in memory.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, a transformers tokenizer or a tiktoken encoding; not changed.

    Returns:
        Its tokens by id.

    Raises:
        VocabularyError: it is none of these, or cannot list its vocabulary.
    """
    if isinstance(tokenizer, LibraryTokenizer):
        return _from_library(tokenizer, "the given tokenizers.Tokenizer")
    if isinstance(tokenizer, TransformersTokenizer):
        return _from_transformers(tokenizer)
    if isinstance(tokenizer, TiktokenEncoding):
        return _from_tiktoken(tokenizer)
    raise VocabularyError(
        "Expected a transformers tokenizer, a tokenizers.Tokenizer, a path or a Hub id, "
        f"got {type(tokenizer).__name__}."
    )


def _from_library(tokenizer: LibraryTokenizer, name: str) -> TokenTable:
    added = {i: (token.content, token.special) for i, token in tokenizer.get_added_tokens_decoder().items()}
    # Asking id by id is faster than `get_vocab`, and in order. A model of n tokens without holes has the ids up to n.
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    tokens: list[str | bytes | None] = list(map(tokenizer.id_to_token, range(max([size - 1, *added]) + 1)))
    if None in tokens[:size] or any(tokenizer.model.id_to_token(i) is None for i in added if i < size):
        listed = table_from_ids(tokenizer.get_vocab(with_added_tokens=True).items(), {}, name=name).tokens
        tokens = [tokenizer.id_to_token(i) for i in range(max(len(listed), len(tokens)))]
    for token_id, (content, _) in added.items():
        tokens[token_id] = content
    marks, literal = added_roles(added, tokenizer.model.id_to_token)
    special = marks.union(_unknown_ids(tokenizer))
    return TokenTable(
        tokens=tokens,
        special=special,
        literal=literal - special,
        name=name,
        hints=_hints(tokenizer),
    )


def _unknown_ids(tokenizer: LibraryTokenizer) -> list[int]:
    """The id of the unknown token, if there is one."""
    if hasattr(tokenizer.model, "unk_token"):
        unknown = tokenizer.model.unk_token
        token_id = tokenizer.token_to_id(unknown) if unknown else None
        return [] if token_id is None else [token_id]
    # A Unigram model shows the id nowhere but at the head of its serialised form.
    found = _UNKNOWN_ID.search(tokenizer.model.__getstate__()[:200])
    return [int(found.group(1))] if found else []


def _hints(tokenizer: LibraryTokenizer) -> Hints:
    settings = {
        "continuing_subword_prefix": getattr(tokenizer.model, "continuing_subword_prefix", None),
        "end_of_word_suffix": getattr(tokenizer.model, "end_of_word_suffix", None),
        "type": type(tokenizer.model).__name__,
    }
    return decoder_hints(settings, _serialised(tokenizer.decoder), _serialised(tokenizer.pre_tokenizer))


def _serialised(part: _Part | None) -> object:
    """A part as parsed JSON; None where there is none, or one written in Python, which has no serialised form."""
    if part is None:
        return None
    try:
        return json.loads(part.__getstate__())
    except Exception:  # the library raises bare Exception for parts written in Python
        return None


def _from_transformers(tokenizer: TransformersTokenizer) -> TokenTable:
    name = str(getattr(tokenizer, "name_or_path", "") or "the given tokenizer")
    decoder: Mapping[int, _AddedToken] = getattr(tokenizer, "added_tokens_decoder", None) or {}
    added = {int(token_id): (str(token.content), bool(token.special)) for token_id, token in decoder.items()}
    special = {token_id for token_id in tokenizer.all_special_ids if isinstance(token_id, int)}
    if tokenizer.pad_token_id not in added:
        controls = {getattr(tokenizer, f"{role}_token_id", None) for role in _CONTROL_ROLES}
        special = {token_id for token_id in special if token_id != tokenizer.pad_token_id or token_id in controls}
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, LibraryTokenizer):
        return _from_python(tokenizer, added, special, name)
    table = _from_library(backend, name)
    return TokenTable(
        tokens=table.tokens,
        special=table.special | special,
        literal=table.literal - special,
        name=name,
        hints=table.hints,
    )


def _from_python(
    tokenizer: TransformersTokenizer, added: dict[int, tuple[str, bool]], special: set[int], name: str
) -> TokenTable:
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


def _from_tiktoken(encoding: TiktokenEncoding) -> TokenTable:
    special = {encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    tokens: list[str | bytes | None] = []
    for token_id in range(encoding.n_vocab):
        try:
            tokens.append(encoding.decode_single_token_bytes(token_id))
        except KeyError:
            tokens.append(None)
    name = f"the tiktoken encoding {encoding.name}"
    return TokenTable(tokens=tokens, special=frozenset(special), literal=frozenset(), name=name)
