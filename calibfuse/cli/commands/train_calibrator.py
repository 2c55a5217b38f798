"""`calibfuse train-calibrator`: text files in, a calibrator out."""

from __future__ import annotations

import argparse
import logging
import os

from calibfuse.cli.loading import check_calibrator
from calibfuse.cli.options import FILES, Fields, add
from calibfuse.errors import InputError

EXAMPLES = """\
examples:
  calibfuse train-calibrator web/ comments.csv.gz --output my-calibrator     # sorted by the bundled scorer

  # text that you have sorted yourself
  calibfuse train-calibrator --wanted clean.jsonl --unwanted web.jsonl.xz --output my-calibrator

  # any other attribute: two piles of text that differ in it
  calibfuse train-calibrator --wanted polite.txt --unwanted rude.txt --init-from bundled --steps 500 --output polite

  # the bundled calibrator with another idea of what is toxic: its heads learn from text that your scorer sorts
  calibfuse train-calibrator web/ --scorer my-scorer --init-from bundled --heads-only \\
      --learning-rate 0.001 --output mine

  # several processes or machines (extra: train)
  accelerate launch --num_processes 2 -m calibfuse train-calibrator web/ --output my-calibrator

Files may be .txt, .jsonl or .csv, each also as .gz or .xz, or folders of these.
"""


TRAINING = Fields(
    "calibfuse.training.config:TrainingConfig",
    *(
        "steps",
        "batch_size",
        "sequence_length",
        "learning_rate",
        "flagged_share",
        "heads_only",
        "seed",
        "save_every",
        "validate_every",
        "precision",
    ),
)
SHAPE = Fields(
    "calibfuse.calibrator.model:CalibratorConfig",
    *("width", "token_width"),
    layer_count="layers",
    bucket_count="buckets",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    help_ = "text that the scorer sorts: .txt, .jsonl, .csv (.gz, .xz) or folders"
    parser.add_argument("text", nargs="*", metavar="TEXT", help=help_)
    add(parser, "resume", "quiet", output={"required": True})
    add(
        parser.add_argument_group("text"),
        "scorer",
        "toxic_from",
        "text_field",
        wanted=FILES | {"help": "text as it is to be (non-toxic, polite, on topic): both heads learn it"},
        unwanted=FILES | {"help": "text as it is not to be, or unfiltered: the reference head's"},
    )
    model = parser.add_argument_group("model")
    add(
        model,
        "name",
        "license",
        init_from={"metavar": "CALIBRATOR", "help": "start from these weights: bundled, folder or Hub id"},
        pool={"metavar": "DIR", "help": "tokenizer pool of an earlier run (default: trained on the text)"},
    )
    SHAPE.add(model)
    run = parser.add_argument_group("training")
    TRAINING.add(run, precision={"choices": ("bf16", "fp32")})
    add(run, "device")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    # oneDNN keeps one compiled kernel per matrix shape, 1,024 of them by default; batches differ in shape, and the
    # cache grew to several gigabytes in a long CPU run. Read when torch is first used.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    from calibfuse.calibrator.model import CalibratorConfig
    from calibfuse.hub import resolve_checkpoint
    from calibfuse.scorers import load_scorer
    from calibfuse.training.config import TrainingConfig, TrainingText
    from calibfuse.training.run import run_training

    logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(message)s")
    chosen = SHAPE.values(args)
    if args.init_from is not None and chosen:
        raise InputError("The shape is that of --init-from: leave out --layers, --width, --token-width and --buckets.")
    training = TrainingConfig(**TRAINING.values(args))
    check_calibrator(None if args.init_from == "bundled" else args.init_from)
    text = TrainingText(
        wanted=args.wanted,
        unwanted=args.unwanted,
        unfiltered=args.text,
        scorer=load_scorer(args.scorer, fast=True) if args.text else None,
        threshold=args.toxic_from,
        text_field=args.text_field,
    )
    if "width" in chosen:
        chosen["hidden_width"] = 4 * chosen["width"]
    output = run_training(
        text,
        args.output,
        training=training,
        shape=CalibratorConfig(**chosen) if chosen else None,
        pool_folder=args.pool,
        init_from=args.init_from if args.init_from != "bundled" else resolve_checkpoint(None),
        resume=args.resume,
        device=args.device,
        facts={key: value for key, value in (("name", args.name), ("license", args.license)) if value},
        show_progress=not args.quiet,
    )
    if output is None:
        print(f"Stopped and saved. Go on with the same command and --resume (checkpoint in {args.output}/work).")
        return 130
    trial = f'calibfuse generate "The new neighbour is" --calibrator {output} --compare'
    print(f"Calibrator written to {output}. Try: {trial}")
    return 0
