"""What a checkpoint folder holds, and the fingerprint that its weights carry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
README_NAME = "README.md"
ALLOWED_FILES: tuple[str, ...] = ("*.json", "*.safetensors", README_NAME)

FINGERPRINT_KEY = "calibfuse.fingerprint"  # in the metadata of our safetensors files


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and contents of tensors.

    Args:
        tensors: on any device; not changed.

    Returns:
        The hexadecimal SHA-256; the order of the mapping does not matter.
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
