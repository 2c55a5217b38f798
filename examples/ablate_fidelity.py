"""What the universal calibrator owes to its pool, negatives, cut tokens, output bias and length limit.

    python examples/ablate_fidelity.py --store RUN/work/passages-* --pool POOL --tokenizers shared/data/tokenizers \
        --output ablation --steps 600

Trains small calibrators from scratch on the same passages and number of tokens, each without one thing, and measures
bits per byte of held-out passages when bound to tokenizers that none has seen. A finished variant is not trained again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibfuse import Calibrator, Vocabulary
from calibfuse.bits_per_byte import measure_fidelity
from calibfuse.calibrator.model import CALIBRATOR_HEAD, CalibratorConfig
from calibfuse.inspection.encoding import text_encoder
from calibfuse.training.data import PassageStore
from calibfuse.training.tokenizers.pool import PoolEntry, TokenizerPool
from calibfuse.training.trainer import Trainer, TrainingConfig, make_calibrator

UNSEEN = ("gpt2.json", "pythia.json", "llama-3.json", "llama-2.tokenizer.model", "t5-small.json")


@dataclass(frozen=True)
class Variant:
    """One thing left out.

    Attributes:
        title: for the table.
        keep: which tokenizers of the pool are used.
        settings: changes of the TrainingConfig.
        shape: changes of the CalibratorConfig.
        has_bias: whether tokens have an output bias.
    """

    title: str
    keep: Callable[[PoolEntry], bool] = lambda _: True
    settings: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)
    has_bias: bool = True


VARIANTS = {
    "all": Variant("everything"),
    "byte-level": Variant("byte-level styles only", keep=lambda entry: entry.name.startswith("byte-level")),
    "one": Variant("one tokenizer, of GPT-2's style", keep=lambda entry: entry.name == "byte-level-50000"),
    "no-negatives": Variant("no negatives", settings={"vocabulary_size": 1}),
    "no-cuts": Variant("no cut tokens", settings={"split_rate": 0.0}),
    "no-bias": Variant("no output bias", has_bias=False),
    "no-limit": Variant("no limit to vectors' length", shape={"max_token_norm": 1e9}),
}


def train(variant: Variant, store: PassageStore, pool: TokenizerPool, config: TrainingConfig, folder: Path) -> None:
    """Train a variant into a folder, unless it is there."""
    if (folder / "config.json").exists():
        return
    calibrator = make_calibrator(CalibratorConfig(**variant.shape), config.seed)
    if not variant.has_bias:
        width = calibrator.config.token_width
        is_vector = torch.arange(calibrator.composer.table.shape[1]) < width
        calibrator.composer.table.register_hook(lambda gradient: gradient * is_vector)  # biases start at 0 and stay
    entries = TokenizerPool([entry for entry in pool if variant.keep(entry)])
    Trainer(calibrator, store, entries, replace(config, **variant.settings), folder).train()
    calibrator.save_pretrained(folder, dtype=torch.float32)


def passages_of(store: PassageStore, count: int) -> list[str]:
    """Held-out passages, `count` bytes in all."""
    indices = np.random.default_rng(0).permutation(store.validation_indices)
    chosen = indices[np.cumsum(store.byte_lengths(indices)) <= count]
    return store.texts(int(index) for index in chosen)


def main() -> None:
    """Train, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="passage store of a training run")
    parser.add_argument("--pool", type=Path, required=True, metavar="DIR", help="its tokenizer pool")
    parser.add_argument("--tokenizers", type=Path, required=True, metavar="DIR", help="folder with the files below")
    parser.add_argument("--files", nargs="+", default=list(UNSEEN), metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help="some variants")
    parser.add_argument("--steps", type=int, default=600, help="of 8 x 128 tokens (default: %(default)s)")
    parser.add_argument("--bytes", type=int, default=20_000, help="of held-out text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store, pool = PassageStore(args.store), TokenizerPool.load(args.pool)
    config = TrainingConfig(
        steps=args.steps, rows=8, slots=128, decay=0.5, balance_identity_terms=False, validate_every=0, seed=args.seed,
        save_every=max(1, args.steps),
    )  # fmt: skip
    passages = passages_of(store, args.bytes)
    own = next(iter(pool))
    measured = [(f"{own.name} (pool)", own.vocabulary, own.encode_batch(passages))]
    for name in args.files:
        path = args.tokenizers / name
        measured.append((name, Vocabulary.from_tokenizer(path), text_encoder(path)(passages)))
    lines = [f"| variant | {' | '.join(name for name, _, _ in measured)} | change, unseen, mean |"]
    lines.append("|---|" + "---:|" * (len(measured) + 1))
    base: list[float] = []
    for key in args.only:
        train(VARIANTS[key], store, pool, config, args.output / key)
        calibrator = Calibrator.from_pretrained(args.output / key)
        figures = [
            measure_fidelity(calibrator.bind(vocabulary, use_disk_cache=False), ids, head=CALIBRATOR_HEAD).bits_per_byte
            for _, vocabulary, ids in measured
        ]
        base = base or figures
        changes = [math.log(value / first) for value, first in zip(figures[1:], base[1:], strict=True)]
        cells = " | ".join(f"{value:.3f}" for value in figures)
        lines.append(f"| {VARIANTS[key].title} | {cells} | {100 * math.expm1(float(np.mean(changes))):+.1f} % |")
        print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
