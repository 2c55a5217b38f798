"""Keep the caller's autograd and precision modes out of a guide's arithmetic.

`generate()` may run inside `torch.inference_mode()` or `torch.autocast`, and one object serves many generations: a
cache filled under one of them could not be used under another, and lower precision would round the guide unasked.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_KINDS = tuple(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def isolated(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function without gradients, outside inference mode and without autocast.

    Args:
        function: of tensors; the tensors that it makes are ordinary ones, in the dtypes of its operands.

    Returns:
        The same function, shielded.
    """

    @wraps(function)
    def shielded(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as modes:
            if torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(False))  # which turns gradients on: no_grad comes after it
            for kind in _KINDS:
                if torch.is_autocast_enabled(kind):
                    modes.enter_context(torch.autocast(kind, enabled=False))
            modes.enter_context(torch.no_grad())
            return function(*args, **kwargs)

    return shielded
