"""Turns any tokenizer into the bytes of each of its token ids: `Vocabulary.from_tokenizer`."""

from calibfuse.vocabulary.byte_strings import SPELLING_VERSION
from calibfuse.vocabulary.loading import load_table, quick_fingerprint
from calibfuse.vocabulary.vocabulary import TokenizerLike, Vocabulary

__all__ = ["SPELLING_VERSION", "TokenizerLike", "Vocabulary", "load_table", "quick_fingerprint"]
