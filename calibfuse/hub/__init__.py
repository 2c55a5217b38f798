"""Where a checkpoint lies, which files it has, and how they are read and written; it knows none of the classes.

A checkpoint is a folder with `config.json` (what it is, with a format name and version), `model.safetensors` (the
weights) and optionally further JSON files and a `README.md`. It is found in the package (bundled), in a local folder,
in the Hub's cache or on the Hub. Nothing but safetensors, JSON and `README.md` is ever downloaded, read or uploaded,
so a checkpoint cannot run code.

Left out on purpose: other weight formats, several weight files, and remote code.
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
