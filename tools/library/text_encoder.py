"""Cuts text into the ids of whatever a user calls a tokenizer, for reports on text; `Vocabulary` knows bytes alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import tokenizers

from calibfuse.errors import DataError, InputError, MissingDependencyError, reason_of
from calibfuse.vocabulary.tokenizer_files import read_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts -> token ids of each, without begin and end marks.
TextEncoder: TypeAlias = Callable[[list[str]], list[list[int]]]


def text_encoder(
    tokenizer: PreTrainedTokenizerBase | tokenizers.Tokenizer | str | os.PathLike[str],
) -> TextEncoder:
    """How a tokenizer cuts text: an object, or a file (tokenizer.json, SentencePiece .model, WordPiece vocab.txt).

    A vocab.txt lower-cases unless it has words with capitals.

    Raises:
        InputError: a file that lists tokens without saying how text becomes tokens.
        DataError: the file is damaged.
        MissingDependencyError: a SentencePiece model, and the package sentencepiece is not installed.
    """
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return _library_encoder(tokenizer)
    if isinstance(tokenizer, (str, os.PathLike)):
        return _file_encoder(Path(os.fspath(tokenizer)).expanduser())
    return lambda texts: [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def _library_encoder(tokenizer: tokenizers.Tokenizer) -> TextEncoder:
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _file_encoder(path: Path) -> TextEncoder:
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError as error:
        raise DataError(f"Cannot read the tokenizer file {path}: {error.strerror or error}.") from error
    try:
        if head[:1] == b"{":
            return _library_encoder(tokenizers.Tokenizer.from_file(str(path)))
        if path.suffix == ".model":
            return _sentencepiece_encoder(path)
    except MissingDependencyError:
        raise
    except Exception as error:  # the libraries raise many kinds
        raise DataError(f"{str(path)!r} is a damaged tokenizer file: {reason_of(error)}.") from error
    if path.suffix == ".txt":
        tokens = [str(token) for token in read_file(path).tokens]
        cased = any(token[:1].isalpha() and token != token.lower() for token in tokens)
        return _library_encoder(tokenizers.BertWordPieceTokenizer(str(path), lowercase=not cased))
    raise InputError(
        f"{str(path)!r} lists tokens, but does not say how a text is cut into them; give the folder of the tokenizer, "
        "its tokenizer.json, SentencePiece .model or vocab.txt, or leave the text out."
    )


def _sentencepiece_encoder(path: Path) -> TextEncoder:
    try:
        import sentencepiece
    except ImportError as error:
        raise MissingDependencyError(
            f"Cutting a text with the SentencePiece model {str(path)!r} needs the package sentencepiece: "
            "pip install sentencepiece."
        ) from error
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return lambda texts: [list(processor.encode(text)) for text in texts]
