"""`calibfuse train-scorer`: labelled texts in, a small linear toxicity scorer out."""

from __future__ import annotations

import argparse

from calibfuse.cli.options import FILES, SWITCH, Fields, add
from calibfuse.errors import InputError

EXAMPLES = """\
examples:
  # rows with a text and a label from 0 to 1 (or 0/1, true/false)
  calibfuse train-scorer --data comments.jsonl.xz --output my-scorer

  # one split of a file, and evenness over groups of people
  calibfuse train-scorer --data jigsaw.jsonl.xz --where split=jigsaw_train --identity-terms --output my-scorer

  # toxic texts with neutral rewrites, clean background text, and nothing that another scorer learned from
  calibfuse train-scorer --pairs paradetox.jsonl --non-toxic wiki.jsonl --exclude jigsaw.jsonl.xz --output sorter

  # like Perspective, from half of the texts that it scored; the other half stays for something else
  calibfuse train-scorer --data jigsaw.jsonl.xz --realtoxicityprompts realtoxicityprompts.jsonl.xz --fold 2/2 \\
      --output perspective-like

Use it with `--scorer my-scorer` in the other commands. Sort training text and judge results with different scorers.
"""


FEATURES = Fields("calibfuse.scorers.linear:FeatureConfig", "bucket_bits", "char_min", "char_max", seed="hash_seed")
TRAINING = Fields("calibfuse.scorers.training:TrainingOptions", "windows", "iterations", "seed")
DATA = Fields(
    "calibfuse.scorers.recipe:ScorerData",
    *("data", "text_field", "label_field", "distrust_lowercase", "pairs", "realtoxicityprompts", "exclude"),
)
ADDED = Fields("calibfuse.scorers.recipe:ScorerData", "identity_terms", "ambiguous_words", "strong_words")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    data = parser.add_argument_group("data (.jsonl or .csv, also .gz or .xz)")
    DATA.add(data)
    add(
        data,
        where={"action": "append", "default": [], "metavar": "FIELD=VALUE", "help": "only such rows of --data"},
        fold={"default": "1/1", "metavar": "I/N", "help": "part I of N of --realtoxicityprompts, by hash of the texts"},
        non_toxic=FILES | {"help": "clean text without labels (also .txt)"},
        non_toxic_limit={"type": int, "default": 6000, "help": "texts drawn from each --non-toxic file"},
    )
    ADDED.add(parser.add_argument_group("added texts"))
    run = parser.add_argument_group("training")
    add(
        run,
        "quiet",
        output={"required": True},
        overwrite=SWITCH | {"help": "replace a scorer that is in --output"},
        name={"help": "of the scorer in reports (default: the folder's)"},
    )
    FEATURES.add(run)
    TRAINING.add(run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from pathlib import Path

    from tqdm import tqdm

    from calibfuse.scorers.labelled_files import Fold
    from calibfuse.scorers.linear import FeatureConfig
    from calibfuse.scorers.recipe import ScorerData, added_texts, gather
    from calibfuse.scorers.training import TrainingOptions, train_linear_scorer
    from calibfuse.scorers.words import identity_terms

    if not args.data and not args.pairs and not args.realtoxicityprompts:
        raise InputError("train-scorer needs labelled texts: --data, --pairs or --realtoxicityprompts, each with files")
    if (Path(args.output) / "config.json").exists() and not args.overwrite:
        raise InputError(
            f"{args.output} holds a model already: choose another --output, or replace it with --overwrite."
        )
    if args.fold != "1/1" and not args.realtoxicityprompts:
        raise InputError("--fold takes a part of --realtoxicityprompts; give both.")
    options = TrainingOptions(features=FeatureConfig(**FEATURES.values(args)), l2=2e-5, **TRAINING.values(args))
    background = [text for path in args.non_toxic for text in _sample(path, args.non_toxic_limit, options.seed)]
    source = ScorerData(
        **DATA.values(args),
        **ADDED.values(args),
        fold=Fold.parse(args.fold),
        background=background,
        where=dict(map(_condition, args.where)),
        seed=options.seed,
    )
    gathered = gather(source)
    if gathered.n_excluded:
        print(f"Left out {gathered.n_excluded} texts that repeat those of --exclude.")
    with tqdm(total=options.iterations, desc="training", unit="step", disable=args.quiet) as bar:

        def show(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}")
            bar.update()

        facts = gathered.facts | {"non_toxic": [Path(path).name for path in args.non_toxic]}
        scorer = train_linear_scorer(
            gathered.labelled,
            options,
            augment=lambda texts: added_texts(source, texts),
            neutral_words=identity_terms() if args.identity_terms else (),
            name=args.name or Path(args.output).resolve().name,
            facts=facts,
            progress=show,
        )
    scorer.save(args.output)
    figures = scorer.training
    print(
        f"Scorer written to {args.output}: {figures['training_texts']} texts, area under the curve "
        f"{figures['held_out_auc']:.4f} on {figures['held_out_texts']} held-out texts."
    )
    return 0


def _condition(text: str) -> tuple[str, str]:
    field, sign, value = text.partition("=")
    if not sign or not field:
        raise InputError(f"--where expects FIELD=VALUE, got {text!r}")
    return field, value


def _sample(path: str, limit: int, seed: int) -> list[str]:
    """Draw beginnings of documents from a file, evenly, in one pass."""
    import random

    from calibfuse.textfiles import iter_documents

    words = 60  # of each document: more of the same text teaches little and takes time
    rng = random.Random(seed)
    chosen: list[str] = []
    for number, document in enumerate(iter_documents([path])):
        if len(chosen) < limit:
            chosen.append(document)
        else:
            place = rng.randrange(number + 1)
            if place < limit:
                chosen[place] = document
    return [" ".join(document.split()[:words]) for document in chosen]
