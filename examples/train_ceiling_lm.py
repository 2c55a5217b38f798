"""Train an ordinary language model on one tokenizer: the ceiling that the universal calibrator is compared with.

    python examples/train_ceiling_lm.py --store RUN/work/passages-* --pool POOL --output fair-universal --steps 900
    python examples/train_ceiling_lm.py --store RUN/work/passages-* --tokenizer gpt2.json --output ceiling-gpt2 \
        --steps 900 --bytes-per-step 3900

The first form trains a small universal calibrator from scratch on a pool of tokenizers; it prints how many bytes of
text one step holds. The second trains a model with the same body, the same heads, the same optimiser, the same softmax
subset and the same passages in the same order, but with an ordinary embedding table of one row per token, of one
tokenizer. `--bytes-per-step` sets the length of its rows so that both see the same bytes in the same number of steps.
`examples/measure_fidelity.py --ceiling NAME=DIR` puts the two side by side.

An ordinary table is a composer whose only feature is the token's id, so that the trainer is used as it is. Left out:
resuming, and text that is sorted by toxicity (the store's labels are used as they are).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calibfuse import Calibrator, Vocabulary, hub
from calibfuse.calibrator.binding import BoundCalibrator
from calibfuse.calibrator.composer import TokenFeatures
from calibfuse.calibrator.model import CalibratorConfig
from calibfuse.inspection.encoding import TextEncoder, text_encoder
from calibfuse.training.data import PassageStore
from calibfuse.training.objective import Losses
from calibfuse.training.tokenizers.pool import PoolEntry, PoolSpec, TokenizerPool
from calibfuse.training.trainer import Trainer, TrainingConfig, make_calibrator

FORMAT_NAME, FORMAT_VERSION = "calibfuse-ceiling-lm", 1
_COUNTED_PASSAGES = 4_000  # from which the most frequent tokens and the bytes per token are known


class OwnTable(nn.Module):
    """An embedding table with one row per token, in the place of a calibrator's composer.

    Args:
        target_vocab_size: rows.
        token_width: width of a token's vector.
        head_count: bias columns.
    """

    def __init__(self, target_vocab_size: int, token_width: int, head_count: int) -> None:
        super().__init__()
        self.token_width = token_width
        self.table = nn.Parameter(torch.zeros(target_vocab_size, token_width + head_count))
        nn.init.normal_(self.table[:, :token_width], std=0.02)

    def forward(self, features: TokenFeatures) -> tuple[Tensor, Tensor]:
        """Vectors and biases of the tokens whose ids are the features' buckets."""
        rows = nn.functional.embedding(torch.from_numpy(features.buckets).to(self.table.device).long(), self.table)
        return rows[:, : self.token_width], rows[:, self.token_width :]


def id_features(target_vocab_size: int) -> TokenFeatures:
    """One feature for each token: its id."""
    ids = np.arange(target_vocab_size, dtype=np.int32)
    return TokenFeatures(ids, np.ones(target_vocab_size, dtype=np.float32), np.arange(target_vocab_size + 1))


class OneTokenizer(PoolEntry):
    """A pool entry for a given tokenizer, of any kind."""

    def __init__(
        self, vocabulary: Vocabulary, encoder: TextEncoder, counts: NDArray[np.int64], bytes_per_token: float
    ) -> None:
        spec = PoolSpec(style="byte-level", vocab_size=max(257, len(vocabulary)))  # names nothing but the size
        super().__init__(encoder, spec, unigram_counts=counts, bytes_per_token=bytes_per_token)  # type: ignore[arg-type]
        self.vocabulary = vocabulary  # type: ignore[misc]
        self._encoder = encoder

    def encode_batch(
        self, texts: Sequence[str], *, split_rate: float = 0.0, rng: np.random.Generator | None = None
    ) -> list[list[int]]:
        """Ids of each text; a tokenizer that is alone needs no varied cuts."""
        return self._encoder(list(texts))


class OnePool(TokenizerPool):
    """A pool of one tokenizer, without negatives: an ordinary model needs none."""

    def negatives(self, count: int, sample: Sequence[str], seed: int) -> list[bytes]:
        """None."""
        return []

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Of the vocabulary."""
        return self[0].vocabulary.fingerprint


def one_tokenizer(path: Path, store: PassageStore) -> OneTokenizer:
    """A tokenizer with its counts on training passages."""
    vocabulary, encoder = Vocabulary.from_tokenizer(path), text_encoder(path)
    texts = store.texts(store.permutation(0, 1)[:_COUNTED_PASSAGES])
    ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in encoder(texts)])
    counts = np.bincount(ids, minlength=len(vocabulary))
    return OneTokenizer(vocabulary, encoder, counts, sum(len(text.encode()) for text in texts) / len(ids))


class CountingTrainer(Trainer):
    """A trainer that adds up the bytes of text it was trained on."""

    bytes_seen = 0

    def _record(self, losses: Losses) -> dict[str, float]:
        self.bytes_seen += self._bytes_scored
        return super()._record(losses)


def train_universal(store: PassageStore, pool: Path, config: TrainingConfig, output: Path, seed: int) -> dict[str, Any]:
    """The other half of the fair pair: a universal calibrator from scratch on the same budget."""
    trainer = CountingTrainer(
        make_calibrator(CalibratorConfig(), seed), store, TokenizerPool.load(pool), config, output
    )
    trainer.train()
    trainer.calibrator.save_pretrained(output)
    return _facts(trainer, config)


def train_ceiling(
    store: PassageStore, tokenizer: Path, config: TrainingConfig, output: Path, seed: int
) -> dict[str, Any]:
    """An ordinary language model on one tokenizer."""
    entry = one_tokenizer(tokenizer, store)
    shape = CalibratorConfig()
    calibrator = make_calibrator(shape, seed)
    calibrator.composer = OwnTable(len(entry.vocabulary), shape.token_width, len(shape.heads))  # type: ignore[assignment]
    trainer = CountingTrainer(calibrator, store, OnePool([entry]), config, output)
    trainer.source.vocabularies[0].features = id_features(len(entry.vocabulary))
    trainer.train()
    facts = _facts(trainer, config)
    values = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, "shape": shape.to_dict(), "training": facts}
    values |= {"tokenizer": tokenizer.name, "vocabulary": entry.vocabulary.fingerprint, "size": len(entry.vocabulary)}
    hub.write_checkpoint(output, config=values, tensors=calibrator.state_dict())
    return facts


def load_ceiling(folder: str | Path, vocabulary: Vocabulary) -> BoundCalibrator:
    """A trained ceiling model as a guide over its own vocabulary.

    Args:
        folder: of `train_ceiling`.
        vocabulary: of the tokenizer it was trained with.

    Returns:
        What `measure_fidelity` takes.

    Raises:
        CheckpointError: it is no such model.
        ValueError: it belongs to another vocabulary.
    """
    values = hub.read_config(folder, format_name=FORMAT_NAME, supported_version=FORMAT_VERSION)
    if values["vocabulary"] != vocabulary.fingerprint:
        raise ValueError(
            f"The ceiling model in {folder} belongs to {values['tokenizer']}, not to {vocabulary.name}; train another."
        )
    shape = CalibratorConfig.from_dict(values["shape"])
    calibrator = Calibrator(shape)
    calibrator.composer = OwnTable(len(vocabulary), shape.token_width, len(shape.heads))  # type: ignore[assignment]
    calibrator.load_state_dict(hub.read_tensors(Path(folder) / "model.safetensors"))
    table = calibrator.composer.table.detach()
    vectors, biases = table[:, : shape.token_width].contiguous(), table[:, shape.token_width :].contiguous()
    return BoundCalibrator(calibrator.eval(), vocabulary, vectors, biases)


def _facts(trainer: CountingTrainer, config: TrainingConfig) -> dict[str, Any]:
    return {
        **asdict(config),
        "tokens": trainer.tokens,
        "bytes": trainer.bytes_seen,
        "bytes_per_step": round(trainer.bytes_seen / max(1, trainer.step)),
        "seconds": round(trainer.seconds),
    }


def main() -> int:
    """Train one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="passage store of a training run")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tokenizer", type=Path, metavar="FILE", help="train an ordinary model on this tokenizer")
    kind.add_argument("--pool", type=Path, metavar="DIR", help="train a universal calibrator on this pool")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=900, help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--slots", type=int, default=128, help="tokens of a row (default: %(default)s)")
    parser.add_argument(
        "--bytes-per-step", type=int, metavar="N", help="set --slots so that a step holds so many bytes of text"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    if args.bytes_per_step and not args.tokenizer:
        parser.error("--bytes-per-step goes with --tokenizer")
    torch.set_num_threads(1)
    store, slots = PassageStore(args.store), args.slots
    if args.bytes_per_step:
        bytes_per_token = one_tokenizer(args.tokenizer, store).bytes_per_token
        slots = max(8, round(args.bytes_per_step / bytes_per_token / args.rows))
    config = TrainingConfig(
        steps=args.steps,
        rows=args.rows,
        slots=slots,
        learning_rate=args.learning_rate,
        decay=0.5,
        balance_identity_terms=False,  # the same passages, whatever the tokenizer
        save_every=max(1, args.steps),
        validate_every=0,
        seed=args.seed,
        **({} if args.pool else {"split_rate": 0.0, "vocabulary_size": 1}),
    )
    args.output.mkdir(parents=True, exist_ok=True)
    if args.pool:
        facts = train_universal(store, args.pool, config, args.output, args.seed)
    else:
        facts = train_ceiling(store, args.tokenizer, config, args.output, args.seed)
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
