"""`calibfuse align-embedding`: fit the alignment of a calibrator with a target model, for mode "embedding"."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from calibfuse.cli.loading import check_calibrator, check_model, load_model
from calibfuse.cli.options import add, add_model
from calibfuse.cli.terminal import printable
from calibfuse.errors import InputError

if TYPE_CHECKING:
    from calibfuse.loading import PretrainedCalibrator

EXAMPLES = """\
examples:
  calibfuse align-embedding --model ./my-model
  calibfuse align-embedding --calibrator ./my-calibrator --model ./my-model
  calibfuse generate "The new neighbour is" --model ./my-model --mode embedding     # afterwards

The matrix is saved beside the calibrator, or in the cache folder where that is not yours to change.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    add_model(parser)
    epochs = {"type": int, "default": 5, "help": "passes over the common tokens"}
    output = {"help": "folder (default: the calibrator's, else the cache folder)"}
    add(parser, "calibrator", "seed", "json", epochs=epochs, output=output)


def run(args: argparse.Namespace) -> int:
    """Fit, save, report."""
    check_model(args)
    check_calibrator(args.calibrator)
    from calibfuse.calibrator import load_universal
    from calibfuse.embedding.training import train_alignment

    calibrator = load_universal(args.calibrator, why="Only the universal calibrator can be aligned")
    target = load_model(args, args.model)
    start = time.perf_counter()
    alignment = train_alignment(
        calibrator.bind(target.tokenizer),
        target.model,
        epochs=args.epochs,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - start
    folder = alignment.save(_place(args, calibrator))
    facts = alignment.metadata
    if args.json:
        print(json.dumps({**asdict(facts), "folder": str(folder), "seconds": round(seconds, 2)}))
        return 0
    print(
        f"aligned with {printable(facts.target)}: {facts.common_tokens:,} common tokens, {facts.width} x "
        f"{facts.hidden_size} channels, {seconds:.1f} s\n"
        f"loss of {facts.held_out_tokens:,} held-out tokens: {facts.held_out_loss:.3f} nats; by chance "
        f"{math.log(11):.3f}\n"  # the own token among ten others
        f"written to {folder}"
    )
    return 0


def _place(args: argparse.Namespace, calibrator: PretrainedCalibrator) -> Path:
    """Where the alignment goes: where `CalibFusion.from_pretrained` looks, unless the user says otherwise."""
    from calibfuse.embedding.alignment import alignment_folders

    if args.output:
        return Path(args.output)
    beside = Path(args.calibrator).expanduser() if args.calibrator else None
    if beside is None or not beside.is_dir() or not os.access(beside, os.W_OK):
        beside = None  # the bundled one, the Hub's cache, or a folder of somebody else
    folders = alignment_folders(beside, calibrator.fingerprint)
    if not folders:
        raise InputError("There is no home directory to keep the alignment in; name a folder with --output.")
    return folders[0]
