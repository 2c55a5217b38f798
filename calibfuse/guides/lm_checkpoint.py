"""Checkpoints of transformers as calibrators: a causal LM, its tokenizer and its reference model, loaded and saved.

Our metadata are the keys `fusion` and `training` of `config.json`. Only safetensors are loaded, and no code is run.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calibfuse import hub
from calibfuse.errors import CheckpointError, InputError, VocabularyError, reason_of
from calibfuse.loading import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFERENCE_FOLDER = "reference"
# Tokenizers of transformers checkpoints may be kept in files that calibfuse's own checkpoints do not have.
ALLOWED_FILES = (*hub.ALLOWED_FILES, "*.model", "merges.txt", "vocab.txt", "*.tiktoken", "*.jinja")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")


def is_transformers_checkpoint(folder: Path) -> bool:
    """Whether the folder's config.json is one of transformers: a model type, and no format of ours."""
    path = folder / hub.CONFIG_NAME
    if not path.is_file():
        return False
    config = hub.read_json(path, "configuration of a calibrator")
    return "model_type" in config and "format" not in config


def load_model(folder: Path, dtype: torch.dtype, device: torch.device | str | None = None) -> PreTrainedModel:
    """The causal LM of a checkpoint, in evaluation mode; an InputError for an encoder-decoder model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not is_transformers_checkpoint(folder):
        raise CheckpointError(
            f"Expected a checkpoint of transformers in {str(folder)!r}: a config.json with a 'model_type'."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, for unknown architectures among others
        raise CheckpointError(f"The model in {str(folder)!r} cannot be loaded: {reason_of(error)}.") from error
    if config.is_encoder_decoder:
        raise InputError(
            f"The model {config.model_type!r} in {str(folder)!r} is an encoder-decoder model; a calibrator must be a "
            "decoder-only causal language model."
        )
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"Expected weights in the safetensors format in {str(folder)!r} (a pickle can run code: none is loaded); "
            "save the model with save_pretrained."
        )
    try:
        with quiet_transformers():
            loading: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # as above; damaged weights too
        raise CheckpointError(f"The model in {str(folder)!r} cannot be loaded: {reason_of(error)}.") from error
    model, report = loading  # a pair, because of output_loading_info
    # transformers would go on with random numbers in their place.
    wrong = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", ())]))
    if wrong:
        raise CheckpointError(
            f"The weights in {str(folder)!r} are not those of a {config.model_type} language model: {wrong[0]} and "
            f"{len(wrong) - 1} more are missing or of another shape."
        )
    loaded: PreTrainedModel = model.eval().to(device or "cpu")
    return loaded


def load_tokenizer(folder: Path) -> Any:  # noqa: ANN401
    """The tokenizer in a checkpoint; None where there is none."""
    from transformers import AutoTokenizer

    if not any(any(folder.glob(kind)) for kind in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise VocabularyError(f"The tokenizer in {str(folder)!r} cannot be loaded: {reason_of(error)}.") from error


def save_lm(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    reference: PreTrainedModel | None,
    card: str,
) -> Path:
    """Write models, tokenizer (None: none) and README.md, first beside their place; `config.json` is renamed last."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name, quiet_transformers():
            fresh = Path(name)
            model.save_pretrained(fresh, safe_serialization=True)
            if tokenizer is not None:
                tokenizer.save_pretrained(fresh)
            (fresh / hub.README_NAME).write_text(card, encoding="utf-8")
            if reference is not None:
                reference.save_pretrained(fresh / REFERENCE_FOLDER, safe_serialization=True)
            (folder / hub.CONFIG_NAME).unlink(missing_ok=True)  # new weights never stand beside an old configuration
            shutil.rmtree(folder / REFERENCE_FOLDER, ignore_errors=True)  # that of the former model
            for path in sorted(fresh.iterdir(), key=lambda path: path.name == hub.CONFIG_NAME):
                os.replace(path, folder / path.name)
    except Exception as error:  # OSError, and what safetensors and tokenizers raise of their own
        raise CheckpointError(f"Cannot write the model to {str(folder)!r}: {reason_of(error)}.") from error
    return folder
