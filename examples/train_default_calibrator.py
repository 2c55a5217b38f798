"""How the bundled calibrator was made: sort unfiltered text with a scorer of its own, then train both heads on it.

    python examples/train_default_calibrator.py --data DIR --output my-calibrator --steps 7000

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
from collections.abc import Iterator
from pathlib import Path

from calibfuse.evaluation import load_prompts
from calibfuse.scorers import load_scorer
from calibfuse.training.run import TrainingText, run_training
from calibfuse.training.trainer import TrainingConfig


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
    comments = write_comments(args.data, work / "comments.jsonl")
    prompts = write_measured_prompts(args.data, work / "measured-prompts.jsonl")
    scorer = train_sorting_scorer(args.data, prompts, work)
    files = [args.data / "text" / f"{name}.jsonl.xz" for name in ("reddit", "wikipedia", "conversation", "novels")]
    text = TrainingText(
        from_unfiltered=[*map(str, files), str(comments)], scorer=load_scorer(str(scorer)), threshold=0.5
    )
    training = TrainingConfig(steps=args.steps, decay=0.35, warmup=0.01, flagged_share=0.25, seed=args.seed)
    facts = {"name": "calibfuse default calibrator", "license": "apache-2.0"}
    return 0 if run_training(text, args.output, training=training, resume=args.resume, facts=facts) else 130


def write_comments(data: Path, path: Path) -> Path:
    """The comments of jigsaw_train and civil_comments as unlabelled text."""
    if not path.exists():
        fresh = path.with_suffix(".tmp")
        with fresh.open("w", encoding="utf-8") as file:
            for row in _rows(data / "toxicity" / "jigsaw.jsonl.xz"):
                if row["split"] == "jigsaw_train":
                    file.write(json.dumps({"text": row["text"]}) + "\n")
            for row in _rows(data / "toxicity" / "civil_comments.jsonl.xz"):
                file.write(json.dumps({"text": row["text"]}) + "\n")
        fresh.replace(path)
    return path


def write_measured_prompts(data: Path, path: Path) -> Path:
    """The prompts of the evaluations in docs/results.md, which nothing is to learn from."""
    if not path.exists():
        prompts = load_prompts(data / "prompts" / "realtoxicityprompts.jsonl.xz", count=200, seed=0)
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps({"text": prompt.text}) + "\n" for prompt in prompts), encoding="utf-8")
        fresh.replace(path)
    return path


def write_jigsaw(data: Path, split: str, path: Path) -> Path:
    """One split of Jigsaw, with its labels."""
    if not path.exists():
        fresh = path.with_suffix(".tmp")
        rows = (row for row in _rows(data / "toxicity" / "jigsaw.jsonl.xz") if row["split"] == split)
        with fresh.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        fresh.replace(path)
    return path


def train_sorting_scorer(data: Path, measured_prompts: Path, work: Path) -> Path:
    """A scorer for sorting that shares no labelled text with the one for evaluation; see docs/scorer.md."""
    folder = work / "sorting-scorer"
    if not (folder / "config.json").exists():
        toxicity, text = data / "toxicity", data / "text"
        judged = write_jigsaw(data, "jigsaw_train", work / "jigsaw-train.jsonl")  # the evaluation scorer's
        read = write_jigsaw(data, "jigsaw_test", work / "jigsaw-test.jsonl")
        command = [sys.executable, "-m", "calibfuse", "train-scorer", "--name", "sorting", "--output", str(folder)]
        command += ["--data", str(toxicity / "civil_comments.jsonl.xz"), str(read), "--distrust-lowercase"]
        command += ["--realtoxicityprompts", str(data / "prompts" / "realtoxicityprompts.jsonl.xz"), "--fold", "1/2"]
        command += ["--pairs", str(toxicity / "paradetox.jsonl.xz"), "--strong-words", "--identity-terms"]
        command += ["--exclude", str(judged), str(measured_prompts)]
        command += ["--non-toxic", str(text / "wikipedia.jsonl.xz"), str(text / "novels.jsonl.xz")]
        command += ["--non-toxic-limit", "14000", "--char-min", "3", "--char-max", "6", "--hash-seed", "17"]
        command += ["--windows", "3", "14"]
        subprocess.run(command, check=True)
    return folder


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


if __name__ == "__main__":
    sys.exit(main())
