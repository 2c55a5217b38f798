"""The part of `calibfuse align` that fits the alignment of a calibrator with a target model, for mode "embedding"."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibfuse.cli.terminal import Terminal, printable
from calibfuse.errors import InputError

if TYPE_CHECKING:
    from calibfuse.embedding.alignment import Alignment
    from calibfuse.loading import PretrainedCalibrator

_CURVE_LINES = 10


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--target` and the options of the fit; imports nothing heavy."""
    group = parser.add_argument_group("alignment with a model, for mode embedding")
    group.add_argument("--target", metavar="PATH_OR_HUB", help="fit the alignment with this causal language model")
    group.add_argument(
        "--embeddings",
        choices=("input", "output"),
        default="input",
        help="embeddings to align: input as published, or output, the space that states live in (default: %(default)s)",
    )
    group.add_argument("--epochs", type=int, default=5, help="passes over the common tokens (default: %(default)s)")
    group.add_argument("--negatives", type=int, default=10, help="random tokens per token (default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=32, help="tokens per step (default: %(default)s)")
    group.add_argument("--learning-rate", type=float, default=1e-3, help="of Adam (default: %(default)s)")
    group.add_argument("--held-out", type=float, default=0.05, help="share of tokens to test on (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    group.add_argument(
        "--output", metavar="DIR", help="folder for the alignment (default: the calibrator's, else the cache folder)"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def align_target(args: argparse.Namespace) -> dict[str, Any]:
    """Fit and save the alignment of the arguments; print what came out unless `--json` is set.

    Returns:
        Its metadata, with "folder" and "seconds".

    Raises:
        CalibfuseError: calibrator or target cannot be loaded, an option is out of range, or the folder not written to.
    """
    from calibfuse.calibrator import load_universal
    from calibfuse.embedding.training import train_alignment
    from calibfuse.generation.language_model import load_language_model

    calibrator = load_universal(
        args.calibrator,
        local_files_only=args.local_files_only,
        why="Only the universal calibrator can be aligned",
    )
    target = load_language_model(args.target, device=args.device, local_files_only=args.local_files_only)
    start = time.perf_counter()
    alignment = train_alignment(
        calibrator,
        target.model,
        args.tokenizer or target.tokenizer,
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
    if not args.json:
        _show(alignment, folder, seconds)
    return {**alignment.metadata.to_dict(), "folder": str(folder), "seconds": round(seconds, 2)}


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
    metadata = alignment.metadata
    terminal = Terminal()
    terminal.write(
        f"aligned {metadata.embeddings} embeddings with {printable(metadata.target)}: "
        f"{metadata.common_tokens:,} common tokens, {metadata.width} x {metadata.hidden_size} channels, {seconds:.1f} s"
    )
    every = max(1, len(metadata.loss_curve) // _CURVE_LINES)
    points = [*metadata.loss_curve[: every * (_CURVE_LINES - 1) : every], metadata.loss_curve[-1]]
    terminal.table(("step", "loss (nats)"), [(f"{step:,}", f"{loss:.3f}") for step, loss in dict(points).items()])
    if metadata.held_out_loss is not None:
        terminal.write()
        rows = [("loss (nats)", f"{metadata.held_out_loss:.3f}", f"{_chance_loss():.3f}")]
        for choices, share in metadata.retrieval.items():
            rows.append((f"first of {int(choices):,}", f"{100 * share:.1f} %", f"{100 / int(choices):.1f} %"))
        terminal.table((f"{metadata.held_out_tokens:,} held-out tokens", "value", "chance"), rows)
    terminal.write()
    terminal.write(f"written to {folder}")


def _chance_loss() -> float:
    """Loss of guessing among the own token and ten others, in nats."""
    import math

    return math.log(11)
