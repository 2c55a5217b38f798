"""Where a checkpoint lies: in the package, in a local folder, in the Hub's cache or on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from calibfuse.errors import CheckpointError, InputError
from calibfuse.hub.layout import ALLOWED_FILES
from calibfuse.hub.remote import download_folder

_BUNDLED = Path(__file__).parent.parent / "pretrained"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_checkpoint(
    name_or_path: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    default: str = "default-calibrator",
    allow_patterns: Sequence[str] = ALLOWED_FILES,
) -> Path:
    """Find the folder of a checkpoint, downloading it from the Hub if it is not here yet.

    Args:
        name_or_path: a local folder, a Hub id (`name` or `organisation/name`), or None for a bundled checkpoint.
            A folder that exists wins over a Hub id of the same spelling.
        revision: branch, tag or commit on the Hub; None is the main branch. Not for local or bundled checkpoints.
        cache_dir: where downloads are kept; None is the Hub's own cache.
        local_files_only: True to use the cache alone, without any network access.
        token: a Hub token; True for the one of the login, False for none, None to use it where there is one.
        default: name of the bundled checkpoint that stands for None.
        allow_patterns: which files are downloaded.

    Returns:
        The folder. That its files are whole is not checked here.

    Raises:
        InputError: a revision was given for a local or bundled checkpoint.
        CheckpointError: no such folder, no such repository or revision, no access, or not cached while offline.
    """
    if name_or_path is None:
        folder = _BUNDLED / default
        if not folder.is_dir():
            raise CheckpointError(f"The bundled checkpoint {default!r} is missing from this installation of calibfuse.")
        return _without_revision(folder, revision)
    name = os.fspath(name_or_path)
    if not isinstance(name, str) or not name.strip():
        raise CheckpointError(f"Expected a folder or a Hub id of a checkpoint, got {name_or_path!r}.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _without_revision(folder, revision)
    if folder.exists():
        raise CheckpointError(
            f"Expected the folder of a checkpoint, but {name!r} is a file; give the folder around it."
        )
    if not isinstance(name_or_path, str) or not _REPO_ID.fullmatch(name):
        raise CheckpointError(f"There is no checkpoint folder {name!r}, and it cannot be the id of a Hub repository.")
    return download_folder(
        name,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        allow_patterns=list(allow_patterns),
    )


def _without_revision(folder: Path, revision: str | None) -> Path:
    if revision is not None:
        raise InputError(f"Revision {revision!r} was given, but the checkpoint is the local folder {str(folder)!r}.")
    return folder
