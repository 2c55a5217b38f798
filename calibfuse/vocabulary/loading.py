"""Finds the token table of whatever a user calls a tokenizer: an object in memory, a path, or a name on the Hub.

From the Hub only the tokenizer's own files are downloaded, never weights, and no code of a repository is run.
"""

import hashlib
import os
import re
from pathlib import Path

from calibfuse.errors import VocabularyError, reason_of
from calibfuse.vocabulary.token_table import TokenTable
from calibfuse.vocabulary.tokenizer_files import TOKENIZER_KINDS, read_file
from calibfuse.vocabulary.tokenizer_objects import read_object

# The files of a folder that can be read without knowing the model, best first.
_SELF_CONTAINED = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "*.tiktoken",
    "vocab.txt",
)
# Files beside a vocabulary that name added and special tokens.
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_ENDINGS = (".json", ".model", ".txt", ".tiktoken", ".gz")


def load_table(tokenizer: object, *, revision: str | None = None, local_files_only: bool = False) -> TokenTable:
    """The token table of a tokenizer; arguments and errors as in `Vocabulary.from_tokenizer`."""
    if not isinstance(tokenizer, (str, os.PathLike)):
        return read_object(tokenizer)
    name = os.fspath(tokenizer)
    if not isinstance(name, str) or "\0" in name or not name.strip():
        raise VocabularyError(f"Expected the path or Hub id of a tokenizer, got {name!r:.200}.")
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _from_folder(path)
        if path.exists():
            return read_file(path)
    except OSError as error:
        raise VocabularyError(f"Cannot read the tokenizer at {name!r:.200}: {reason_of(error)}.") from error
    if isinstance(tokenizer, str) and _HUB_ID.fullmatch(name) and not name.endswith(_FILE_ENDINGS):
        return _from_hub(name, revision=revision, local_files_only=local_files_only)
    raise VocabularyError(f"No tokenizer at {name!r:.200}: there is no such file or folder, and it is no Hub id.")


def _from_folder(folder: Path) -> TokenTable:
    beside = [folder / name for name in _SIDE_FILES if (folder / name).is_file()]
    for pattern in _SELF_CONTAINED:
        for path in sorted(folder.glob(pattern))[:1]:
            # Other families keep lists of the same name that mean nothing without the model's code.
            if pattern != "vocab.txt" or b"[UNK]" in path.read_bytes():
                return read_file(path, beside=beside)
    if any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json")):
        # What is left needs the model's code: some models shift the ids of their SentencePiece file.
        return _from_auto_tokenizer(str(folder), revision=None, local_files_only=True)
    for pattern in ("*.model", "vocab.json"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return read_file(found[0], beside=beside)
    raise VocabularyError(f"The folder {folder} holds no tokenizer; expected {TOKENIZER_KINDS} in it.")


def _from_hub(name: str, *, revision: str | None, local_files_only: bool) -> TokenTable:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=[*_SELF_CONTAINED, *_SIDE_FILES],
        )
    except LocalEntryNotFoundError as error:
        raise VocabularyError(
            f"No tokenizer {name!r}: there is no such file or folder, the Hub was not reached, and its cache has none."
        ) from error
    except (OSError, ValueError) as error:
        raise VocabularyError(
            f"No tokenizer {name!r}: neither a file or folder nor readable on the Hub ({reason_of(error)})."
        ) from error
    if any(any(Path(folder).glob(pattern)) for pattern in _SELF_CONTAINED):
        return _from_folder(Path(folder))
    return _from_auto_tokenizer(name, revision=revision, local_files_only=local_files_only)


def _from_auto_tokenizer(name: str, *, revision: str | None, local_files_only: bool) -> TokenTable:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", local_files_only=local_files_only, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds for a folder that is no tokenizer
        if "trust_remote_code" in str(error):
            raise VocabularyError(
                f"The tokenizer {name!r} needs code of its own, which calibfuse does not run: load it yourself, with "
                "AutoTokenizer.from_pretrained(..., trust_remote_code=True), and pass the tokenizer object."
            ) from error
        raise VocabularyError(f"No tokenizer can be loaded from {name!r} ({reason_of(error)}).") from error
    return read_object(tokenizer)


def quick_fingerprint(tokenizer: object) -> str | None:
    """For a path, a hex hash over the files that `Vocabulary.from_tokenizer` reads: a cheap key for a disk cache.

    None for what has no key that is both cheap and safe, such as objects in memory, which can have been changed.
    """
    if not isinstance(tokenizer, (str, os.PathLike)):
        return None
    path = Path(os.fspath(tokenizer)).expanduser()
    digest = hashlib.blake2b(b"calibfuse tokenizer files 1", digest_size=32)
    try:
        files = [path / name for name in ("tokenizer.json", *_SIDE_FILES)] if path.is_dir() else [path]
        if not files[0].is_file():
            return None
        for file in filter(Path.is_file, files):
            content = file.read_bytes()
            digest.update(file.name.encode() if file != path else b"")
            digest.update(len(content).to_bytes(8, "little") + content)
    except (OSError, ValueError):
        return None
    return digest.hexdigest()
