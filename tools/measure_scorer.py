"""Measure a toxicity scorer on labelled texts it was not trained on: the figures of docs/scorer.md.

    python tools/measure_scorer.py --data DIR [--scorer bundled]

DIR holds toxicity/{jigsaw,civil_comments,paradetox}.jsonl.xz, bias/{identity_madlibs,xstest}.jsonl.xz,
prompts/realtoxicityprompts.jsonl.xz and text/reddit.jsonl.xz. Needs two minutes on one core with the bundled scorer.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibfuse.scorers import ToxicityScorer, load_scorer
from calibfuse.scorers.labelled_files import Fold, read_scored_texts
from calibfuse.scorers.training import area_under_curve
from calibfuse.scorers.words import identity_terms

# The terms of the Identity Phrase Templates; longer ones first, so that "african american" is not counted as "african".
TERMS = sorted(
    "lesbian gay bisexual transgender trans queer lgbt lgbtq homosexual straight heterosexual male female nonbinary "
    "african black white european hispanic latino latina latinx mexican canadian american asian indian chinese "
    "japanese christian muslim jewish buddhist catholic protestant sikh taoist old older young younger teenage "
    "millenial elderly blind deaf paralyzed".split()
    + ["african american", "middle eastern", "middle aged"],
    key=len,
    reverse=True,
)


def rows(path: Path, count: int | None = None) -> list[dict[str, Any]]:
    """Read the first rows of a compressed .jsonl file."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, count)]


def show(name: str, scores: NDArray[np.float64], toxic: NDArray[np.bool_]) -> None:
    """Print one line: texts, area under the curve, and the shares above 0.5 of toxic and other texts."""
    area = area_under_curve(scores, toxic.astype(np.float64))
    print(
        f"{name:34} {len(scores):6} texts, {int(toxic.sum()):6} toxic   AUC {area:.3f}   "
        f"found {(scores[toxic] > 0.5).mean():.3f}   false positives {(scores[~toxic] > 0.5).mean():.3f}"
    )


def measure_labelled(scorer: ToxicityScorer, data: Path, fold: Fold) -> None:
    """Measure on the labelled collections."""
    jigsaw = [row for row in rows(data / "toxicity" / "jigsaw.jsonl.xz") if row["split"] == "jigsaw_test"]
    toxic = np.array([row["toxic"] == 1 for row in jigsaw])
    scores = scorer.score([row["text"] for row in jigsaw])
    show("Jigsaw, test split", scores, toxic)
    short = np.array([len(row["text"].split()) <= 20 for row in jigsaw])
    show("Jigsaw, test split, <= 20 words", scores[short], toxic[short])
    civil = rows(data / "toxicity" / "civil_comments.jsonl.xz")
    share = np.array([row["toxic_fraction"] for row in civil])
    clear = (share >= 0.5) | (share == 0)
    scores = scorer.score([row["text"] for row in civil])
    show("Civil Comments, >= 1/2 against 0", scores[clear], share[clear] >= 0.5)
    pairs = rows(data / "toxicity" / "paradetox.jsonl.xz")
    texts = [row["toxic"] for row in pairs] + [text for row in pairs for text in row["neutral"]]
    show("ParaDetox, toxic against rewritten", scorer.score(texts), np.arange(len(texts)) < len(pairs))
    judged = read_scored_texts([data / "prompts" / "realtoxicityprompts.jsonl.xz"], fold)
    scores = scorer.score(judged.texts)
    show(f"RealToxicityPrompts, fold {fold.part}/{fold.parts}", scores, judged.labels >= 0.5)
    print(f"{'':34} correlation with Perspective {np.corrcoef(scores, judged.labels)[0, 1]:.3f}")


def measure_identity(scorer: ToxicityScorer, data: Path) -> None:
    """Measure on neutral sentences about groups, term by term, and on safe prompts that sound unsafe."""
    sentences = rows(data / "bias" / "identity_madlibs.jsonl.xz")
    toxic = np.array([row["toxic"] == 1 for row in sentences])
    scores = scorer.score([row["text"] for row in sentences])
    show("Identity Phrase Templates", scores, toxic)
    by_term: dict[str, list[bool]] = {}
    for row, score in zip(sentences, scores, strict=True):
        term = next((term for term in TERMS if re.search(rf"\b{term}\b", row["text"].lower())), None)
        if term is not None and not row["toxic"]:
            by_term.setdefault(term, []).append(bool(score > 0.5))
    listed = set(identity_terms())
    for term in sorted(by_term):
        note = "" if term in listed else "   (not among the training terms)"
        flagged = by_term[term]
        print(f"    {term:18} {len(flagged):4} neutral sentences, false positives {np.mean(flagged):.3f}{note}")
    safe = [row["prompt"] for row in rows(data / "bias" / "xstest.jsonl.xz") if row["label"] == "safe"]
    print(f"XSTest, {len(safe)} safe prompts: false positives {(scorer.score(safe) > 0.5).mean():.3f}")


def measure_speed(scorer: ToxicityScorer, data: Path) -> None:
    """Measure megabytes of text per second of CPU time."""
    texts = [row["text"] for row in rows(data / "text" / "reddit.jsonl.xz", 8000)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    start = time.process_time()
    scorer.score(texts)
    print(f"Speed: {megabytes / (time.process_time() - start):.1f} MB of text per second of CPU time")


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the collections")
    parser.add_argument("--scorer", default="bundled", help="any name that load_scorer takes (default: %(default)s)")
    parser.add_argument(
        "--fold",
        default="1/2",
        metavar="I/N",
        help="part of RealToxicityPrompts; the bundled scorer read 2/2 (%(default)s)",
    )
    args = parser.parse_args()
    scorer = load_scorer(args.scorer)
    measure_labelled(scorer, args.data, Fold.parse(args.fold))
    measure_identity(scorer, args.data)
    measure_speed(scorer, args.data)


if __name__ == "__main__":
    main()
