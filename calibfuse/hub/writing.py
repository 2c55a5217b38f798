"""Write the files of a checkpoint so that it is whole or absent."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from calibfuse.errors import CheckpointError, InputError
from calibfuse.hub.layout import CONFIG_NAME, FINGERPRINT_KEY, WEIGHTS_NAME, weights_fingerprint

_Part: TypeAlias = "bytes | memoryview"

# The safetensors names of dtypes, in the order in which the library lays out tensors: the last ones first.
_DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}


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
        InputError: the configuration has no format, or holds what JSON cannot; or a tensor has a dtype that has no
            place in the format.
        CheckpointError: the files could not be written; nothing half-written is left.
    """
    if "format" not in config or "format_version" not in config:
        raise InputError(f"A configuration needs 'format' and 'format_version', but has only {sorted(config)}.")
    try:
        text = json.dumps(dict(config), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"The configuration cannot be written as JSON: {error}.") from error
    contents: dict[str, list[_Part]] = {WEIGHTS_NAME: _tensor_parts(tensors, _metadata(tensors, fingerprint=True))}
    contents |= {name: [value.encode("utf-8")] for name, value in (files or {}).items()}
    contents[CONFIG_NAME] = [text.encode("utf-8")]
    _write_parts(folder, contents, durable=True)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    fingerprint: bool = True,
    durable: bool = True,
    alignment: int = 8,
) -> None:
    """Write one safetensors file, whole or not at all.

    The tensors go to the file one after the other, without a copy of those that are contiguous and on the CPU, so that
    a large one costs no further memory.

    Args:
        path: its folder is made if it does not exist.
        tensors: on any device; two that share memory are stored twice.
        fingerprint: store one, for `read_tensors` to compare: about 1 ms for each megabyte, at both ends.
        durable: wait until the disk has the file. Without it, a machine that loses power may leave a damaged file: good
            enough for what can be made again.
        alignment: bytes, a multiple of 8; the data begin at a multiple of it, for files that are mapped into memory.

    Raises:
        InputError: a tensor of a dtype that has no place in the format.
        CheckpointError: the file could not be written; nothing half-written is left.
    """
    target = Path(path)
    parts = _tensor_parts(tensors, _metadata(tensors, fingerprint=fingerprint), alignment)
    _write_parts(target.parent, {target.name: parts}, durable=durable)


def _metadata(tensors: Mapping[str, Tensor], *, fingerprint: bool) -> dict[str, str]:
    return {"format": "pt"} | ({FINGERPRINT_KEY: weights_fingerprint(tensors)} if fingerprint else {})


def _tensor_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], alignment: int = 8) -> list[_Part]:
    """A safetensors file in parts: with alignment 8, the same bytes as `safetensors.torch.save` gives.

    Source: https://github.com/huggingface/safetensors#format (an 8-byte length, a JSON header, the data).
    """
    rank = {dtype: place for place, dtype in enumerate(_DTYPE_NAMES)}
    for name, tensor in tensors.items():
        if tensor.dtype not in rank:
            raise InputError(
                f"The tensor {name!r} has the dtype {tensor.dtype}, which cannot be saved; convert it first."
            )
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts: list[_Part] = []
    end = 0
    for name in sorted(tensors, key=lambda name: (-rank[tensors[name].dtype], name)):
        tensor = tensors[name].detach().cpu().contiguous()
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        parts.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % alignment)
    return [len(text).to_bytes(8, "little"), text, *parts]


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
    _write_parts(folder, {name: [data] for name, data in contents.items()}, durable=True)


def _write_parts(folder: str | os.PathLike[str], contents: Mapping[str, Sequence[_Part]], *, durable: bool) -> None:
    """`write_files` of files in parts."""
    place = Path(folder).expanduser()
    temporary: dict[Path, Path] = {}
    made: list[Path] = []
    try:
        made = [parent for parent in (place, *place.parents) if not parent.exists()]
        place.mkdir(parents=True, exist_ok=True)
        for name, parts in contents.items():
            path = place / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
            temporary[place / name] = path
            _write(path, parts, durable=durable)
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


def _write(path: Path, parts: Sequence[_Part], *, durable: bool) -> None:
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _remove_if_empty(folders: Sequence[Path]) -> None:
    """Remove folders made for a checkpoint that could not be written, innermost first; a folder in use stays."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
