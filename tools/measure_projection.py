"""What carrying a causal LM's distribution over to another vocabulary costs, in bits per byte of held-out text.

    python tools/measure_projection.py --calibrator MODEL --tokenizers DIR --text wikitext2-test.txt

One row per target tokenizer: bits per byte of the projected distribution over the target's whole vocabulary, beside the
model's own bits per byte of the same text in its own tokens (lock-step), CPU milliseconds per token, and coverage.

Each passage is scored from an empty context, first token included. Special tokens take no part in either figure. Left
out: tokens of the text that the target cannot spell (unknown marks); their share stands in the table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
import torch

from calibfuse.guides.causal_lm import BoundCausalLM, CausalLMCalibrator
from calibfuse.prefix_cache import RowSession
from calibfuse.textfiles import iter_documents, split_passages

if TYPE_CHECKING:
    from calibfuse.guide import NextTokenScores

Encoder = Callable[[str], list[int]]


def passages_of(file: Path, count: int, skip: int) -> list[str]:
    """Passages of 200 to 600 bytes, `count` bytes in all, after the first `skip` bytes of the text."""
    chosen, total = [], 0
    for document in iter_documents([str(file)]):
        # WikiText's mark for rare words is a control token of some tokenizers and text of others: left out for all.
        for passage in split_passages(document.replace(" <unk>", "").replace("<unk>", ""), 600):
            text = passage.strip()
            size = len(text.encode())
            total += size
            if size >= 200 and total > skip:
                chosen.append(text)
            if total >= skip + count:
                return chosen
    return chosen


def encoder_of(path: Path) -> Encoder | None:
    """Text to ids without special tokens; None for files that are no tokenizers."""
    if path.suffix == ".json":
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        return lambda text: cast("list[int]", tokenizer.encode(text, add_special_tokens=False).ids)
    if path.name.endswith(".model"):
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return lambda text: cast("list[int]", pieces.encode(text))
    if path.name.endswith("vocab.txt"):
        wordpiece = tokenizers.BertWordPieceTokenizer(str(path))
        return lambda text: cast("list[int]", wordpiece.encode(text, add_special_tokens=False).ids)
    return None


@torch.no_grad()
def measure(bound: BoundCausalLM, rows: Sequence[list[int]], *, batch_size: int) -> dict[str, float]:
    """Bits per byte, share of tokens without bytes, and CPU milliseconds per token."""
    nats, byte_count, tokens, skipped, seconds = 0.0, 0, 0, 0, 0.0
    ordered = sorted((row for row in rows if row), key=len)
    for start in range(0, len(ordered), batch_size):
        group = ordered[start : start + batch_size]
        width = len(group[-1])
        ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in group])
        began = time.thread_time()
        session = RowSession(bound)
        for at in range(width):
            said: NextTokenScores = session.step(ids[:, :at], torch.zeros(0))[0]
            log_probs = bound.normalise(said.log_scores("calibrator"))
            covered = bound.covers(ids[:, at])
            for row, sequence in enumerate(group):
                if at >= len(sequence):
                    continue
                if not covered[row]:
                    skipped += 1
                    continue
                nats -= float(log_probs[row, sequence[at]])
                byte_count += len(bound.vocabulary.token_bytes(sequence[at]) or b"")
                tokens += 1
        seconds += time.thread_time() - began
    return {
        "tokens": tokens,
        "bytes": byte_count,
        "skipped": skipped / max(1, tokens + skipped),
        "bits_per_byte": nats / byte_count / math.log(2),
        "ms": 1e3 * seconds / max(1, tokens + skipped),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrator", required=True, help="a causal language model of transformers: folder or Hub id")
    parser.add_argument("--tokenizers", type=Path, nargs="+", required=True, help="tokenizer files, or their folder")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--bytes", type=int, default=15_000, help="of the text (default: %(default)s)")
    parser.add_argument("--skip", type=int, default=0, help="bytes at the start of the text to leave out")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    torch.set_num_threads(1)

    texts = passages_of(args.text, args.bytes, args.skip)
    calibrator = CausalLMCalibrator.from_pretrained(args.calibrator)
    own_ids = [encode_own(calibrator, text) for text in texts]
    own = measure(calibrator.bind(calibrator.tokenizer), own_ids, batch_size=args.batch_size)
    results: list[dict[str, Any]] = [{"tokenizer": "its own (lock-step)", "coverage": 1.0, **own}]
    files = [file for place in args.tokenizers for file in (sorted(place.iterdir()) if place.is_dir() else [place])]
    print("| tokenizer | ids | covered | bits per byte | change | unknown | ms per token |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    print(f"| its own (lock-step) | | | {own['bits_per_byte']:.4f} | | | {own['ms']:.1f} |", flush=True)
    for file in files:
        encode = encoder_of(file)
        if encode is None:
            continue
        rows = [encode(text) for text in texts]
        bound = calibrator.bind(file)
        row = measure(bound, rows, batch_size=args.batch_size)
        change = row["bits_per_byte"] / own["bits_per_byte"] - 1
        print(
            f"| {file.name} | {bound.target_vocab_size:,} | {bound.coverage:.2%} | "
            f"{row['bits_per_byte']:.4f} | {change:+.1%} | {row['skipped']:.1%} | {row['ms']:.1f} |",
            flush=True,
        )
        results.append({"tokenizer": file.name, "coverage": bound.coverage, **row})
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def encode_own(calibrator: CausalLMCalibrator, text: str) -> list[int]:
    """The model's own tokens of a text."""
    return [int(each) for each in calibrator.tokenizer.encode(text, add_special_tokens=False)]


if __name__ == "__main__":
    main()
