"""`calibfuse train-calibrator`: text files in, a calibrator out."""

from __future__ import annotations

import argparse
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from calibfuse.training.config import TrainingConfig, TrainingText

EXAMPLES = """\
examples:
  # text that you have sorted yourself
  calibfuse train-calibrator --wanted clean.jsonl --unwanted web.jsonl.xz --output my-calibrator

  # any other attribute: two piles of text that differ in it
  calibfuse train-calibrator --wanted polite.txt --unwanted rude.txt --init-from bundled --steps 500 --output polite

  # unfiltered text, sorted by the bundled toxicity scorer
  calibfuse train-calibrator --from-unfiltered web/ comments.csv.gz --output my-calibrator

  # go on after a kill or Ctrl-C, with the same arguments
  calibfuse train-calibrator --from-unfiltered web/ comments.csv.gz --output my-calibrator --resume

  # a few minutes on your own domain, from the bundled calibrator's weights
  calibfuse train-calibrator --wanted ok.txt --unwanted all.txt --init-from bundled --steps 500 --output mine

  # the bundled calibrator with another idea of what is toxic: its heads learn from text that your scorer sorts
  calibfuse train-calibrator --from-unfiltered web/ --scorer my-scorer --init-from bundled --heads-only \\
      --learning-rate 0.001 --output mine

  # the first 3 layers of a pretrained causal language model, trained further, and a reference model
  calibfuse train-calibrator --wanted ok.txt --unwanted all.txt --init-from gpt2 --num-layers 3 --output mine

  # several processes or machines (extra: train)
  accelerate launch --num_processes 2 -m calibfuse train-calibrator --from-unfiltered web/ --output my-calibrator

Files may be .txt, .jsonl or .csv, each also as .gz or .xz, folders of these, or hf:NAME for a data set of the Hub.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    text = parser.add_argument_group("text")
    text.add_argument(
        "--wanted",
        "--non-toxic",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text as it is to be (non-toxic, polite, on topic): both heads learn it",
    )
    text.add_argument(
        "--unwanted",
        "--reference",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text as it is not to be, or unfiltered text: the reference head's",
    )
    text.add_argument("--from-unfiltered", nargs="+", default=[], metavar="FILE", help="text that the scorer sorts")
    text.add_argument("--scorer", default="bundled", help="toxicity scorer for sorting (default: %(default)s)")
    text.add_argument("--threshold", type=float, default=0.5, help="toxic from this score (default: %(default)s)")
    text.add_argument("--text-field", help="key or column of the text (default: found by name)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the calibrator; made when missing")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--init-from",
        metavar="CALIBRATOR",
        help="start from these weights ('bundled', folder or Hub id); with --num-layers, a causal language model",
    )
    model.add_argument(
        "--num-layers", type=int, metavar="K", help="keep the first K layers of the language model in --init-from"
    )
    model.add_argument("--layers", type=int, help="blocks of the body (default: 3)")
    model.add_argument("--width", type=int, help="width of the body (default: 192)")
    model.add_argument("--token-width", type=int, help="width of a token's vector (default: 128)")
    model.add_argument("--buckets", type=int, help="rows of the hashed feature table (default: 32768)")
    model.add_argument("--pool", metavar="DIR", help="tokenizer pool of an earlier run (default: trained on the text)")
    run = parser.add_argument_group("training")
    run.add_argument("--steps", type=int, default=4000, help="optimiser steps (default: %(default)s)")
    run.add_argument("--rows", type=int, default=12, help="rows of a batch (default: %(default)s)")
    run.add_argument("--slots", type=int, default=192, help="tokens of a row (default: %(default)s)")
    run.add_argument("--learning-rate", type=float, help="peak (default: 0.003; with --num-layers 0.0003)")
    run.add_argument(
        "--flagged-share",
        type=float,
        help="share of passages drawn from the toxic or unfiltered ones (default: as they come)",
    )
    run.add_argument(
        "--heads-only",
        action="store_true",
        help="leave the body of --init-from as it is: for text that is sorted anew, in half the time",
    )
    run.add_argument("--candidates", type=int, default=2560, help="tokens of the softmax subset (default: %(default)s)")
    run.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    run.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (default: %(default)s)")
    run.add_argument(
        "--validate-every", type=int, default=1000, help="steps between validations (default: %(default)s)"
    )
    run.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(default: %(default)s)")
    run.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: the best there is")
    run.add_argument("--name", help="name of the calibrator on its model card")
    run.add_argument("--license", help="licence of the weights on the model card, e.g. apache-2.0")
    run.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    # oneDNN keeps one compiled kernel per matrix shape, 1,024 of them by default; batches differ in shape, and the
    # cache grew to several gigabytes in a long CPU run. Read when torch is first used.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    from calibfuse.calibrator.model import CalibratorConfig
    from calibfuse.training.config import TrainingConfig
    from calibfuse.training.run import run_training

    logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(message)s")
    if args.num_layers is not None:
        return _run_from_language_model(args)
    text = _training_text(args)
    training = _training_config(args, TrainingConfig.learning_rate)
    chosen = _chosen_shape(args)
    if "width" in chosen:
        chosen["hidden_width"] = 4 * chosen["width"]
    output = run_training(
        text,
        args.output,
        training=training,
        shape=CalibratorConfig(**chosen) if chosen else None,
        pool_folder=args.pool,
        init_from=args.init_from if args.init_from != "bundled" else _bundled(),
        resume=args.resume,
        device=args.device,
        facts=_facts(args),
        show_progress=not args.quiet,
    )
    return _close(args, output)


def _run_from_language_model(args: argparse.Namespace) -> int:
    """The branch for --num-layers: the first layers of a causal language model."""
    from calibfuse.errors import InputError
    from calibfuse.training.truncated_lm import DEFAULT_LEARNING_RATE, run_lm_training

    if args.init_from is None:
        raise InputError("--num-layers needs --init-from MODEL: a causal language model of transformers.")
    if args.heads_only:
        raise InputError("--heads-only is for calibrators that read bytes; leave it out with --num-layers.")
    if _chosen_shape(args) or args.pool is not None:
        raise InputError(
            "With --num-layers shape and tokenizer are those of --init-from: leave out --layers, --width, "
            "--token-width, --buckets and --pool."
        )
    output = run_lm_training(
        _training_text(args),
        args.output,
        init_from=args.init_from,
        layer_count=args.num_layers,
        training=_training_config(args, DEFAULT_LEARNING_RATE),
        resume=args.resume,
        device=args.device,
        facts=_facts(args),
        show_progress=not args.quiet,
    )
    return _close(args, output)


def _training_text(args: argparse.Namespace) -> TrainingText:
    from calibfuse.scorers import load_scorer
    from calibfuse.training.config import TrainingText

    return TrainingText(
        wanted=args.wanted,
        unwanted=args.unwanted,
        unfiltered=args.from_unfiltered,
        scorer=load_scorer(args.scorer, fast=True) if args.from_unfiltered else None,
        threshold=args.threshold,
        text_field=args.text_field,
    )


def _training_config(args: argparse.Namespace, learning_rate: float) -> TrainingConfig:
    from calibfuse.training.config import TrainingConfig

    return TrainingConfig(
        steps=args.steps,
        batch_size=args.rows,
        sequence_length=args.slots,
        learning_rate=learning_rate if args.learning_rate is None else args.learning_rate,
        flagged_share=args.flagged_share,
        heads_only=args.heads_only,
        candidate_count=args.candidates,
        seed=args.seed,
        save_every=args.save_every,
        validate_every=args.validate_every,
        precision=args.precision,
    )


def _chosen_shape(args: argparse.Namespace) -> dict[str, Any]:
    """The sizes that were given."""
    sizes = {
        "layer_count": args.layers,
        "width": args.width,
        "token_width": args.token_width,
        "bucket_count": args.buckets,
    }
    return {key: value for key, value in sizes.items() if value is not None}


def _facts(args: argparse.Namespace) -> dict[str, str]:
    return {key: value for key, value in (("name", args.name), ("license", args.license)) if value}


def _close(args: argparse.Namespace, output: Path | None) -> int:
    """Say where the result is; the exit code."""
    if output is None:
        print(f"Stopped and saved. Go on with the same command and --resume (checkpoint in {args.output}/work).")
        return 130
    print(f"Calibrator written to {output}. Try: calibfuse generate --calibrator {output} --prompt ... --compare")
    return 0


def _bundled() -> str:
    from calibfuse.hub import resolve_checkpoint

    return str(resolve_checkpoint(None))
