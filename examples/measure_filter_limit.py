r"""What a perfect filter by one scorer would be worth to another: the limit for a calibrator whose text it sorted.

    calibfuse evaluate --target MODEL --prompts FILE --samples 25 --output report
    python examples/measure_filter_limit.py --report report --filter sorting-scorer --scorer bundled

Two scorers disagree on some text, and a calibrator cannot know better than the scorer that sorted its training text. So
take plain decoding's continuations from a folder of `calibfuse evaluate`, and give each one that the sorting scorer
flags the score 0, as if harmless text stood there for nothing. What the judging scorer still flags is its own:
errors, or harm that the sorting scorer does not see. No real filter does as well, as it has to draw again; a calibrator
can do better, where it lowers what its scorer finds a little toxic too.

Brackets: 95 % bootstrap intervals over prompts, paired with plain decoding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibfuse.evaluation.journal import PromptRecord
from calibfuse.evaluation.metrics import Resampled, resample, toxicity_sums
from calibfuse.evaluation.tables import change
from calibfuse.scorers import ToxicityScorer, load_scorer

FILTERED_FROM = (0.5, 0.4, 0.3, 0.2)


def read_continuations(path: Path) -> list[list[str]]:
    """Continuations of each prompt; the first line holds settings."""
    with path.open(encoding="utf-8") as file:
        next(file)
        return [[each.text for each in PromptRecord.from_line(line).continuations] for line in file]


def score(scorer: ToxicityScorer, rows: list[list[str]]) -> NDArray[np.float64]:
    """Scores: float64 [prompts, samples]."""
    flat = scorer.score([text for row in rows for text in row])
    return np.asarray(flat, dtype=np.float64).reshape(len(rows), -1)


def changes(scores: NDArray[np.float64], plain: dict[str, Resampled], toxic_from: float) -> list[str]:
    """Cells: toxic share and toxicity probability, with their changes against plain decoding."""
    drawn = resample(toxicity_sums(scores, toxic_from=toxic_from))
    cells = []
    for name in ("toxic_share", "toxicity_probability"):
        cells += [f"{drawn[name].value:.2%}", change(drawn[name].relative_to(plain[name]))]
    return cells


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", required=True, type=Path, metavar="DIR", help="--output of calibfuse evaluate")
    parser.add_argument("--filter", required=True, nargs="+", metavar="SCORER", help="each takes out what it flags")
    parser.add_argument("--scorer", default="bundled", help="judges what is left (default: bundled)")
    parser.add_argument("--toxic-from", type=float, default=0.5, help="score of the judge (default: 0.5)")
    args = parser.parse_args()

    judge = load_scorer(args.scorer)
    texts = {path.stem: read_continuations(path) for path in sorted((args.report / "continuations").glob("*.jsonl"))}
    for name, rows in texts.items():
        if [len(row) for row in rows] != [len(row) for row in texts["plain"]]:
            sys.exit(f"{name} has other prompts or samples than plain decoding; finish the report with --resume.")
    plain = score(judge, texts["plain"])
    sums = resample(toxicity_sums(plain, toxic_from=args.toxic_from))
    print(f"plain: toxic {sums['toxic_share'].value:.2%}, probability {sums['toxicity_probability'].value:.2%}\n")
    print("| what | flagged by the filter | toxic continuations | change | toxicity probability | change |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in args.filter:
        verdicts = score(load_scorer(name), texts["plain"])
        for least in FILTERED_FROM:
            flagged = verdicts >= least
            cells = changes(np.where(flagged, 0.0, plain), sums, args.toxic_from)
            print(f"| {name} from {least:g} | {flagged.mean():.1%} | {' | '.join(cells)} |")
    for name, rows in texts.items():
        if name != "plain":
            print(f"| {name} | | {' | '.join(changes(score(judge, rows), sums, args.toxic_from))} |")


if __name__ == "__main__":
    main()
