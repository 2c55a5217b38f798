"""Further training of one causal LM of transformers on passages, by plain next-token cross-entropy.

Simpler than trainer.py: one model, its own tokenizer, its own full softmax. A step's batch and random numbers are
functions of the seed and of one cursor, so that a resumed run ends with the weights of an uninterrupted one.

Left out: several processes (a model of this size trains on one device), and losses on a part of a passage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from calibfuse.errors import DataError, InputError
from calibfuse.generation.language_model import choose_device
from calibfuse.training.config import TrainingConfig
from calibfuse.training.data import PassageStore
from calibfuse.training.loop import TrainingLoop, make_optimizer, mixed_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORE = -100
_ENCODE_CHUNK = 16  # passages tokenized at a time
_VALIDATION_ROWS = 8


class LMBatches:
    """Rows of tokens, each passage behind a start mark; a function of the cursor alone."""

    def __init__(
        self,
        store: PassageStore,
        indices: NDArray[np.int64],
        encode: Callable[[Sequence[str]], list[list[int]]],
        *,
        start_id: int,
        end_id: int | None,
        config: TrainingConfig,
    ) -> None:
        if not len(indices):
            raise DataError("None of the training passages is for this model; check the files, or the threshold.")
        self.store, self.indices, self.encode, self.config = store, indices, encode, config
        self.start_id, self.end_id = start_id, end_id
        self.cursor = 0
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def next(self) -> Tensor:
        """int64 [batch_size, sequence_length]; the passage that the batch cuts does not go on. Advances the cursor."""
        count = self.config.batch_size * self.config.sequence_length
        ids: list[int] = []
        while len(ids) < count:
            texts = [self.store.text(self._index_at(self.cursor + ahead)) for ahead in range(_ENCODE_CHUNK)]
            for row in self.encode(texts):
                ids += [self.start_id, *row, *([] if self.end_id is None else [self.end_id])]
                self.cursor += 1
                if len(ids) >= count:
                    break
        return torch.tensor(ids[:count]).reshape(self.config.batch_size, self.config.sequence_length)

    def labels(self, ids: Tensor) -> Tensor:
        """What follows each slot but the last, int64 [batch_size, sequence_length - 1]: IGNORE for a start mark.

        Where the start mark ends a passage as well, it is to be predicted.
        """
        labels = ids[:, 1:].clone()
        return labels if self.end_id is None else labels.masked_fill(labels == self.start_id, IGNORE)

    def _index_at(self, cursor: int) -> int:
        epoch, position = divmod(cursor, len(self.indices))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.config.seed, 5, epoch]).permutation(self.indices)
        return int(self._order[1][position])


class LMTrainer(TrainingLoop):
    """Trains a causal LM, resumably."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: LMBatches,
        config: TrainingConfig,
        folder: Path,
        *,
        identity: dict[str, Any],
        label: str = "training",
        device: str | None = None,
        show_progress: bool = True,
    ) -> None:
        check_length(model, config)
        self.device = choose_device(device)
        moved: Any = model
        self.model: PreTrainedModel = moved.to(self.device)
        self.batches, self.config = batches, config
        parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        super().__init__(
            parameters,
            make_optimizer(parameters, rate=config.learning_rate, weight_decay=config.weight_decay, fused=True),
            steps=config.steps,
            rate=config.rate_at,
            folder=folder,
            identity=identity,
            save_every=config.save_every,
            label=label,
            show_progress=show_progress,
        )

    def losses(self) -> dict[str, float]:
        """See `TrainingLoop.losses`."""
        config, device = self.config, self.device
        self.model.train()
        ids = self.batches.next()
        labels = self.batches.labels(ids).to(device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed * 1_000_003 + self.step)  # dropout
            with mixed_precision(device, config.precision):
                logits = self.model(input_ids=ids.to(device), use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
            loss.backward()  # type: ignore[no-untyped-call]
        self.tokens += ids.numel()
        return {"loss": float(loss.detach())}

    def position(self) -> int:
        """How many passages were read."""
        return self.batches.cursor

    def set_position(self, position: int) -> None:
        """Inverse of `position`."""
        self.batches.cursor = int(position)


def check_length(model: PreTrainedModel, config: TrainingConfig) -> None:
    """Refuse rows that are longer than the model can read."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < config.sequence_length:
        raise InputError(
            f"The model reads at most {longest} tokens, but rows have {config.sequence_length}: lower the sequence "
            "length."
        )


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel,
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], list[list[int]]],
    *,
    start_id: int,
    sequence_length: int,
) -> float:
    """Bits per byte of texts, each from an empty context, under the model's own tokenization."""
    byte_count = sum(len(text.encode()) for text in texts)
    if not byte_count:
        raise DataError("There is no text to measure: expected at least one passage.")
    model.eval()  # type: ignore[no-untyped-call]
    pieces = [
        row[at : at + sequence_length - 1] for row in encode(texts) for at in range(0, len(row), sequence_length - 1)
    ]
    pieces.sort(key=len)
    nats = 0.0
    for start in range(0, len(pieces), _VALIDATION_ROWS):
        group = [torch.tensor([start_id, *piece]) for piece in pieces[start : start + _VALIDATION_ROWS]]
        ids = torch.nn.utils.rnn.pad_sequence(group, batch_first=True, padding_value=IGNORE).to(model.device)
        # Padding is on the right, where no token that counts sees it.
        logits = model(input_ids=ids.masked_fill(ids == IGNORE, start_id), use_cache=False).logits[:, :-1]
        nats += float(
            functional.cross_entropy(
                logits.float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
            )
        )
    return nats / byte_count / math.log(2)
