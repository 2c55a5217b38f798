"""The files of a checkpoint: read, with one sentence where something is wrong; written so that all is whole or absent.

safetensors lays the tensors out; around it, files are written under temporary names and renamed, since the library
leaves half a file where the disk fills up.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from calibfuse.errors import CheckpointError, CheckpointFormatError, InputError, reason_of

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
README_NAME = "README.md"
ALLOWED_FILES: tuple[str, ...] = ("*.json", "*.safetensors", README_NAME)

FINGERPRINT_KEY = "calibfuse.fingerprint"  # in the metadata of our safetensors files
_PADDING_KEY = "calibfuse.padding"
# How safetensors tells of a full disk: it wraps the system's error in one of its own.
_IO_ERROR = "I/O error: "


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 over names, dtypes, shapes and contents of tensors; their order does not matter."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_json(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Read a JSON file that holds one object; `what` names it in messages: "configuration of a calibrator".

    Raises:
        CheckpointError: missing, unreadable, not UTF-8, not JSON, or JSON that is no object.
    """
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"Expected the {what} in {os.fspath(path)!r}, but there is no such file.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot read the {what}: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Expected the {what} in {os.fspath(path)!r}, but it is no JSON: {reason_of(error)}."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"Expected the {what} in {os.fspath(path)!r}, a JSON object, but it holds a {type(value).__name__}."
        )
    return value


def read_config(
    folder: str | os.PathLike[str], filename: str = CONFIG_NAME, *, format_name: str, supported_version: int
) -> dict[str, Any]:
    """Read the configuration of a checkpoint and make sure that it is one of ours, in a format this version knows.

    Raises:
        CheckpointError: missing, no JSON, or the configuration of something else.
        CheckpointFormatError: written in a newer format than `supported_version`.
    """
    path = Path(folder) / filename
    config = read_json(path, f"configuration of a {format_name}")
    if config.get("format") != format_name:
        telling = next((key for key in ("format", "model_type", "architectures") if key in config), None)
        found = f"but its {telling} is {config[telling]!r}" if telling else "but it has no entry 'format'"
        raise CheckpointError(f"Expected the configuration of a {format_name} in {str(path)!r}, {found}.")
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"Expected a format_version of 1 or more in {str(path)!r}, found {version!r}.")
    if version > supported_version:
        raise CheckpointFormatError(
            f"{str(path)!r} is in format version {version} of {format_name}, but this calibfuse reads versions up to "
            f"{supported_version}; install a newer calibfuse."
        )
    return config


def read_tensors(
    path: str | os.PathLike[str],
    *,
    expected: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """Read a safetensors file, and nothing but that: tensors by name, in the dtypes of the file.

    The fingerprint that `write_checkpoint` leaves is compared: a flipped bit in the weights is found, not only a
    damaged header.

    Raises:
        CheckpointError: missing, truncated, damaged, another kind of file, or not the `expected` names and shapes.
    """
    name = os.fspath(path)
    try:
        with safetensors.safe_open(name, framework="pt", device="cpu") as file:
            fingerprint = (file.metadata() or {}).get(FINGERPRINT_KEY)
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise CheckpointError(f"Expected weights in {name!r}, but there is no such file.") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"Expected weights in {name!r}, but it is no whole safetensors file: {reason_of(error)}."
        ) from error
    if fingerprint is not None and fingerprint != weights_fingerprint(tensors):
        raise CheckpointError(
            f"The weights in {name!r} are damaged: they do not match the fingerprint saved with them."
        )
    if expected is not None:
        _check_shapes(tensors, expected, name)
    return tensors


def _check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], name: str) -> None:
    for key, shape in expected.items():
        if key not in tensors:
            raise CheckpointError(f"Expected a tensor {key!r} of shape {tuple(shape)} in {name!r}, but it has none.")
        found = tuple(tensors[key].shape)
        if found != tuple(shape):
            raise CheckpointError(f"Expected shape {tuple(shape)} for the tensor {key!r} in {name!r}, found {found}.")
    for key, tensor in tensors.items():
        if key not in expected:
            raise CheckpointError(
                f"{name!r} has a tensor {key!r} of shape {tuple(tensor.shape)} that does not belong there."
            )


def write_checkpoint(
    folder: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint, its weights and further text files, so that it is either whole or absent.

    All files are first written under temporary names, then renamed, the configuration last. If the disk fills up, an
    older checkpoint in the folder stays as it was; if the machine stops between two renames, there is no configuration,
    so that new weights never stand beside an old one.

    Raises:
        InputError: the configuration has no "format" and "format_version", or something cannot be stored.
        CheckpointError: the files could not be written; nothing half-written is left.
    """
    if "format" not in config or "format_version" not in config:
        raise InputError(f"A configuration needs 'format' and 'format_version', but has only {sorted(config)}.")
    try:
        text = json.dumps(dict(config), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"The configuration cannot be written as JSON: {error}.") from error
    writers = {WEIGHTS_NAME: _tensor_writer(tensors, fingerprint=True)}
    writers |= {name: _bytes_writer(value.encode("utf-8")) for name, value in (files or {}).items()}
    _write_whole(folder, {**writers, CONFIG_NAME: _bytes_writer(text.encode("utf-8"))}, durable=True)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    fingerprint: bool = True,
    durable: bool = True,
    alignment: int = 8,
) -> None:
    """Write one safetensors file, whole or not at all.

    Args:
        path: its folder is made if it does not exist.
        tensors: on any device; two that share memory are stored twice.
        fingerprint: store one, for `read_tensors` to compare: about 1 ms for each megabyte, at both ends.
        durable: wait until the disk has the file; not needed for what can be made again.
        alignment: bytes, a multiple of 8; the data begin at a multiple of it, for files that are mapped into memory.
    """
    target = Path(path)
    writer = _tensor_writer(tensors, fingerprint=fingerprint, alignment=alignment)
    _write_whole(target.parent, {target.name: writer}, durable=durable)


def write_files(folder: str | os.PathLike[str], contents: Mapping[str, bytes]) -> None:
    """Write several files of one folder under temporary names, then rename them in the given order.

    The last one is the mark that all are there: an old one is removed before the first rename.
    """
    _write_whole(folder, {name: _bytes_writer(data) for name, data in contents.items()}, durable=True)


def _bytes_writer(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def _tensor_writer(tensors: Mapping[str, Tensor], *, fingerprint: bool, alignment: int = 8) -> Callable[[Path], object]:
    """What writes a safetensors file whose data begin at a multiple of `alignment`."""
    for name, tensor in tensors.items():
        if tensor.dtype.is_complex:
            raise InputError(
                f"The tensor {name!r} has the dtype {tensor.dtype}, which cannot be saved; convert it first."
            )
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain[name] = tensor.detach().cpu().contiguous()
        if (address := plain[name].untyped_storage().data_ptr()) in seen:
            plain[name] = plain[name].clone()  # the library refuses tensors that share memory
        seen.add(address)
    metadata = {"format": "pt"} | ({FINGERPRINT_KEY: weights_fingerprint(plain)} if fingerprint else {})
    if alignment == 8:  # as the library aligns
        return lambda path: safetensors.torch.save_file(plain, path, metadata)

    def write(path: Path) -> None:
        safetensors.torch.save_file(plain, path, metadata | {_PADDING_KEY: ""})
        with path.open("rb") as file:
            missing = -(8 + int.from_bytes(file.read(8), "little")) % alignment
        if missing:
            safetensors.torch.save_file(plain, path, metadata | {_PADDING_KEY: " " * missing})

    return write


def _write_whole(
    folder: str | os.PathLike[str], writers: Mapping[str, Callable[[Path], object]], *, durable: bool
) -> None:
    """`write_files`, by functions that write one file each."""
    place = Path(folder).expanduser()
    temporary: dict[Path, Path] = {}
    made: list[Path] = []
    try:
        made = [parent for parent in (place, *place.parents) if not parent.exists()]
        place.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            path = temporary[place / name] = place / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
            path.touch(exist_ok=False)
            mode = path.stat().st_mode
            write(path)
            path.chmod(mode)  # safetensors makes a file for the user alone
            if durable:
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        if len(temporary) > 1:
            (place / list(writers)[-1]).unlink(missing_ok=True)
        for target, path in temporary.items():
            os.replace(path, target)
    except OSError as error:
        raise CheckpointError(f"Cannot write {str(place)!r}: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise CheckpointError(f"Cannot write {str(place)!r}: {reason_of(error).rpartition(_IO_ERROR)[2]}.") from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        _remove_if_empty(made)


def _remove_if_empty(folders: Sequence[Path]) -> None:
    """Remove folders made for a checkpoint that could not be written, innermost first; a folder in use stays."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
