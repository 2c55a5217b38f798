"""The fusion in llama-cpp-python, whose logits processors get the ids and the logits of one text as NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from calibfuse.processor import CalibFusion

Processor = Callable[[npt.NDArray[Any], npt.NDArray[np.float32]], npt.NDArray[np.float32]]


def logits_processor(fusion: CalibFusion) -> Processor:
    """The fusion as llama.cpp's bindings call it.

    Args:
        fusion: made with the tokenizer of the model from which the GGUF file was converted.

    Returns:
        A function (ids int [length], logits float32 [vocabulary]) -> logits float32 [vocabulary]. Their logsumexp stays
        what it was, since llama.cpp's penalties come behind and look at the sign. Raises what the fusion raises.

    Example:
        >>> guided = LogitsProcessorList([logits_processor(fusion)])  # doctest: +SKIP
        >>> llm.create_completion("My neighbour is a", logits_processor=guided)  # doctest: +SKIP
    """

    @torch.no_grad()
    def process(input_ids: npt.NDArray[Any], scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        logits = torch.from_numpy(np.array(scores, dtype=np.float32))[None]  # a copy: the engine's array has strides
        fused = fusion(torch.from_numpy(np.array(input_ids, dtype=np.int64))[None], logits)
        result: npt.NDArray[np.float32] = (fused + logits.logsumexp(dim=-1, keepdim=True))[0].numpy()
        return result

    return process
