"""LoRA through peft, an optional package: low-rank matrices learn, the model's own weights stay.

Hu et al. 2022 (arXiv 2106.09685). Left out: every other kind of adapter, and quantised bases.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from calibfuse.errors import CheckpointError, InputError, MissingDependencyError, check_ranges

ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The shape of an adapter."""

    rank: int = 8  # of the two matrices
    alpha: float = 16.0  # the product of the matrices is scaled by alpha / rank
    dropout: float = 0.0  # on the input of the matrices
    targets: tuple[str, ...] = ()  # layers that get one, as peft matches them; empty: all linear ones but the head

    def __post_init__(self) -> None:
        """Validate."""
        check_ranges(self, rank="[1, inf)", alpha="(0, inf)", dropout="[0, 1)")
        object.__setattr__(self, "targets", tuple(self.targets))  # lists, as JSON has them


def add_adapter(model: PreTrainedModel, settings: LoraSettings, *, seed: int) -> PreTrainedModel:
    """Put a fresh adapter around a model, which afterwards gives the same outputs as before."""
    peft = import_peft()
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            wrapped: PreTrainedModel = peft.get_peft_model(model, config)
        except ValueError as error:
            shown = ", ".join(settings.targets) or "linear layers"
            raise InputError(f"A LoRA adapter for {shown} does not fit this model: {error}") from error
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
    merged.requires_grad_(True)
    return merged


def import_peft() -> Any:  # noqa: ANN401
    """The package, or MissingDependencyError."""
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("LoRA needs the package peft: pip install 'calibfuse[lora]'.") from error
    return peft
