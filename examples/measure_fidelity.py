"""Bits per byte of held-out text when a calibrator is bound to tokenizers that it never saw.

    python examples/measure_fidelity.py --calibrator DIR --tokenizers shared/data/tokenizers \
        --pool DIR/work/pool-* --store DIR/work/passages-* --text wikitext2-test.txt

Prints a Markdown table: one row per tokenizer, two columns per text: bits per byte over the full vocabulary, and the
change against the mean of the pool's own tokenizers (those above 8,000 tokens: small vocabularies and plain bytes are
worse for every model).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch

from calibfuse import Calibrator, Vocabulary
from calibfuse.calibrator.fidelity import measure_fidelity
from calibfuse.training.data import PassageStore, iter_documents, split_passages
from calibfuse.training.tokenizer_pool import TokenizerPool


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrator", help="folder or Hub id (default: the bundled one)")
    parser.add_argument("--tokenizers", type=Path, required=True, help="folder with tokenizer files")
    parser.add_argument("--pool", type=Path, help="pool of the training run: the rows to compare with")
    parser.add_argument(
        "--store", type=Path, help="passage store of the training run: its validation passages are read"
    )
    parser.add_argument("--text", nargs="*", default=[], help="further held-out files")
    parser.add_argument("--bytes", type=int, default=60_000, help="of each text (default: %(default)s)")
    parser.add_argument(
        "--head", default="reference", choices=("calibrator", "reference"), help="(default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    torch.set_num_threads(1)

    texts = _texts(args.store, args.text, args.bytes)
    calibrator = Calibrator.from_pretrained(args.calibrator)
    rows: list[tuple[str, str, dict[str, float]]] = []
    pool = TokenizerPool.load(args.pool) if args.pool else []
    for entry in pool:
        rows.append(("pool", entry.name, _measure(calibrator, entry.vocabulary, entry.tokenizer, texts, args.head)))
    for path in sorted(args.tokenizers.iterdir()):
        encoder = _encoder(path)
        if encoder is not None:
            vocabulary = Vocabulary.from_tokenizer(path)
            rows.append(("unseen", path.name, _measure(calibrator, vocabulary, encoder, texts, args.head)))
    _print_table(rows, list(texts))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def _texts(store_folder: Path | None, files: Sequence[str], budget: int) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    if store_folder:
        store = PassageStore(store_folder)
        indices = np.random.default_rng(0).permutation(store.validation_indices)
        texts["held-out passages"] = _up_to((store.text(int(index)) for index in indices), budget)
    for file in files:
        passages = (p.strip() for document in iter_documents([file]) for p in split_passages(document, 600))
        texts[Path(file).stem] = _up_to((p for p in passages if len(p) > 80), budget)
    return texts


def _up_to(passages, budget: int) -> list[str]:  # noqa: ANN001
    chosen, total = [], 0
    for passage in passages:
        total += len(passage.encode())
        if total > budget:
            break
        chosen.append(passage)
    return chosen


def _encoder(path: Path):  # noqa: ANN202
    """Something with encode(text).ids, or None for files that are no tokenizers."""
    if path.suffix == ".json":
        return tokenizers.Tokenizer.from_file(str(path))
    if path.name.endswith(".model"):
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return lambda text: processor.encode(text)
    if path.name.endswith("vocab.txt"):
        from tokenizers.implementations import BertWordPieceTokenizer

        return BertWordPieceTokenizer(str(path))
    return None


def _measure(calibrator, vocabulary, encoder, texts, head) -> dict[str, float]:  # noqa: ANN001
    bound = calibrator.bind(vocabulary, use_disk_cache=False)
    figures: dict[str, float] = {"size": float(len(vocabulary))}
    for name, passages in texts.items():
        if callable(encoder):
            ids = [encoder(passage) for passage in passages]
        else:
            ids = [encoder.encode(passage, add_special_tokens=False).ids for passage in passages]
        result = measure_fidelity(bound, ids, head=head)
        figures[name] = result.bits_per_byte
        figures[f"{name} skipped"] = result.skipped / max(1, result.skipped + result.tokens)
    return figures


def _print_table(rows: list[tuple[str, str, dict[str, float]]], names: list[str]) -> None:
    base = {
        name: np.mean([row[name] for kind, _, row in rows if kind == "pool" and row["size"] > 8000] or [np.nan])
        for name in names
    }
    print("| tokenizer | kind | tokens | " + " | ".join(f"{name} | change" for name in names) + " |")
    print("|---|---|---:|" + "---:|---:|" * len(names))
    for kind, label, row in rows:
        cells = [f"{row[name]:.3f} | {100 * (row[name] / base[name] - 1):+.1f} %" for name in names]
        print(f"| {label} | {kind} | {int(row['size']):,} | " + " | ".join(cells) + " |")
    for name in names:
        changes = [row[name] / base[name] - 1 for kind, _, row in rows if kind == "unseen"]
        print(f"\n{name}: pool mean {base[name]:.3f}, unseen mean change {100 * np.mean(changes):+.1f} %")


if __name__ == "__main__":
    main()
