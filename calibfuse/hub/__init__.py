"""Where a checkpoint lies, which files it has, and how they are read and written; it knows none of the classes.

Nothing but safetensors, JSON and `README.md` is ever downloaded, read or uploaded: a checkpoint cannot run code.
"""

from calibfuse.hub.files import (
    ALLOWED_FILES,
    CONFIG_NAME,
    README_NAME,
    WEIGHTS_NAME,
    read_config,
    read_json,
    read_tensors,
    weights_fingerprint,
    write_checkpoint,
    write_files,
    write_tensors,
)
from calibfuse.hub.remote import check_repository, resolve_checkpoint, upload_folder

__all__ = [
    "ALLOWED_FILES",
    "CONFIG_NAME",
    "README_NAME",
    "WEIGHTS_NAME",
    "check_repository",
    "read_config",
    "read_json",
    "read_tensors",
    "resolve_checkpoint",
    "upload_folder",
    "weights_fingerprint",
    "write_checkpoint",
    "write_files",
    "write_tensors",
]
