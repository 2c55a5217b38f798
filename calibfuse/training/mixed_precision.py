"""Forward passes in bfloat16 with weights in float32, for everything here that trains."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def mixed_precision(device: torch.device, precision: str) -> Iterator[None]:
    """`torch.autocast`, without its notice that a norm with weights in float32 has no fused kernel.

    Args:
        device: where the model is.
        precision: "bf16"; anything else leaves the precision as it is.
    """
    with (
        warnings.catch_warnings(),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield
