"""`calibfuse align-embedding`: fit the alignment of a calibrator with a target model, for mode "embedding"."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from calibfuse.cli.loading import check_calibrator, check_model, load_target
from calibfuse.cli.options import add, add_model
from calibfuse.cli.terminal import Terminal, printable
from calibfuse.errors import InputError

if TYPE_CHECKING:
    from calibfuse.embedding.alignment import Alignment
    from calibfuse.loading import PretrainedCalibrator

EXAMPLES = """\
examples:
  calibfuse align-embedding --model ./my-model
  calibfuse align-embedding --calibrator ./my-calibrator --model ./my-model --embeddings output
  calibfuse generate "The new neighbour is" --model ./my-model --mode embedding     # afterwards

The matrix is saved beside the calibrator, or in the cache folder where that is not yours to change.
"""

_CURVE_LINES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    add_model(parser)
    fit = parser.add_argument_group("fit")
    add(
        fit,
        "calibrator",
        tokenizer={"metavar": "PATH_OR_HUB", "help": "of the target (default: the model's own)"},
        embeddings={
            "choices": ("input", "output"),
            "default": "input",
            "help": "embeddings to align: input as published, or output, the space that states live in",
        },
        epochs={"type": int, "default": 5, "help": "passes over the common tokens"},
        negatives={"type": int, "default": 10, "help": "random tokens per token"},
        batch_size={"default": 32, "metavar": "N", "help": "tokens per step"},
        learning_rate={"type": float, "default": 1e-3, "help": "of Adam"},
        held_out={"type": float, "default": 0.05, "help": "share of tokens to test on"},
        seed={},
    )
    output = parser.add_argument_group("output")
    add(output, "json", "quiet", output={"help": "folder (default: the calibrator's, else the cache folder)"})


def run(args: argparse.Namespace) -> int:
    """Fit, save, report."""
    check_model(args)
    check_calibrator(args.calibrator)
    from calibfuse.calibrator import load_universal
    from calibfuse.embedding.training import train_alignment

    calibrator = load_universal(
        args.calibrator,
        local_files_only=args.local_files_only,
        why="Only the universal calibrator can be aligned",
    )
    target = load_target(args)
    start = time.perf_counter()
    alignment = train_alignment(
        calibrator.bind(args.tokenizer or target.tokenizer),
        target.model,
        negatives=args.negatives,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        held_out=args.held_out,
        embeddings=args.embeddings,
        progress=not args.quiet and sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - start
    folder = alignment.save(_place(args, calibrator))
    if args.json:
        print(json.dumps({**alignment.metadata.to_dict(), "folder": str(folder), "seconds": round(seconds, 2)}))
    else:
        _show(alignment, folder, seconds)
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


def _show(alignment: Alignment, folder: Path, seconds: float) -> None:
    facts = alignment.metadata
    terminal = Terminal()
    terminal.write(
        f"aligned {facts.embeddings} embeddings with {printable(facts.target)}: {facts.common_tokens:,} common tokens, "
        f"{facts.width} x {facts.hidden_size} channels, {seconds:.1f} s"
    )
    every = max(1, len(facts.loss_curve) // _CURVE_LINES)
    points = [*facts.loss_curve[: every * (_CURVE_LINES - 1) : every], facts.loss_curve[-1]]
    terminal.table(("step", "loss (nats)"), [(f"{step:,}", f"{loss:.3f}") for step, loss in dict(points).items()])
    if facts.held_out_loss is not None:
        terminal.write()
        rows = [("loss (nats)", f"{facts.held_out_loss:.3f}", f"{_chance_loss():.3f}")]
        for choices, share in facts.retrieval.items():
            rows.append((f"first of {int(choices):,}", f"{100 * share:.1f} %", f"{100 / int(choices):.1f} %"))
        terminal.table((f"{facts.held_out_tokens:,} held-out tokens", "value", "chance"), rows)
    terminal.write()
    terminal.write(f"written to {folder}")


def _chance_loss() -> float:
    """Loss of guessing among the own token and ten others, in nats."""
    import math

    return math.log(11)
