"""The only calls of huggingface_hub: download a checkpoint, upload one, and say in a sentence what went wrong."""

from __future__ import annotations

import os
from pathlib import Path

from calibfuse.errors import CheckpointError
from calibfuse.hub.layout import ALLOWED_FILES, CONFIG_NAME, WEIGHTS_NAME, first_line


def download_folder(
    repo_id: str,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | bool | None,
    allow_patterns: list[str],
) -> Path:
    """Download the allowed files of a Hub repository into the Hub's cache; arguments as for `resolve_checkpoint`.

    Returns:
        The folder of the snapshot.

    Raises:
        CheckpointError: there is no such repository or revision, no access, or no connection.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            token=token,
            allow_patterns=allow_patterns,
        )
    # The client raises errors of its own, of its HTTP library (another one in each major version) and of the file
    # system; whatever it is, the checkpoint could not be fetched.
    except Exception as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(f"Cannot get the checkpoint {repo_id!r}{at}: {_hub_reason(error)}.") from error
    return Path(folder)


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
    return first_line(error)


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

    Args:
        folder: a whole checkpoint.
        repo_id: `organisation/name`; a bare `name` goes to the account of the token.
        private: for a new repository; an existing one keeps its visibility. None is the account's default.
        revision: the branch; None is the main one.
        commit_message: None for a plain one.
        token: a Hub token; None or True for the one of the login.

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
    except Exception as error:  # as in download_folder
        raise CheckpointError(f"Cannot push to {repo_id!r}: {_hub_reason(error)}.") from error
    return str(repository)
