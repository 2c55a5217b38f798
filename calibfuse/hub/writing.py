"""Write the files of a checkpoint so that it is whole or absent."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from calibfuse.errors import CheckpointError, InputError
from calibfuse.hub.layout import CONFIG_NAME, FINGERPRINT_KEY, WEIGHTS_NAME, weights_fingerprint


def write_checkpoint(
    folder: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint so that it is either whole or absent.

    All files are first written under temporary names, then renamed, the configuration last. If the disk fills up, an
    older checkpoint in the folder stays as it was; if the machine stops between two renames, there is no configuration,
    so that new weights never stand beside an old one.

    Args:
        folder: made if it does not exist.
        config: what goes to `config.json`; must have "format" and "format_version".
        tensors: the weights, on any device; two that share memory are stored twice.
        files: further text files by name, e.g. {"README.md": "..."}.

    Raises:
        InputError: the configuration has no format, or holds what JSON cannot.
        CheckpointError: the files could not be written; nothing half-written is left.
    """
    if "format" not in config or "format_version" not in config:
        raise InputError(f"A configuration needs 'format' and 'format_version', but has only {sorted(config)}.")
    try:
        text = json.dumps(dict(config), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"The configuration cannot be written as JSON: {error}.") from error
    contents: dict[str, bytes] = {WEIGHTS_NAME: _serialized(tensors, fingerprint=True)}
    contents |= {name: value.encode("utf-8") for name, value in (files or {}).items()}
    contents[CONFIG_NAME] = text.encode("utf-8")
    write_files(folder, contents)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, fingerprint: bool = True) -> None:
    """Write one safetensors file, whole or not at all.

    Args:
        path: its folder is made if it does not exist.
        tensors: on any device; two that share memory are stored twice.
        fingerprint: store one, for `read_tensors` to compare: about 1 ms for each megabyte, at both ends.

    Raises:
        CheckpointError: the file could not be written; nothing half-written is left.
    """
    target = Path(path)
    write_files(target.parent, {target.name: _serialized(tensors, fingerprint=fingerprint)})


def _serialized(tensors: Mapping[str, Tensor], *, fingerprint: bool) -> bytes:
    # clone: safetensors refuses tensors that share memory, and tied weights do
    own = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    metadata = {"format": "pt"} | ({FINGERPRINT_KEY: weights_fingerprint(own)} if fingerprint else {})
    return safetensors.torch.save(own, metadata)


def write_files(folder: str | os.PathLike[str], contents: Mapping[str, bytes]) -> None:
    """Write several files of one folder under temporary names, then rename them in the given order.

    Args:
        folder: made if it does not exist.
        contents: bytes by file name; the last one is the mark that all are there: an old one is removed before the
            first rename.

    Raises:
        CheckpointError: the folder or a file could not be written; no temporary file is left, and no file is changed
            unless the disk fails while files are renamed.
    """
    place = Path(folder).expanduser()
    temporary: dict[Path, Path] = {}
    made: list[Path] = []
    try:
        made = [parent for parent in (place, *place.parents) if not parent.exists()]
        place.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            path = place / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
            temporary[place / name] = path
            _write_durably(path, data)
        if len(temporary) > 1:
            (place / list(contents)[-1]).unlink(missing_ok=True)
        for target, path in temporary.items():
            os.replace(path, target)
    except OSError as error:
        raise CheckpointError(f"Cannot write {str(place)!r}: {error.strerror or error}.") from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        _remove_if_empty(made)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove_if_empty(folders: Sequence[Path]) -> None:
    """Remove folders made for a checkpoint that could not be written, innermost first; a folder in use stays."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
