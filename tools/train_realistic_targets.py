"""Train three target LMs with three real tokenizers on unfiltered text: what detoxification is measured on.

    python tools/train_realistic_targets.py --data DATA --tokenizers DATA/tokenizers --size gpu --minutes 30
    python tools/train_realistic_targets.py --data DATA --tokenizers DATA/tokenizers --size cpu --minutes 20
    python tools/train_realistic_targets.py ... --only pythia --resume

A thin layer over `tools/train_target_lm.py`, which trains, resumes, shows progress and measures held-out bits per
byte (with the full softmax); this file holds the settings. The models differ in tokenizer (byte-level BPE of GPT-2,
SentencePiece BPE with byte fallback of Llama 2, byte-level BPE of Pythia), architecture and width. Their text is posts,
encyclopedia, conversations and comments that nobody cleaned: they say toxic things, and a calibrator has something to
do. They stay out of the repository: the default folder is `targets` in calibfuse's cache (CALIBFUSE_CACHE, else
`~/.cache/calibfuse`).

`--size gpu` gives 77 to 111 million parameters each, with the full softmax. `--size cpu` gives 5 to 6 million; there
the softmax over 32,000 to 50,000 tokens is most of the work, so training uses all labels of a batch and 1,024 other
tokens drawn at random, whose logits get log(others / drawn): the partition function is estimated without bias.

Targets that are done are left alone; one that was stopped or killed goes on with `--resume`. On a CPU under Linux, set
MALLOC_MMAP_THRESHOLD_=8000000000, MALLOC_TRIM_THRESHOLD_=16000000000 and ONEDNN_PRIMITIVE_CACHE_CAPACITY=64: freed
buffers then stay with the process.

What it leaves out: downloading text or tokenizers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import train_target_lm

logger = logging.getLogger("train_realistic_targets")

SUMMARY = "targets.json"


@dataclass(frozen=True)
class TargetKind:
    """One of the three targets.

    Attributes:
        tokenizer_files: names to look for in `--tokenizers`, best first; each a tokenizer.json.
        architecture: as `train_target_lm.py` names it.
        cpu_width: width under `--size cpu`; the smaller vocabulary gets the wider model.
        gpu_width: width under `--size gpu`.
    """

    tokenizer_files: tuple[str, ...]
    architecture: str
    cpu_width: int
    gpu_width: int


KINDS: dict[str, TargetKind] = {
    "gpt2": TargetKind(("gpt2.json",), "gpt2", 96, 576),
    # Phi-3-mini's tokenizer is Llama 2's with eleven special tokens more.
    "llama-2": TargetKind(("llama-2.json", "phi-3-mini.json"), "llama", 128, 640),
    "pythia": TargetKind(("pythia.json",), "llama", 96, 640),
}
SIZES: dict[str, tuple[str, ...]] = {
    "cpu": ("--layers", "6", "--heads", "4", "--sequence-length", "128", "--softmax-sample", "1024"),
    "gpu": (
        *("--layers", "12", "--heads", "8", "--sequence-length", "512", "--batch-size", "32"),
        *("--learning-rate", "1e-3", "--device", "cuda"),
    ),
}


def tokenizer_path(kind: TargetKind, folder: Path) -> Path:
    """The tokenizer of a target.

    Raises:
        UsageError: the folder has none of its files.
    """
    for name in kind.tokenizer_files:
        if (folder / name).is_file():
            return folder / name
    raise train_target_lm.UsageError(f"expected one of {', '.join(kind.tokenizer_files)} in {folder}")


def training_arguments(name: str, args: argparse.Namespace) -> list[str]:
    """The command line of `train_target_lm.py` that trains one target."""
    kind = KINDS[name]
    width = kind.cpu_width if args.size == "cpu" else kind.gpu_width
    inner = [] if args.size == "cpu" or kind.architecture == "gpt2" else ["--inner", str(4 * width)]
    return [
        *("--data", str(args.data), *SIZES[args.size], *inner),
        *("--minutes", f"{args.minutes:g}", "--seed", str(args.seed), "--shard", args.shard),
        *("--output", str(args.output / name), "--name", f"calibfuse {name} target ({args.size})"),
        *("--tokenizer", str(tokenizer_path(kind, args.tokenizers))),
        *("--architecture", kind.architecture, "--width", str(width)),
        *(["--quiet"] if args.quiet else []),
    ]


def last_measure(folder: Path) -> dict[str, float] | None:
    """Where the training in a folder is: the last entry of its history and its share of the budget; None: not begun."""
    path = folder / train_target_lm.STATE_FILE
    if not path.exists():
        return None
    with train_target_lm.safe_open(path, framework="pt") as stored:
        description = json.loads(stored.metadata()["description"])
    history = description["progress"]["history"]
    if not history:
        return None
    minutes = float(description["settings"]["minutes"])
    return {**history[-1], "share_of_budget": min(1.0, description["progress"]["seconds"] / (60 * minutes))}


def default_output() -> Path:
    """`targets` in calibfuse's cache folder."""
    base = os.environ.get("CALIBFUSE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "calibfuse")
    return Path(base).expanduser() / "targets"


def build_parser() -> argparse.ArgumentParser:
    """The command line options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with text/ and toxicity/, see SOURCES in train_target_lm.py")
    add("--tokenizers", type=Path, required=True, help="folder with gpt2.json, llama-2.json or phi-3-mini.json, ...")
    add("--output", type=Path, default=default_output(), help="one folder per target (default: %(default)s)")
    add("--size", choices=tuple(SIZES), default="cpu", help="cpu: 5 to 6 M parameters; gpu: 77 to 111 M")
    add("--minutes", type=float, default=20.0, help="wall time per target (default: %(default)s)")
    add("--only", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="some of the targets")
    add("--seed", type=int, default=0)
    add("--shard", default="0/1", metavar="i/n", help="documents with number %% n == i; 0/2 leaves 1/2 to a judge")
    add("--resume", action="store_true", help="go on with targets that were stopped")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Returns:
        The exit status: 0, 2 after one sentence on bad input, 130 when stopped after saving.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in args.only:
        try:
            words = training_arguments(name, args)
        except train_target_lm.UsageError as error:
            logger.error("train_realistic_targets: %s", error)
            return 2
        begun = last_measure(args.output / name)
        if begun is not None and begun["share_of_budget"] >= 1.0:
            logger.info("%s: done before", name)
            continue
        logger.info("%s: %s", name, args.output / name)
        status = train_target_lm.main([*words, *(["--resume"] if args.resume and begun else [])])
        if status:
            return status
    found = {name: last_measure(args.output / name) for name in KINDS if (args.output / name).is_dir()}
    train_target_lm.write_json(args.output / SUMMARY, {"size": args.size, "seed": args.seed, "targets": found})
    for name, measure in found.items():
        if measure is not None:
            logger.info("%s: %.3f bits per byte held out", name, measure["bits_per_byte"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
