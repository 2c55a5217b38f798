"""Turns any tokenizer into the bytes of each of its token ids: `Vocabulary.from_tokenizer`."""

from calibfuse.vocabulary.loading import quick_fingerprint
from calibfuse.vocabulary.vocabulary import TokenizerLike, Vocabulary

__all__ = ["TokenizerLike", "Vocabulary", "quick_fingerprint"]
