"""Read the files of a checkpoint; whatever is wrong with them gives one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from calibfuse.errors import CheckpointError, CheckpointFormatError
from calibfuse.hub.layout import CONFIG_NAME, FINGERPRINT_KEY, first_line, weights_fingerprint


def read_json(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
        path: the file.
        what: what it is, for messages: "configuration of a calibrator".

    Returns:
        The object.

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
            f"Expected the {what} in {os.fspath(path)!r}, but it is no JSON: {first_line(error)}."
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

    Args:
        folder: the checkpoint.
        filename: its configuration.
        format_name: what the entry "format" must be, e.g. "calibfuse-calibrator".
        supported_version: the newest "format_version", 1 or more, that the caller reads.

    Returns:
        The whole configuration, "format" and "format_version" (1 to `supported_version`) included.

    Raises:
        CheckpointError: missing, no JSON, or the configuration of something else.
        CheckpointFormatError: written in a newer format.
    """
    path = Path(folder) / filename
    config = read_json(path, f"configuration of a {format_name}")
    if config.get("format") != format_name:
        raise CheckpointError(f"Expected the configuration of a {format_name} in {str(path)!r}, {_what_else(config)}.")
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"Expected a format_version of 1 or more in {str(path)!r}, found {version!r}.")
    if version > supported_version:
        raise CheckpointFormatError(
            f"{str(path)!r} is in format version {version} of {format_name}, but this calibfuse reads versions up to "
            f"{supported_version}; install a newer calibfuse."
        )
    return config


def _what_else(config: Mapping[str, Any]) -> str:
    """Describe a configuration that is not ours by the entry that tells most about it."""
    for key in ("format", "model_type", "architectures"):
        if key in config:
            return f"but its {key} is {config[key]!r}"
    return "but it has no entry 'format'"


def read_tensors(
    path: str | os.PathLike[str],
    *,
    expected: Mapping[str, tuple[int, ...]] | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Read a safetensors file, and nothing but that.

    Files written by `write_checkpoint` carry a fingerprint of their contents, which is compared: a flipped bit in the
    weights is found, not only a damaged header.

    Args:
        path: the file.
        expected: name and shape of every tensor that must be there; None accepts any.
        device: where the tensors go.

    Returns:
        The tensors by name, in the dtypes of the file.

    Raises:
        CheckpointError: missing, truncated, damaged, another kind of file, or not the expected tensors.
    """
    name = os.fspath(path)
    try:
        with safetensors.safe_open(name, framework="pt", device="cpu") as file:
            fingerprint = (file.metadata() or {}).get(FINGERPRINT_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise CheckpointError(f"Expected weights in {name!r}, but there is no such file.") from None
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"Expected weights in {name!r}, but it is no whole safetensors file: {first_line(error)}."
        ) from error
    if fingerprint is not None and fingerprint != weights_fingerprint(tensors):
        raise CheckpointError(
            f"The weights in {name!r} are damaged: they do not match the fingerprint saved with them."
        )
    if expected is not None:
        _check_shapes(tensors, expected, name)
    return {key: tensor.to(device) for key, tensor in tensors.items()}


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
