"""LoRA (Hu et al. 2022, arXiv 2106.09685) through peft, an optional package: small matrices learn, the weights stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from calibfuse.errors import CheckpointError, MissingDependencyError

ADAPTER = "adapter"


def add_adapter(model: PreTrainedModel, rank: int, *, seed: int) -> PreTrainedModel:
    """Put a fresh adapter around all linear layers but the head; the outputs stay as they were."""
    peft = import_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped: PreTrainedModel = peft.get_peft_model(model, config)
    return wrapped


def load_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put a saved adapter around the model that it was trained on, to train it further."""
    peft = import_peft()
    if not (folder / "adapter_model.safetensors").is_file():
        raise CheckpointError(f"There is no LoRA adapter in {str(folder)!r}.")
    try:
        wrapped: PreTrainedModel = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except Exception as error:  # peft, safetensors and torch each raise errors of their own
        raise CheckpointError(f"The LoRA adapter in {str(folder)!r} cannot be loaded: {error}") from error
    return wrapped


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Add the adapter's product to the weights; an ordinary model comes back, `model` is used up."""
    wrapped: Any = model
    merged: PreTrainedModel = wrapped.merge_and_unload()
    return merged.requires_grad_(True)


def import_peft() -> Any:  # noqa: ANN401
    """The package, or MissingDependencyError."""
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("LoRA needs the package peft: pip install 'calibfuse[lora]'.") from error
    return peft
