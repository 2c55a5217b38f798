"""Where a checkpoint lies: in the package, in a local folder, in the Hub's cache or on the Hub.

These are the only calls of huggingface_hub, which say in a sentence what went wrong.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from calibfuse.errors import CheckpointError, InputError, reason_of
from calibfuse.hub.files import ALLOWED_FILES, CONFIG_NAME, WEIGHTS_NAME

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
    """Find the folder of a checkpoint, downloading it from the Hub if it is not here yet; its files are not checked.

    Args:
        name_or_path: a local folder, a Hub id (`name` or `organisation/name`), or None for a bundled checkpoint.
            A folder that exists wins over a Hub id of the same spelling.
        revision: branch, tag or commit on the Hub; None is the main branch. Not for local or bundled checkpoints.
        cache_dir: where downloads are kept; None is the Hub's own cache.
        local_files_only: never touch the network.
        token: a Hub token; True for the one of the login, False for none, None to use it where there is one.
        default: name of the bundled checkpoint that stands for None.
        allow_patterns: which files are downloaded.

    Raises:
        InputError: a revision was given for a local or bundled checkpoint.
        CheckpointError: no such folder, no such repository or revision, no access, or not cached while offline.
    """
    if name_or_path is None:
        folder = _BUNDLED / default
        if not folder.is_dir():
            raise CheckpointError(f"The bundled checkpoint {default!r} is missing from this installation of calibfuse.")
        return _without_revision(folder, revision)
    name = os.fspath(name_or_path) if isinstance(name_or_path, str | os.PathLike) else name_or_path
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
    from huggingface_hub import snapshot_download

    try:
        downloaded = snapshot_download(
            name,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            token=token,
            allow_patterns=list(allow_patterns),
        )
    # The client raises errors of its own, of its HTTP library (another one in each major version) and of the file
    # system; whatever it is, the checkpoint could not be fetched.
    except Exception as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(f"Cannot get the checkpoint {name!r}{at}: {_hub_reason(error)}.") from error
    return Path(downloaded)


def _without_revision(folder: Path, revision: str | None) -> Path:
    if revision is not None:
        raise InputError(f"Revision {revision!r} was given, but the checkpoint is the local folder {str(folder)!r}.")
    return folder


def check_repository(repo_id: str, *, revision: str | None = None, local_files_only: bool = False) -> None:
    """Ask the Hub once for a model that its cache has not; loaders ask again and again where it cannot be reached.

    Raises:
        CheckpointError: there is no such repository or revision, no access, or the Hub was not reached.
    """
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, CONFIG_NAME, revision=revision)
    if local_files_only or constants.HF_HUB_OFFLINE or isinstance(cached, str):
        return  # whether the cache has all of it is the loader's to say, without a request
    try:
        HfApi().model_info(repo_id, revision=revision, timeout=10.0)
    except Exception as error:  # as in resolve_checkpoint
        at = "" if revision is None else f" at revision {revision!r}"
        reason = "there is no such folder here, it is not in the Hub's cache, and the Hub was not reached"
        if isinstance(error, errors.HfHubHTTPError | errors.HFValidationError):
            reason = _hub_reason(error)
        raise CheckpointError(f"Cannot get the model {repo_id!r}{at}: {reason}.") from error


def _hub_reason(error: Exception) -> str:
    """Say in a few words why a call of huggingface_hub failed, and what helps."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    # Subclasses come before their bases. RepositoryNotFoundError is also what the Hub answers to the unauthorised.
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "access to it must be requested on its page on the Hub, by a user who is logged in"),
        (
            errors.RepositoryNotFoundError,
            "there is no such folder here and no such repository on the Hub (or it is private, and you are not "
            "logged in with `hf auth login` or HF_TOKEN)",
        ),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (
            errors.LocalEntryNotFoundError,
            "there is no such folder here, it is not in the Hub's cache, and the Hub was not asked or not reached",
        ),
        (errors.LocalTokenNotFoundError, "you are not logged in; use `hf auth login` or set HF_TOKEN"),
        (errors.OfflineModeIsEnabled, "the Hub is in offline mode (HF_HUB_OFFLINE)"),
        (errors.HFValidationError, "this is not a valid name of a repository on the Hub"),
    )
    for kind, reason in reasons:
        if isinstance(error, kind):
            return reason
    if status in (401, 403):
        return f"the Hub refused access ({status}); log in with `hf auth login`, or use a token that may do this"
    return reason_of(error)


def upload_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload a checkpoint folder to the Hub, making the repository and the branch where they do not exist.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: the folder is no whole checkpoint, or the Hub refused or was not reached.
    """
    from huggingface_hub import HfApi

    place = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (place / name).is_file():
            raise CheckpointError(f"Expected a checkpoint to upload in {str(place)!r}, but it has no {name}.")
    api = HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=place,
            revision=revision,
            commit_message=commit_message or "Upload checkpoint with calibfuse",
            allow_patterns=list(ALLOWED_FILES),
        )
    except Exception as error:  # as in resolve_checkpoint
        raise CheckpointError(f"Cannot push to {repo_id!r}: {_hub_reason(error)}.") from error
    return str(repository)
