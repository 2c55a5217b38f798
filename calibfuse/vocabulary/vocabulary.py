"""The bytes of every token id of one tokenizer: all that the universal calibrator needs to know of a vocabulary.

How tokens spell their bytes is in `byte_strings.py`; where tokenizers come from is in `loading.py`. Left out: encoding
text into ids.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from calibfuse.errors import VocabularyError
from calibfuse.vocabulary.byte_strings import encode_tokens
from calibfuse.vocabulary.loading import load_table
from calibfuse.vocabulary.token_table import TokenTable

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

# What `Vocabulary.from_tokenizer` accepts; a string, so that importing this module imports neither library.
TokenizerLike: TypeAlias = "PreTrainedTokenizerBase | tokenizers.Tokenizer | Vocabulary | str | os.PathLike[str]"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The byte strings of a tokenizer's ids.

    A word that starts after a space carries that space: b" the", in every family of tokenizers. Several ids may have
    the same bytes. Arrays are read-only.

    Attributes:
        data: uint8 [total_bytes]. The bytes of all tokens one after the other.
        offsets: int64 [size + 1]. Token i is data[offsets[i]:offsets[i + 1]].
        is_special: bool [size]. Control tokens (bos, eos, pad, unk, mask, chat marks), holes in the id range and empty
            tokens: they have no text, so no bytes.
        name: where it came from, for messages.

    Example:
        >>> vocabulary = Vocabulary.from_byte_strings([None, b" the", b"re"])
        >>> len(vocabulary), vocabulary.token_bytes(1), vocabulary.is_special.tolist()
        (3, b' the', [True, False, False])
    """

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    is_special: npt.NDArray[np.bool_]
    name: str

    def __post_init__(self) -> None:
        """Check that the arrays fit together and make them read-only.

        Raises:
            VocabularyError: lengths disagree, offsets do not rise from 0 to the end of `data`, or fewer than two ids
                have text, so that there is nothing to choose between.
        """
        size = len(self.is_special)
        if len(self.offsets) != size + 1 or self.offsets[0] != 0 or self.offsets[-1] != len(self.data):
            raise VocabularyError(
                f"Offsets of {self.name} must be {size + 1} numbers from 0 to {len(self.data)}, "
                f"got {len(self.offsets)} of them."
            )
        lengths = np.diff(self.offsets)
        if (lengths < 0).any() or ((lengths == 0) != self.is_special).any():
            raise VocabularyError(f"In {self.name}, exactly the special tokens must have no bytes.")
        usable = size - int(np.count_nonzero(self.is_special))
        if usable < 2:
            raise VocabularyError(
                f"A vocabulary needs at least 2 tokens with text, but {self.name} has {usable} among {size} ids; "
                "check that this is the target model's tokenizer."
            )
        for array in (self.data, self.offsets, self.is_special):
            array.flags.writeable = False

    def __len__(self) -> int:
        """Number of ids, holes included."""
        return len(self.is_special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token.

        Args:
            token_id: 0 <= token_id < len(self).

        Returns:
            Its bytes; empty for special tokens.

        Raises:
            VocabularyError: the id is outside the vocabulary.
        """
        if not 0 <= token_id < len(self):
            raise VocabularyError(
                f"Token id {token_id} is outside the vocabulary of {self.name} (0 to {len(self) - 1})."
            )
        return self.data[self.offsets[token_id] : self.offsets[token_id + 1]].tobytes()

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over offsets, data and is_special; the name does not count."""
        digest = hashlib.sha256(b"calibfuse vocabulary 1")
        digest.update(len(self).to_bytes(8, "little"))
        for array in (self.offsets.astype("<i8"), self.data, self.is_special):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def extended(self, extra: Sequence[bytes]) -> "Vocabulary":
        """The same vocabulary with further tokens at the end.

        Args:
            extra: bytes of the further ids, in order; none of them empty.

        Returns:
            A new vocabulary of len(self) + len(extra) ids.

        Raises:
            VocabularyError: one of the further tokens is empty.
        """
        if not all(extra):
            raise VocabularyError(f"Tokens that extend {self.name} must not be empty; token {extra.index(b'')} is.")
        ends = np.cumsum(np.fromiter(map(len, extra), dtype=np.int64, count=len(extra)))
        return Vocabulary(
            data=np.concatenate([self.data, np.frombuffer(b"".join(extra), dtype=np.uint8)]),
            offsets=np.concatenate([self.offsets, self.offsets[-1] + ends]),
            is_special=np.concatenate([self.is_special, np.zeros(len(extra), dtype=np.bool_)]),
            name=self.name,
        )

    @classmethod
    def from_byte_strings(cls, tokens: Sequence[bytes | None], name: str = "given byte strings") -> "Vocabulary":
        """A vocabulary from the bytes of each id.

        Args:
            tokens: bytes by id; None (or empty) for a special token.
            name: for messages.

        Returns:
            The vocabulary.

        Raises:
            VocabularyError: fewer than two tokens have bytes, or one is neither bytes nor None.
        """
        for token_id, token in enumerate(tokens):
            if token is not None and not isinstance(token, bytes):
                raise VocabularyError(
                    f"Tokens of {name} must be bytes or None, but token {token_id} is {type(token).__name__}."
                )
        lengths = np.fromiter((len(token or b"") for token in tokens), dtype=np.int64, count=len(tokens))
        offsets = np.zeros(len(tokens) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        data = np.frombuffer(b"".join(token or b"" for token in tokens), dtype=np.uint8)
        return cls(data=data, offsets=offsets, is_special=lengths == 0, name=name)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: TokenizerLike,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "Vocabulary":
        """The bytes of every id of a tokenizer.

        Args:
            tokenizer: a transformers tokenizer (fast or slow), a `tokenizers.Tokenizer`, a tiktoken encoding, a path (a
                folder, or a file: tokenizer.json, SentencePiece .model, .tiktoken, tekken.json, vocab.txt, vocab.json),
                a Hub id, or a Vocabulary, which is returned as it is.
            revision: branch, tag or commit, where `tokenizer` is a Hub id.
            local_files_only: do not go to the network for a Hub id; use what is cached.

        Returns:
            The vocabulary; its length is the highest id plus one, which may differ from the width of a model's head.

        Raises:
            VocabularyError: it is no tokenizer, cannot be read or found, or has fewer than two tokens with text.
        """
        if isinstance(tokenizer, Vocabulary):
            return tokenizer
        return cls._from_table(load_table(tokenizer, revision=revision, local_files_only=local_files_only))

    @classmethod
    def _from_table(cls, table: TokenTable) -> "Vocabulary":
        data, offsets = encode_tokens(table)
        return cls(data=data, offsets=offsets, is_special=np.diff(offsets) == 0, name=table.name)
