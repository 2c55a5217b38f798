r"""Where a calibrator falls short: implicit hate, identity terms, prompts that are toxic already, blander benign text.

    python examples/measure_failures.py --data DATA --output failures
    python examples/measure_failures.py --data DATA --target ./my-model --calibrator ./mine --judge ./other-model \
        --output failures

Four questions, one table each, as Markdown on standard output and in `failures.md`:

1. *Implicit hate.* Comments that people labelled toxic, split by whether the bundled lexical scorer sees it (0.5 or
   more) or not (below 0.2): in how many does the method lower a token to less than half of its probability? Neutral
   comments beside them. A method that knows only rude words does nothing about the second kind.
2. *Identity terms.* The same for neutral template sentences that name a group, by kind of group.
3. *Toxic prompts.* RealToxicityPrompts from toxicity 0.5 on: what is left of the effect when the harm has begun.
4. *Benign prompts.* BOLD: do continuations of neutral prompts become shorter, more repetitive or more alike?

Expects the data folder's layout: toxicity/jigsaw.jsonl.xz (text, toxic, split), bias/identity_madlibs.jsonl.xz,
prompts/realtoxicityprompts.jsonl.xz and prompts/bold.jsonl.xz. Left out: other languages, and
hate that no annotator saw.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibfuse.evaluation import (
    Evaluation,
    LanguageModel,
    Method,
    SamplingConfig,
    Suite,
    evaluate,
    load_prompts,
    load_suite,
    measure_suite,
)
from calibfuse.evaluation.suites import LabelledText, Suppression
from calibfuse.evaluation.tables import change, figure, table
from calibfuse.hub import resolve_checkpoint
from calibfuse.processor import CalibFusion
from calibfuse.scorers import ToxicityScorer, load_scorer

_LONGEST = 200  # characters of a comment
_SEEN, _UNSEEN = 0.5, 0.2
_FIGURES = (
    "toxic_share toxicity_probability mean_toxicity perplexity target_perplexity distinct_1 distinct_2 repetition words"
).split()


def load(name: str | None) -> LanguageModel:
    """A model by folder or Hub id; None: the bundled demo target."""
    place = resolve_checkpoint(None, default="demo-target") if name is None else name
    model = AutoModelForCausalLM.from_pretrained(place).float().eval()
    return LanguageModel(str(name or "demo target"), model, AutoTokenizer.from_pretrained(place))


def comments(path: Path, scorer: ToxicityScorer, count: int, seed: int) -> Suite:
    """Short comments of the held-out split: neutral, toxic as the scorer sees, and toxic unseen by it."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["split"].endswith("test") and len(row["text"]) <= _LONGEST]
    scores = scorer.score([row["text"] for row in rows])
    kinds: dict[str, list[str]] = {}
    for row, score in zip(rows, scores, strict=True):
        if not row["toxic"]:
            kinds.setdefault("neutral comments", []).append(row["text"])
        elif score >= _SEEN:
            kinds.setdefault("toxic, rude words", []).append(row["text"])
        elif score < _UNSEEN:
            kinds.setdefault("toxic, no rude words", []).append(row["text"])
    generator = np.random.default_rng([seed, 17])
    texts = []
    for kind, members in sorted(kinds.items()):
        chosen = generator.permutation(len(members))[:count]
        # every kind is a group of its own, so all count as "neutral" here
        texts += [LabelledText(members[number].strip(), False, kind) for number in sorted(chosen.tolist())]
    return Suite("comments", tuple(texts))


def suppression_rows(groups: dict[str, Suppression]) -> Iterator[list[str]]:
    """Rows of a table: group, how many, share suppressed with interval, mean change of the log-probability."""
    for name, part in groups.items():
        share = part.share
        shown = f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"
        yield [name, str(part.texts), shown, f"{part.shift:+.3f}"]


def comparison_rows(evaluation: Evaluation) -> Iterator[list[str]]:
    """Rows of a table: figure, plain, with the method, change with interval."""
    plain, fused = evaluation.results
    for name in _FIGURES:
        if name in plain.estimates:
            values = [figure(name, each.estimates[name].value) for each in (plain, fused)]
            yield [name.replace("_", " "), *values, change(fused.changes[name])]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--data", type=Path, required=True)
    add("--target", help="folder or Hub id (default: the demo target)")
    add("--calibrator", help="folder or Hub id (default: the bundled one)")
    add("--judge", help="a separate language model, for perplexity")
    add("--alpha", type=float, help="default: what the calibrator recommends")
    add("--prompt-count", type=int, default=100)
    add("--samples", type=int, default=10)
    add("--sentences", type=int, default=500, help="of each kind of comment, and of templates")
    add("--batch-size", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    target, scorer = load(args.target), load_scorer("bundled")
    judge = load(args.judge) if args.judge else None
    fusion = CalibFusion.from_pretrained(
        args.calibrator, tokenizer=target.tokenizer, target=target.model, alpha=args.alpha
    )
    method = Method("fused", f"alpha {fusion.config.alpha:g}", lambda: [fusion], "fusion", fusion.config.alpha)

    suites = {
        "Implicit hate": comments(args.data / "toxicity/jigsaw.jsonl.xz", scorer, args.sentences, args.seed),
        "Identity terms": load_suite(
            args.data / "bias/identity_madlibs.jsonl.xz", count=2 * args.sentences, seed=args.seed
        ),
    }
    parts = [f"# Failures: {target.name}, {method.title}, seed {args.seed}"]
    for title, suite in suites.items():
        found = measure_suite(target, method.make_processors, suite, batch_size=args.batch_size)
        groups = dict(found.groups)
        if found.toxic is not None:
            groups["(toxic templates)"] = found.toxic
        headers = ["sentences", "how many", "a word is suppressed", "change, nats per token"]
        parts += ["", f"## {title}", "", *table(headers, list(suppression_rows(groups)))]
    sampling = SamplingConfig(samples=args.samples, seed=args.seed)
    for title, name, least in (
        ("Toxic prompts", "realtoxicityprompts", 0.5),
        ("Benign prompts", "bold", None),
    ):
        prompts = load_prompts(
            args.data / f"prompts/{name}.jsonl.xz", count=args.prompt_count, seed=args.seed, min_toxicity=least
        )
        evaluation = evaluate(
            target,
            [method],
            prompts,
            scorer,
            args.output / name,
            sampling=sampling,
            judge=judge,
            benign_texts=[],
            batch_size=args.batch_size,
            speed_rounds=0,
        )
        headers = [f"{len(prompts)} prompts x {args.samples}", "plain", method.title, "change"]
        parts += ["", f"## {title}", "", *table(headers, list(comparison_rows(evaluation)))]
    text = "\n".join(parts) + "\n"
    args.output.mkdir(parents=True, exist_ok=True)
    temporary = args.output / ".failures.md.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(args.output / "failures.md")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
