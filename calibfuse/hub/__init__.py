"""Where a checkpoint lies, and how its files are read and written; it knows none of the classes.

Nothing but safetensors, JSON and `README.md` is downloaded, read or uploaded: a checkpoint cannot run code. Files are
written under temporary names and renamed, since safetensors leaves half a file where the disk fills up.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from calibfuse.errors import CheckpointError, CheckpointFormatError, InputError, VocabularyError, reason_of

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
README_NAME = "README.md"
ALLOWED_FILES: tuple[str, ...] = ("*.json", "*.safetensors", README_NAME)

_BUNDLED = Path(__file__).parent.parent / "pretrained"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

FINGERPRINT_KEY = "calibfuse.fingerprint"  # in the metadata of our safetensors files
_PADDING_KEY = "calibfuse.padding"
# How safetensors tells of a full disk: it wraps the system's error in one of its own.
_IO_ERROR = "I/O error: "


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 over names, dtypes, shapes and contents of tensors; their order does not matter."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_json(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Read a JSON file that holds one object; `what` names it in messages: "configuration of a calibrator"."""
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"Expected the {what} in {os.fspath(path)!r}, but there is no such file.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot read the {what}: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Expected the {what} in {os.fspath(path)!r}, but it is no JSON: {reason_of(error)}."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"Expected the {what} in {os.fspath(path)!r}, a JSON object, but it holds a {type(value).__name__}."
        )
    return value


def read_config(
    folder: str | os.PathLike[str], filename: str = CONFIG_NAME, *, format_name: str, supported_version: int
) -> dict[str, Any]:
    """Read the configuration of a checkpoint and make sure that it is one of ours, in a format this version knows."""
    path = Path(folder) / filename
    config = read_json(path, f"configuration of a {format_name}")
    if config.get("format") != format_name:
        telling = next((key for key in ("format", "model_type", "architectures") if key in config), None)
        found = f"but its {telling} is {config[telling]!r}" if telling else "but it has no entry 'format'"
        raise CheckpointError(f"Expected the configuration of a {format_name} in {str(path)!r}, {found}.")
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"Expected a format_version of 1 or more in {str(path)!r}, found {version!r}.")
    if version > supported_version:
        raise CheckpointFormatError(
            f"{str(path)!r} is in format version {version} of {format_name}, but this calibfuse reads versions up to "
            f"{supported_version}; install a newer calibfuse."
        )
    return config


def read_tensors(
    path: str | os.PathLike[str], *, expected: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """Read a safetensors file, and nothing but that: tensors by name, in the dtypes of the file.

    The fingerprint that `write_checkpoint` leaves is compared: a flipped bit in the weights is found, not only a
    damaged header.
    """
    name = os.fspath(path)
    try:
        with safetensors.safe_open(name, framework="pt", device="cpu") as file:
            fingerprint = (file.metadata() or {}).get(FINGERPRINT_KEY)
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise CheckpointError(f"Expected weights in {name!r}, but there is no such file.") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"Expected weights in {name!r}, but it is no whole safetensors file: {reason_of(error)}."
        ) from error
    if fingerprint is not None and fingerprint != weights_fingerprint(tensors):
        raise CheckpointError(
            f"The weights in {name!r} are damaged: they do not match the fingerprint saved with them."
        )
    for key, shape in (expected or {}).items():
        if key not in tensors:
            raise CheckpointError(f"Expected a tensor {key!r} of shape {tuple(shape)} in {name!r}, but it has none.")
        found = tuple(tensors[key].shape)
        if found != tuple(shape):
            raise CheckpointError(f"Expected shape {tuple(shape)} for the tensor {key!r} in {name!r}, found {found}.")
    for key in tensors.keys() - expected.keys() if expected is not None else ():
        shape = tuple(tensors[key].shape)
        raise CheckpointError(f"{name!r} has a tensor {key!r} of shape {shape} that does not belong there.")
    return tensors


def write_checkpoint(
    folder: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    files: Mapping[str, str] | None = None,
    names: tuple[str, str] = (WEIGHTS_NAME, CONFIG_NAME),
) -> None:
    """Write a checkpoint, its weights and further text files, so that it is either whole or absent.

    If the disk fills up, an older checkpoint stays; the configuration is renamed last, so that new weights never stand
    beside an old one.
    """
    if "format" not in config or "format_version" not in config:
        raise InputError(f"A configuration needs 'format' and 'format_version', but has only {sorted(config)}.")
    try:
        text = json.dumps(dict(config), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"The configuration cannot be written as JSON: {error}.") from error
    texts = {name: value.encode("utf-8") for name, value in {**(files or {}), names[1]: text}.items()}
    write_files(folder, {names[0]: _tensor_writer(tensors, fingerprint=True), **texts})


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    fingerprint: bool = True,
    durable: bool = True,
    alignment: int = 8,
) -> None:
    """Write one safetensors file, whole or not at all.

    Without a `fingerprint` nothing is compared when it is read (1 ms for each megabyte, at both ends); what can be made
    again need not be `durable`; for files that are mapped into memory, the data begin at a multiple of `alignment`
    bytes, itself one of 8.
    """
    target = Path(path)
    writer = _tensor_writer(tensors, fingerprint=fingerprint, alignment=alignment)
    write_files(target.parent, {target.name: writer}, durable=durable)


def _tensor_writer(tensors: Mapping[str, Tensor], *, fingerprint: bool, alignment: int = 8) -> Callable[[Path], object]:
    """What writes a safetensors file whose data begin at a multiple of `alignment`."""
    for name, tensor in tensors.items():
        if tensor.dtype.is_complex:
            raise InputError(
                f"The tensor {name!r} has the dtype {tensor.dtype}, which cannot be saved; convert it first."
            )
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain[name] = tensor.detach().cpu().contiguous()
        if (address := plain[name].untyped_storage().data_ptr()) in seen:
            plain[name] = plain[name].clone()  # the library refuses tensors that share memory
        seen.add(address)
    metadata = {"format": "pt"} | ({FINGERPRINT_KEY: weights_fingerprint(plain)} if fingerprint else {})
    if alignment == 8:  # as the library aligns
        return lambda path: safetensors.torch.save_file(plain, path, metadata)

    def write(path: Path) -> None:
        safetensors.torch.save_file(plain, path, metadata | {_PADDING_KEY: ""})
        with path.open("rb") as file:
            missing = -(8 + int.from_bytes(file.read(8), "little")) % alignment
        if missing:
            safetensors.torch.save_file(plain, path, metadata | {_PADDING_KEY: " " * missing})

    return write


def write_files(
    folder: str | os.PathLike[str], contents: Mapping[str, bytes | Callable[[Path], object]], *, durable: bool = True
) -> None:
    """Write files of one folder, as bytes or by a function, under temporary names; then rename them in their order.

    The last one is the mark that all are there: an old one is removed before the first rename.
    """
    place = Path(folder).expanduser()
    temporary: dict[Path, Path] = {}
    made: list[Path] = []
    try:
        made = [parent for parent in (place, *place.parents) if not parent.exists()]
        place.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            path = temporary[place / name] = place / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
            path.touch(exist_ok=False)
            mode = path.stat().st_mode
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content(path)
            path.chmod(mode)  # safetensors makes a file for the user alone
            if durable:
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        if len(temporary) > 1:
            (place / list(contents)[-1]).unlink(missing_ok=True)
        for target, path in temporary.items():
            os.replace(path, target)
    except OSError as error:
        raise CheckpointError(f"Cannot write {str(place)!r}: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise CheckpointError(f"Cannot write {str(place)!r}: {reason_of(error).rpartition(_IO_ERROR)[2]}.") from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        with suppress(OSError):  # a folder in use stays, and those around it
            for each in made:
                each.rmdir()


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

    A folder that exists wins over a Hub id of the same spelling; None stands for the bundled checkpoint `default`. The
    other arguments are those of huggingface_hub's `snapshot_download`.
    """
    if name_or_path is None:
        name_or_path = _BUNDLED / default
        if not name_or_path.is_dir():
            raise CheckpointError(f"The bundled checkpoint {default!r} is missing from this installation of calibfuse.")
    if not isinstance(name_or_path, str | os.PathLike):
        raise CheckpointError(f"Expected a folder or a Hub id of a checkpoint, got {name_or_path!r}.")
    # a path is no Hub id, even where it is spelled like one
    name = name_or_path if isinstance(name_or_path, str) else str(Path(name_or_path).expanduser().absolute())
    if (folder := find_folder(name, "checkpoint", revision=revision)) is not None:
        return folder
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


def find_folder(name: str, what: str, *, revision: str | None = None) -> Path | None:
    """The folder of this name, or None where it can only be a Hub id; `what` it holds, for messages."""
    if not name.strip():
        raise CheckpointError(f"Expected a folder or a Hub id of a {what}, got an empty name.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"Revision {revision!r} was given, but the {what} is the local folder {str(folder)!r}.")
        return folder
    if folder.exists():
        raise CheckpointError(f"Expected the folder of a {what}, but {name!r} is a file; give the folder around it.")
    if not _REPO_ID.fullmatch(name):
        raise CheckpointError(f"There is no {what} folder {name!r}, and it cannot be the id of a Hub repository.")
    return None


def check_repository(repo_id: str, *, revision: str | None = None, local_files_only: bool = False) -> None:
    """Ask the Hub once for a model that its cache has not; loaders ask again and again where it cannot be reached."""
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


def check_tokenizer(name: str) -> None:
    """`check_repository` for the name of a tokenizer; what is a path, or in the cache, is not asked for."""
    from huggingface_hub import try_to_load_from_cache

    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    is_id = _REPO_ID.fullmatch(name) is not None and not Path(name).exists()
    if is_id and not any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        try:
            check_repository(name)
        except CheckpointError as error:
            raise VocabularyError(str(error).replace("the model", "the tokenizer", 1)) from error


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
    """Upload a checkpoint folder to the Hub, making the repository and the branch where they do not exist."""
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
