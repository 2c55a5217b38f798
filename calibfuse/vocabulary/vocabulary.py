"""The bytes of every token id of one tokenizer: all that the universal calibrator needs to know of a vocabulary."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
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
# What ids that are never made get of the probability of their bytes: finite, so that no score becomes -inf.
FALLBACK_SHARE = 1e-3


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The byte strings of a tokenizer's ids.

    A word that starts after a space carries that space: b" the", in every family of tokenizers. Several ids may have
    the same bytes. Arrays are read-only.

    Example:
        >>> vocabulary = Vocabulary.from_byte_strings([None, b" the", b"re"])
        >>> len(vocabulary), vocabulary.token_bytes(1), vocabulary.is_special.tolist()
        (3, b' the', [True, False, False])
    """

    data: npt.NDArray[np.uint8]  # [total_bytes], of all tokens one after the other
    offsets: npt.NDArray[np.int64]  # [size + 1]: token i is data[offsets[i]:offsets[i + 1]]
    is_special: npt.NDArray[np.bool_]  # [size]: control tokens, holes in the id range and empty tokens; without bytes
    name: str  # where it came from, for messages
    # [size]: ids that the tokenizer uses only where no other id has the same bytes: byte tokens (`<0x2C>` beside `,`)
    # and WordPiece's inner pieces of punctuation (`##,` beside `,`). Default: no id is one.
    is_fallback: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))

    def __post_init__(self) -> None:
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
        if not len(self.is_fallback):
            object.__setattr__(self, "is_fallback", np.zeros(size, dtype=np.bool_))
        if self.is_fallback.shape != (size,):
            raise VocabularyError(f"is_fallback of {self.name} must be {size} flags, not {self.is_fallback.shape}.")
        for array in (self.data, self.offsets, self.is_special, self.is_fallback):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.is_special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; empty for special tokens. An id outside the vocabulary is a VocabularyError."""
        if not 0 <= token_id < len(self):
            raise VocabularyError(
                f"Token id {token_id} is outside the vocabulary of {self.name} (0 to {len(self) - 1})."
            )
        return self.data[self.offsets[token_id] : self.offsets[token_id + 1]].tobytes()

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over offsets, data and is_special; neither the name nor is_fallback counts."""
        digest = hashlib.sha256(b"calibfuse vocabulary 1")
        digest.update(len(self).to_bytes(8, "little"))
        for array in (self.offsets.astype("<i8"), self.data, self.is_special):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @cached_property
    def log_shares(self) -> npt.NDArray[np.float32]:
        """How much of the probability of its bytes each id gets, as a logarithm: float32 [size], 0 where it gets all.

        Ids that the tokenizer really uses share alike; fallbacks beside them get `FALLBACK_SHARE` together.
        """
        shares = np.zeros(len(self), dtype=np.float32)
        for ids in self._ids_with_equal_bytes():
            fallbacks = [token_id for token_id in ids if self.is_fallback[token_id]]
            used = [token_id for token_id in ids if not self.is_fallback[token_id]]
            if not (fallbacks and used):
                shares[ids] = -math.log(len(ids))
                continue
            shares[fallbacks] = math.log(FALLBACK_SHARE / len(fallbacks))
            shares[used] = math.log((1.0 - FALLBACK_SHARE) / len(used))
        return shares

    def _ids_with_equal_bytes(self) -> list[list[int]]:
        whole, covered = self.data.tobytes(), np.flatnonzero(~self.is_special)
        begins, ends = self.offsets[covered].tolist(), self.offsets[covered + 1].tolist()
        # By their hashes first: to hold the bytes of all tokens at once would take 25 MB for 150,000 of them.
        hashes = np.fromiter((hash(whole[begin:end]) for begin, end in zip(begins, ends, strict=True)), dtype=np.int64)
        _, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        groups: dict[bytes, list[int]] = {}
        for token_id in covered[counts[which] > 1].tolist():
            groups.setdefault(self.token_bytes(token_id), []).append(token_id)
        return [ids for ids in groups.values() if len(ids) > 1]

    def extended(self, extra: Sequence[bytes]) -> "Vocabulary":
        """A new vocabulary with further tokens, none of them empty, at the end: the bytes of each, in order."""
        if not all(extra):
            raise VocabularyError(f"Tokens that extend {self.name} must not be empty; token {extra.index(b'')} is.")
        ends = np.cumsum(np.fromiter(map(len, extra), dtype=np.int64, count=len(extra)))
        return Vocabulary(
            data=np.concatenate([self.data, np.frombuffer(b"".join(extra), dtype=np.uint8)]),
            offsets=np.concatenate([self.offsets, self.offsets[-1] + ends]),
            is_special=np.concatenate([self.is_special, np.zeros(len(extra), dtype=np.bool_)]),
            name=self.name,
            is_fallback=np.concatenate([self.is_fallback, np.zeros(len(extra), dtype=np.bool_)]),
        )

    @classmethod
    def from_byte_strings(cls, tokens: Sequence[bytes | None], name: str = "given byte strings") -> "Vocabulary":
        """A vocabulary from the bytes of each id: None (or empty) for a special token; `name` is for messages."""
        for token_id, token in enumerate(tokens):
            if token is not None and not isinstance(token, bytes):
                raise VocabularyError(
                    f"Tokens of {name} must be bytes or None, but token {token_id} is {type(token).__name__}."
                )
        return cls._laid_out([token or b"" for token in tokens], name)

    @classmethod
    def _laid_out(
        cls, tokens: Sequence[bytes], name: str, is_fallback: npt.NDArray[np.bool_] | None = None
    ) -> "Vocabulary":
        lengths = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
        data, offsets = np.frombuffer(b"".join(tokens), dtype=np.uint8), np.append(0, np.cumsum(lengths))
        flags = np.zeros(len(tokens), dtype=np.bool_) if is_fallback is None else is_fallback
        return cls(data=data, offsets=offsets, is_special=lengths == 0, name=name, is_fallback=flags)

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
            tokenizer: a transformers tokenizer (fast or slow), a `tokenizers.Tokenizer`, a path (a folder, or a file:
                tokenizer.json, SentencePiece .model, .tiktoken, vocab.txt, vocab.json), a Hub id, or a Vocabulary,
                which is returned as it is.
            revision: branch, tag or commit, where `tokenizer` is a Hub id.
            local_files_only: do not go to the network for a Hub id; use what is cached.

        Returns:
            The vocabulary; its length is the highest id plus one, which may differ from the width of a model's head.

        Raises:
            VocabularyError: it is no tokenizer, cannot be read or found, or has fewer than two tokens with text.
        """
        if isinstance(tokenizer, Vocabulary):
            return tokenizer
        return cls.from_table(load_table(tokenizer, revision=revision, local_files_only=local_files_only))

    @classmethod
    def from_table(cls, table: TokenTable) -> "Vocabulary":
        """The bytes of every token of a table; see `from_tokenizer`."""
        tokens, is_fallback = encode_tokens(table)
        return cls._laid_out(tokens, table.name, is_fallback)
