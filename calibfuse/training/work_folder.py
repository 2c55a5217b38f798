"""The folder of a run's working files: products written whole or not at all, and settings that a resumed run shares."""

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


def is_begun(work: Path, settings: Mapping[str, Any], *, resume: bool) -> bool:
    """Whether there is a run of these settings to go on with; CheckpointError where that is not as `resume` says."""
    path = work / SETTINGS_NAME
    if resume and not path.exists():
        raise CheckpointError(f"There is nothing to go on from in {str(work.parent)!r} yet: run it without resume.")
    if not path.exists():
        return False
    if not resume:
        raise CheckpointError(
            f"{str(work.parent)!r} holds the work of an earlier run: go on with resume, or choose another output "
            "folder."
        )
    former = hub.read_json(path, "settings of a run")
    now = json.loads(json.dumps(settings))
    changed = sorted(key for key in {*former, *now} if former.get(key) != now.get(key))
    if changed:
        raise CheckpointError(
            f"The work in {str(work.parent)!r} was begun with other settings ({', '.join(changed)}); resume with the "
            "same ones, or choose another output folder."
        )
    return True


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object under a temporary name, then rename it."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    hub.write_files(path.parent, {path.name: text.encode("utf-8")})


@contextlib.contextmanager
def new_folder(final: Path, what: str) -> Iterator[Path]:
    """A folder under a temporary name, renamed to its own when the block ends, removed when the block fails.

    One that is there is replaced: for a moment between two renames it lies beside its place, with the ending `.old`.
    """
    temporary, former = (
        final.with_name(f".{final.name}-{uuid.uuid4().hex[:8]}.tmp"),
        final.with_name(f"{final.name}.old"),
    )
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if final.exists():
            shutil.rmtree(former, ignore_errors=True)
            os.replace(final, former)
        os.replace(temporary, final)
        shutil.rmtree(former, ignore_errors=True)
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
    for temporary in [*work.glob("*/.*.tmp"), *work.glob(".*.tmp")]:
        shutil.rmtree(temporary, ignore_errors=True)
