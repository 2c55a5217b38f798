"""`calibfuse push`: publish a calibrator folder on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

EXAMPLES = """\
examples:
  calibfuse push my-calibrator your-name/my-calibrator
  calibfuse push my-calibrator your-name/my-calibrator --private --message "trained on 200M bytes"

Log in once with `hf auth login`, or set HF_TOKEN. Only safetensors, JSON and README.md are uploaded.
A README.md in the folder is kept, also one of your own; where it has no metadata for the Hub's filters, those of the
model card are put before it, and where it says your-name/your-calibrator, the repository's name. Without a README.md,
the model card is written.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `push`."""
    parser.add_argument("folder", help="folder of a trained calibrator, as train-calibrator or save_pretrained left it")
    parser.add_argument("repo_id", help="where it goes: your-name/name-of-the-calibrator; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private (an existing one stays)")
    parser.add_argument("--revision", help="branch to push to, made if it does not exist (default: main)")
    parser.add_argument("--message", default="Upload calibrator", help="commit message (default: %(default)r)")


def run(args: argparse.Namespace) -> int:
    """Load the folder, which proves that it is whole, and push it; print the address of the result."""
    from calibfuse.errors import CheckpointError, InputError

    if not os.path.isdir(os.path.expanduser(args.folder)):
        raise CheckpointError(f"Expected a calibrator folder, but {args.folder!r} is none.")
    from calibfuse.calibrator import Calibrator
    from calibfuse.hub import README_NAME

    calibrator = Calibrator.from_pretrained(args.folder, local_files_only=True)
    if not isinstance(calibrator, Calibrator):
        raise InputError(
            f"{args.folder!r} holds a causal language model of transformers; publish it with `hf upload`, or with its "
            "own push_to_hub."
        )
    card = Path(args.folder).expanduser() / README_NAME
    address = calibrator.push_to_hub(
        args.repo_id,
        private=args.private,
        revision=args.revision,
        commit_message=args.message,
        card=card.read_text(encoding="utf-8") if card.is_file() else None,
    )
    print(f"pushed {args.folder} to {address}")
    return 0
