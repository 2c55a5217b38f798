"""`calibfuse train-scorer`: labelled texts in, a small linear toxicity scorer out."""

from __future__ import annotations

import argparse

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    data = parser.add_argument_group("data (.jsonl or .csv, also .gz or .xz)")
    data.add_argument("--data", nargs="+", default=[], metavar="FILE", help="rows with a text and its toxicity, 0 to 1")
    data.add_argument("--text-field", help="field of the text (default: found by name)")
    data.add_argument("--label-field", help="field of the toxicity (default: found by name)")
    data.add_argument("--where", action="append", default=[], metavar="FIELD=VALUE", help="only such rows of --data")
    data.add_argument("--pairs", nargs="+", default=[], metavar="FILE", help="rows with `toxic` and `neutral` texts")
    data.add_argument(
        "--realtoxicityprompts",
        nargs="+",
        default=[],
        metavar="FILE",
        help="prompts and continuations with Perspective's scores",
    )
    data.add_argument(
        "--fold", default="1/1", metavar="I/N", help="only part I of N of their texts, by hash (default: all)"
    )
    data.add_argument(
        "--non-toxic", nargs="+", default=[], metavar="FILE", help="clean text without labels (also .txt)"
    )
    data.add_argument(
        "--non-toxic-limit",
        type=int,
        default=6000,
        help="texts drawn from each --non-toxic file (default: %(default)s)",
    )
    data.add_argument(
        "--distrust-lowercase",
        action="store_true",
        help="leave out texts labelled clean without a capital letter (bad copies in some collections)",
    )
    data.add_argument("--exclude", nargs="+", default=[], metavar="FILE", help="drop texts that repeat these texts")
    extra = parser.add_argument_group("added texts")
    extra.add_argument("--identity-terms", action="store_true", help="make names of groups of people neutral")
    extra.add_argument("--ambiguous-words", action="store_true", help="let the context of words such as screw decide")
    extra.add_argument("--strong-words", action="store_true", help="teach the bundled list of swear words and slurs")
    run = parser.add_argument_group("training")
    run.add_argument("--output", required=True, metavar="DIR", help="folder of the scorer; made when missing")
    run.add_argument("--overwrite", action="store_true", help="replace a scorer that is in --output")
    run.add_argument("--name", help="name of the scorer in reports (default: the folder's)")
    run.add_argument("--bucket-bits", type=int, default=20, help="2^N hashed weights of 2 bytes (default: %(default)s)")
    run.add_argument("--char-min", type=int, default=2, help="shortest character n-gram (default: %(default)s)")
    run.add_argument("--char-max", type=int, default=5, help="longest character n-gram (default: %(default)s)")
    run.add_argument("--no-bigrams", action="store_true", help="no pairs of neighbouring words")
    run.add_argument("--hash-seed", type=int, default=0, help="(default: %(default)s)")
    run.add_argument("--windows", type=int, nargs="+", default=[3, 16], help="words per window (default: 3 16)")
    run.add_argument("--l2", type=float, default=2e-5, help="penalty on squared weights (default: %(default)s)")
    run.add_argument("--iterations", type=int, default=110, help="steps of L-BFGS (default: %(default)s)")
    run.add_argument("--held-out", type=float, default=0.1, help="share for calibration (default: %(default)s)")
    run.add_argument(
        "--calibration-words", type=int, default=40, help="longest text that calibrates (default: %(default)s)"
    )
    run.add_argument(
        "--pool-temperature",
        type=float,
        default=0.15,
        help="softness of the maximum over windows (default: %(default)s)",
    )
    run.add_argument("--seed", type=int, default=0, help="of every draw (default: %(default)s)")
    run.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from pathlib import Path

    from tqdm import tqdm

    from calibfuse.errors import InputError
    from calibfuse.scorers.features import FeatureConfig
    from calibfuse.scorers.labelled_files import Fold
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
    options = TrainingOptions(
        features=FeatureConfig(
            bucket_bits=args.bucket_bits,
            char_min=args.char_min,
            char_max=args.char_max,
            word_bigrams=not args.no_bigrams,
            seed=args.hash_seed,
        ),
        windows=tuple(args.windows),
        l2=args.l2,
        iterations=args.iterations,
        held_out=args.held_out,
        calibration_words=args.calibration_words,
        pool_temperature=args.pool_temperature,
        seed=args.seed,
    )
    conditions = dict(_condition(text) for text in args.where)
    background = [text for path in args.non_toxic for text in _sample(path, args.non_toxic_limit, args.seed)]
    source = ScorerData(
        data=args.data,
        pairs=args.pairs,
        realtoxicityprompts=args.realtoxicityprompts,
        fold=Fold.parse(args.fold),
        exclude=args.exclude,
        background=background,
        text_field=args.text_field,
        label_field=args.label_field,
        where=conditions,
        distrust_lowercase=args.distrust_lowercase,
        identity_terms=args.identity_terms,
        ambiguous_words=args.ambiguous_words,
        strong_words=args.strong_words,
        seed=args.seed,
    )
    gathered = gather(source)
    if gathered.n_excluded:
        print(f"Left out {gathered.n_excluded} texts that repeat those of --exclude.")
    with tqdm(total=args.iterations, desc="training", unit="step", disable=args.quiet) as bar:

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
    from calibfuse.errors import InputError

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
