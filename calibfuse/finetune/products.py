"""Where the products of a run lie, and how they are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from calibfuse import hub
from calibfuse.errors import CheckpointError

SETTINGS_NAME = "settings.json"
PROMPTS_NAME = "prompts.json"
CORPUS_NAME = "corpus.safetensors"
RECORD_NAME = "role.json"
OPTIMIZER_NAME = "optimizer.safetensors"


def product_folder(work: Path, role: str, step: int) -> Path:
    """Where the product of a role and step lies; it is there if and only if it is complete."""
    return work / f"step-{step}" / role


@contextlib.contextmanager
def new_folder(final: Path, what: str) -> Iterator[Path]:
    """A folder under a temporary name, renamed to its own when the block ends, removed when the block fails."""
    temporary = final.with_name(f".{final.name}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, final)
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"Cannot write {what} to {str(final)!r}: {reason}. What was complete before is still there; make room and "
            "resume."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(work: Path) -> None:
    """Remove temporary folders that a killed run left."""
    for temporary in [*work.glob("step-*/.*.tmp"), *work.glob(".*.tmp")]:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object under a temporary name, then rename it."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    hub.write_files(path.parent, {path.name: text.encode("utf-8")})
