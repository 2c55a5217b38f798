"""How the bundled calibrator was made: sort unfiltered text with a scorer of its own, then train both heads on it.

    python tools/train_default_calibrator.py --data DIR --output my-calibrator --steps 7000

DIR holds text/*.jsonl.xz (reddit, wikipedia, conversation, novels), toxicity/*.jsonl.xz and
prompts/realtoxicityprompts.jsonl.xz. Labels train the sorting scorer only, never the calibrator: those of
civil_comments, paradetox and the test split of Jigsaw, and Perspective's scores of one half of the texts of
RealToxicityPrompts, without the prompts that docs/results.md measures with. What the calibrator learns from is
unfiltered text, sorted. The bundled evaluation scorer is trained on other texts (Jigsaw's train split, and the other
half) and is not used here; WikiText and LAMBADA are not read.

The shipped weights took about two and a half hours on one shared core, in legs: 1,066 steps with labels of a word list
while the sorting scorer was being made, 6,200 steps with those of an earlier sorting scorer, then the heads alone
(`heads_only`), 4,000 steps with a second one's, which had not read Jigsaw, and 4,000 with the labels as below. This
script does it in one leg.
"""

from __future__ import annotations

import argparse
import json
import lzma
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from calibfuse.evaluation import load_prompts
from calibfuse.scorers import load_scorer
from calibfuse.training.config import TrainingConfig, TrainingText
from calibfuse.training.run import run_training


def main() -> int:
    """Run all steps; each is skipped when its result is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=7000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    work = args.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    said = _write(work / "comments.jsonl", comments(args.data))
    scorer = train_sorting_scorer(args.data, work)
    files = [args.data / "text" / f"{name}.jsonl.xz" for name in ("reddit", "wikipedia", "conversation", "novels")]
    text = TrainingText(unfiltered=[*map(str, files), str(said)], scorer=load_scorer(str(scorer)), threshold=0.5)
    training = TrainingConfig(steps=args.steps, decay=0.35, warmup=0.01, flagged_share=0.25, seed=args.seed)
    facts = {"name": "calibfuse default calibrator", "license": "apache-2.0"}
    return 0 if run_training(text, args.output, training=training, resume=args.resume, facts=facts) else 130


def comments(data: Path) -> Iterator[dict[str, str]]:
    """The comments of jigsaw_train and civil_comments as unlabelled text."""
    for row in chain(jigsaw(data, "jigsaw_train"), _rows(data / "toxicity" / "civil_comments.jsonl.xz")):
        yield {"text": row["text"]}


def measured_prompts(data: Path) -> Iterator[dict[str, str]]:
    """The prompts of the evaluations in docs/results.md, which nothing is to learn from."""
    for prompt in load_prompts(data / "prompts" / "realtoxicityprompts.jsonl.xz", count=200, seed=0):
        yield {"text": prompt.text}


def jigsaw(data: Path, split: str) -> Iterator[dict[str, str]]:
    """One split of Jigsaw, with its labels."""
    return (row for row in _rows(data / "toxicity" / "jigsaw.jsonl.xz") if row["split"] == split)


def train_sorting_scorer(data: Path, work: Path) -> Path:
    """A scorer for sorting that shares no labelled text with the one for evaluation; see docs/scorer.md."""
    folder = work / "sorting-scorer"
    if not (folder / "config.json").exists():
        toxicity, text = data / "toxicity", data / "text"
        prompts = _write(work / "measured-prompts.jsonl", measured_prompts(data))
        judged = _write(work / "jigsaw-train.jsonl", jigsaw(data, "jigsaw_train"))  # the evaluation scorer's
        read = _write(work / "jigsaw-test.jsonl", jigsaw(data, "jigsaw_test"))
        command = [sys.executable, "-m", "calibfuse", "train-scorer", "--name", "sorting", "--output", str(folder)]
        command += ["--data", str(toxicity / "civil_comments.jsonl.xz"), str(read), "--distrust-lowercase"]
        command += ["--realtoxicityprompts", str(data / "prompts" / "realtoxicityprompts.jsonl.xz"), "--fold", "1/2"]
        command += ["--pairs", str(toxicity / "paradetox.jsonl.xz"), "--strong-words", "--identity-terms"]
        command += ["--exclude", str(judged), str(prompts)]
        command += ["--non-toxic", str(text / "wikipedia.jsonl.xz"), str(text / "novels.jsonl.xz")]
        command += ["--non-toxic-limit", "14000", "--char-min", "3", "--char-max", "6", "--hash-seed", "17"]
        command += ["--windows", "3", "14"]
        subprocess.run(command, check=True)
    return folder


def _write(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    """Write rows as JSON Lines, unless the file is there."""
    if not path.exists():
        fresh = path.with_suffix(".tmp")
        with fresh.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        fresh.replace(path)
    return path


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


if __name__ == "__main__":
    sys.exit(main())
