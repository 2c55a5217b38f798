"""Transformers checkpoints and folders of products: read with one sentence on failure, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calibfuse import hub
from calibfuse.errors import CheckpointError
from calibfuse.finetune.settings import ModelSource
from calibfuse.generation.language_model import read_model, read_tokenizer


def load_model(source: ModelSource, device: torch.device | str, *, folder: Path | None = None) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    Args:
        source: what the user named, and how to load it.
        device: where to.
        folder: an own product of the same kind, in place of what the user named.

    Raises:
        CheckpointError: there is none, it is damaged, or does not fit into memory.
    """
    name = source.name if folder is None else str(folder)
    return read_model(name, device=device, dtype=source.dtype, **_options(source, folder))


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model that the user named.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return read_tokenizer(source.name, **_options(source, None))


def _options(source: ModelSource, folder: Path | None) -> dict[str, Any]:
    if folder is not None:
        return {"local_files_only": True, "trust_remote_code": source.trust_remote_code}
    return {
        "revision": source.revision,
        "local_files_only": source.local_files_only,
        "trust_remote_code": source.trust_remote_code,
    }


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary transformers checkpoint with safetensors into a folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def new_folder(final: Path, what: str) -> Iterator[Path]:
    """A folder under a temporary name, renamed to its own when the block ends, removed when the block fails.

    Args:
        final: its name in the end; must not exist.
        what: for messages.

    Yields:
        The temporary folder, beside the final one.

    Raises:
        CheckpointError: it cannot be written, for instance because the disk is full.
    """
    temporary = final.with_name(f".{final.name}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, final)
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"Cannot write {what} to {str(final)!r}: {reason}. What was complete before is still there; make room and "
            "resume."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(work: Path) -> None:
    """Remove temporary folders that a killed run left in its steps."""
    for temporary in [*work.glob("step-*/.*.tmp"), *work.glob(".*.tmp")]:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object under a temporary name, then rename it.

    Raises:
        CheckpointError: it could not be written.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    hub.write_files(path.parent, {path.name: text.encode("utf-8")})
