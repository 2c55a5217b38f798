"""Which tokens the divergence on benign text comes from: what a fusion takes where it should take little.

    python examples/measure_divergence.py
    python examples/measure_divergence.py --target MODEL --calibrator DIR --margin 0.1 --top 40

A topic's name among the first tokens is collateral damage, an insult is the purpose (a target that has read forums
holds some likely anywhere).
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from calibfuse import CalibFusion
from calibfuse.cli.masking import masking
from calibfuse.cli.target import load_target
from calibfuse.evaluation import LanguageModel
from calibfuse.evaluation.neutrality import divergence_by_token
from calibfuse.evaluation.prompts import load_texts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrator", help="folder or Hub id (default: the bundled one)")
    parser.add_argument("--target", help="folder or Hub id (default: the demo target)")
    parser.add_argument("--text", help="benign text, a line or record each (default: the bundled sentences)")
    parser.add_argument("--alpha", type=float, help="(default: the calibrator's)")
    parser.add_argument("--margin", type=float, help="nats (default: the calibrator's)")
    parser.add_argument("--top", type=int, default=30, help="tokens that are named (default: %(default)s)")
    parser.add_argument("--unmasked", action="store_true", help="show offensive words as they are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    target = load_target(args.target)
    chosen = {name: value for name in ("alpha", "margin") if (value := getattr(args, name)) is not None}
    fusion = CalibFusion.from_pretrained(args.calibrator, tokenizer=target.tokenizer, **chosen)
    texts = load_texts(args.text) if args.text else None
    measured = LanguageModel(target.name, target.model, target.tokenizer)
    parts = divergence_by_token(measured, lambda: [fusion], texts)

    minded = fusion.guide.minded_ids(len(parts))
    share = float(parts[minded].sum() / parts.sum()) if minded is not None else 0.0
    mask = masking(not args.unmasked)
    print(f"KL(target || fused): {float(parts.sum()):.4f} nats per token of text")
    print(f"of it, tokens that are a minded word: {share:.0%}\n")
    print("| token | share of the divergence |\n|---|---:|")
    for token in parts.argsort(descending=True)[: args.top].tolist():
        print(f"| `{mask(target.tokenizer.decode([token]))}` | {float(parts[token] / parts.sum()):.1%} |")


if __name__ == "__main__":
    main()
