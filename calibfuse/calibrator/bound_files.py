"""The disk cache of binding: bound vectors by calibrator and vocabulary, and vocabularies by tokenizer file.

A damaged file costs a warning and is made again: files are mapped, and a plain sum finds damage at memory's speed.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from calibfuse import __version__, hub
from calibfuse.errors import CheckpointError, VocabularyError
from calibfuse.vocabulary import SPELLING_VERSION, TokenizerLike, Vocabulary, load_table, quick_fingerprint

logger = logging.getLogger(__name__)

_VOCABULARY_FIELDS = ("data", "offsets", "is_special", "is_fallback")
# The names sort so that the vectors come first: they are mapped where the file begins, and matrices that lie on a
# cache line are multiplied faster, and to the same last bit as freshly composed ones.
_VECTORS, _BIASES = "vectors", "vectors.biases"
_ALIGNMENT = 64
_LAYOUT = 6  # of the files here, and of what `compose_vocabulary` puts into them
_CHECKSUM = "zz.checksum"
_CHECKSUM_START = 0x5CA1AB1E  # not 0, or a file of zeroed pages would be whole


def cache_folder() -> Path | None:
    """Where bound vectors are kept: CALIBFUSE_CACHE, else $XDG_CACHE_HOME/calibfuse, else ~/.cache/calibfuse.

    None, with a warning, where the user has no home directory (containers that run under a foreign user id).
    """
    explicit = os.environ.get("CALIBFUSE_CACHE")
    try:
        if explicit:
            return Path(explicit).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "calibfuse"
    except RuntimeError as error:  # of pathlib
        logger.warning("Nothing is cached (%s); set CALIBFUSE_CACHE to a folder that can be written.", error)
        return None


def bound_path(calibrator_fingerprint: str, vocabulary: Vocabulary, dtype: torch.dtype, version: int) -> Path | None:
    """The file of one calibrator's vectors for one vocabulary; None where there is no place for a cache."""
    folder = cache_folder()
    if folder is None:
        return None
    # Byte strings and fallbacks: all that the bound vectors and biases depend on.
    fallbacks = zlib.crc32(vocabulary.is_fallback.tobytes())
    name = str(dtype).removeprefix("torch.")
    key = f"{calibrator_fingerprint[:24]}-{vocabulary.fingerprint[:24]}-{fallbacks:08x}-{name}-v{version}.{_LAYOUT}"
    return folder / "bound" / f"{key}.safetensors"


def load_bound(path: Path | None, vectors: tuple[int, int], biases: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Vectors and biases of the given shapes, memory-mapped; None where there are no good ones."""
    shapes = {_VECTORS: vectors, _BIASES: biases, _CHECKSUM: (8,)}
    tensors = _load(path, shapes, "composing the vocabulary again")
    return None if tensors is None else (tensors[_VECTORS], tensors[_BIASES])


def save_bound(path: Path | None, vectors: Tensor, biases: Tensor) -> None:
    """Write what `load_bound` reads; where that is impossible, warn."""
    _save(path, {_VECTORS: vectors, _BIASES: biases}, "The bound vocabulary")


def vocabulary_of(tokenizer: TokenizerLike, *, use_disk_cache: bool = True) -> Vocabulary:
    """`Vocabulary.from_tokenizer`, remembered on disk unless `use_disk_cache` is False.

    A path is known by the contents of its files. An object in memory may have changed since it was loaded, so its
    tokens are read in any case; what is remembered is how they become bytes.
    """
    if isinstance(tokenizer, Vocabulary) or not use_disk_cache:
        return Vocabulary.from_tokenizer(tokenizer)
    key, table = quick_fingerprint(tokenizer), None
    if key is None:
        table = load_table(tokenizer)
        key = table.fingerprint()
        if key is None:
            return Vocabulary.from_table(table)
    folder = cache_folder()
    path = folder and folder / "vocabularies" / f"{key[:32]}-{__version__}-{SPELLING_VERSION}.safetensors"
    tensors = _load(path, None, "reading the tokenizer again")
    if tensors is not None:
        try:
            arrays = {field: tensors[field].numpy() for field in _VOCABULARY_FIELDS}
            return Vocabulary(**arrays, name=str(tokenizer) if table is None else table.name)
        except (KeyError, VocabularyError) as error:
            logger.warning("Ignoring the damaged cache file %s and reading the tokenizer again: %r", path, error)
    vocabulary = Vocabulary.from_tokenizer(tokenizer) if table is None else Vocabulary.from_table(table)
    read = {field: torch.from_numpy(getattr(vocabulary, field).copy()) for field in _VOCABULARY_FIELDS}
    _save(path, read, "The vocabulary")
    return vocabulary


def checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """A sum over the bytes of tensors, with the names' order: uint8 [8]; finds damage, not malice."""
    total = _CHECKSUM_START
    for name in sorted(tensors):
        flat = tensors[name].detach().reshape(-1).view(torch.uint8)
        whole = len(flat) // 8 * 8
        total = total * 31 + int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())
    return torch.tensor(list((total % (1 << 64)).to_bytes(8, "little")), dtype=torch.uint8, device="cpu")


def _load(path: Path | None, shapes: Mapping[str, tuple[int, ...]] | None, instead: str) -> dict[str, Tensor] | None:
    try:
        if path is None or not path.is_file():
            return None
        tensors = hub.read_tensors(path, expected=shapes)
        said = tensors.pop(_CHECKSUM, None)
        if said is not None and torch.equal(said, checksum(tensors)):
            return tensors
        raise CheckpointError("its contents do not add up to the sum saved with them")
    except CheckpointError as error:
        logger.warning("Ignoring the damaged cache file %s and %s: %s", path, instead, error)
    except OSError as error:  # the folder may not be entered
        logger.warning("Not reading the cache file %s, %s: %s", path, instead, error)
    return None


def _save(path: Path | None, tensors: Mapping[str, Tensor], what: str) -> None:
    if path is None:
        return
    try:
        contents = {**tensors, _CHECKSUM: checksum(tensors)}
        hub.write_tensors(path, contents, fingerprint=False, durable=False, alignment=_ALIGNMENT)
    except CheckpointError as error:
        logger.warning("%s could not be cached; it will be made again next time: %s", what, error)
