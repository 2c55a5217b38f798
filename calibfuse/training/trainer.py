"""Training of a universal calibrator: both heads on packed batches of a pool of tokenizers."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibfuse.bits_per_byte import measure_fidelity
from calibfuse.calibrator import Calibrator
from calibfuse.errors import InputError, MissingDependencyError
from calibfuse.generation.language_model import choose_device
from calibfuse.guide import CALIBRATOR_HEAD, REFERENCE_HEAD
from calibfuse.training.batches import BOUNDARY, IGNORE, BatchSource, TrainingBatch
from calibfuse.training.config import TrainingConfig
from calibfuse.training.data import PassageStore
from calibfuse.training.loop import TrainingLoop, learning_rate, make_optimizer, mixed_precision
from calibfuse.training.tokenizers.pool import TokenizerPool

_KNOWLEDGE = ("fusion", "training", "words")  # of a configuration: what was learned or found, not the shape


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropies in nats per token."""

    total: Tensor  # what is minimised
    calibrator: Tensor  # of the non-toxic head on non-toxic passages; 0 where a batch has none
    reference: Tensor  # of the reference head on all passages
    tokens: Tensor  # number of scored tokens


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; keeps the probabilities, which saves half of torch's passes over the block of scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor) -> Tensor:  # noqa: ANN401
        log_sums = scores.logsumexp(dim=1)
        losses = log_sums - scores.gather(1, targets[:, None])[:, 0]
        ctx.save_for_backward((scores - log_sums[:, None]).exp_(), targets)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        probabilities, targets = ctx.saved_tensors
        result = probabilities * gradient
        result[torch.arange(len(targets), device=targets.device), targets] -= gradient
        return result, None


class TrainingObjective(nn.Module):
    """Calibrator -> losses; a module so that data-parallel wrappers can hold it."""

    def __init__(self, calibrator: Calibrator, *, reference_weight: float = 1.0, heads_only: bool = False) -> None:
        super().__init__()
        self.calibrator = calibrator
        self.reference_weight = reference_weight
        self.heads_only = heads_only

    def forward(self, batch: TrainingBatch) -> Losses:
        """Losses of one batch."""
        model = self.calibrator
        vectors, biases = model.composer(batch.features)
        if self.heads_only:
            vectors = vectors.detach()
        is_boundary = batch.inputs == BOUNDARY
        inputs = model.embed(vectors[batch.inputs.clamp(min=0)], is_boundary)
        starts = torch.zeros(len(batch.inputs), dtype=torch.int64, device=inputs.device)
        states = model.body(inputs, starts)

        scored = batch.targets != IGNORE
        states, targets = states[scored], batch.targets[scored]
        is_non_toxic = batch.is_non_toxic[scored]
        candidate_vectors = vectors[batch.candidates]
        candidate_biases = biases[batch.candidates].float() + batch.log_weights[:, None]

        def loss_of(head: str, chosen_states: Tensor, chosen_targets: Tensor) -> Tensor:
            column = model.config.heads.index(head)
            scores = model.heads[head](chosen_states) @ candidate_vectors.T.to(chosen_states.dtype)
            scores = scores.float() + candidate_biases[:, column]
            loss: Tensor = _SummedCrossEntropy.apply(scores, chosen_targets)  # type: ignore[no-untyped-call]
            return loss

        reference = loss_of(REFERENCE_HEAD, states, targets) / max(len(targets), 1)
        clean = int(is_non_toxic.sum())
        calibrator = loss_of(CALIBRATOR_HEAD, states[is_non_toxic], targets[is_non_toxic]) / max(clean, 1)
        total = calibrator + self.reference_weight * reference
        return Losses(total, calibrator.detach(), reference.detach(), scored.sum())


class Trainer(TrainingLoop):
    """Trains a calibrator, resumably."""

    def __init__(
        self,
        calibrator: Calibrator,
        store: PassageStore,
        pool: TokenizerPool,
        config: TrainingConfig,
        folder: Path,
        *,
        device: str | None = None,
        show_progress: bool = True,
    ) -> None:
        self.config, self.store, self.pool = config, store, pool
        self._accelerator = _accelerator(config)
        self.device = self._accelerator.device if self._accelerator else choose_device(device)
        self.is_main = self._accelerator is None or bool(self._accelerator.is_main_process)
        self.calibrator = calibrator.to(self.device)
        self.source = BatchSource(
            store, pool, config, calibrator.config.bucket_count, show_progress=show_progress and self.is_main
        )
        if config.heads_only:
            for name, parameter in self.calibrator.named_parameters():
                # of the table, the objective lets gradients through to the heads' biases only
                parameter.requires_grad_(name.startswith("heads.") or name == "composer.table")
        self.objective: nn.Module = TrainingObjective(
            self.calibrator, reference_weight=config.reference_weight, heads_only=config.heads_only
        )
        parameters = dict(self.calibrator.named_parameters())
        shape = calibrator.config.to_dict()
        super().__init__(
            parameters,
            make_optimizer(
                parameters,
                rate=config.learning_rate,
                weight_decay=config.weight_decay,
                undecayed=("composer.table",),
                fused=True,
            ),
            steps=config.steps,
            rate=partial(
                learning_rate, steps=config.steps, peak=config.learning_rate, warmup=config.warmup, decay=config.decay
            ),
            folder=folder,
            identity={
                "text": store.fingerprint,
                "tokenizer pool": pool.fingerprint,
                "calibrator shape": {key: value for key, value in shape.items() if key not in _KNOWLEDGE},
            },
            save_every=config.save_every,
            show_progress=show_progress,
        )
        if self._accelerator:
            self.objective = self._accelerator.prepare(self.objective)

    def losses(self) -> dict[str, float]:
        config = self.config
        self.objective.train()
        batch = self.source.batch(self.step)
        byte_count = batch.target_bytes
        if self._accelerator:
            share = config.batch_size // self._accelerator.num_processes
            first = share * self._accelerator.process_index
            batch = batch.rows(first, first + share)
        with mixed_precision(self.device, config.precision):
            losses: Losses = self.objective(batch.to(self.device))
        if self._accelerator:
            self._accelerator.backward(losses.total)
        else:
            losses.total.backward()  # type: ignore[no-untyped-call]
        self.tokens += config.batch_size * config.sequence_length
        values = torch.stack([losses.total.detach(), losses.calibrator, losses.reference, losses.tokens.float()])
        tokens = float(values[3])
        if self._accelerator:
            values = self._accelerator.reduce(values, reduction="mean")
            tokens *= self._accelerator.num_processes
        total, calibrator, reference = values[:3].tolist()
        return {
            "loss": total,
            "calibrator_nats": calibrator,
            "reference_nats": reference,
            "bits_per_byte": reference * tokens / max(1, byte_count) / math.log(2),
        }

    def position(self) -> dict[str, int]:
        return {str(label): cursor for label, cursor in self.source.cursors.items()}

    def set_position(self, position: dict[str, int]) -> None:
        self.source.cursors = {int(label): int(cursor) for label, cursor in position.items()}

    def agree(self, told: bool) -> bool:
        if not self._accelerator:
            return told
        flag = torch.tensor(float(told), device=self.device)
        return float(self._accelerator.reduce(flag, reduction="sum")) > 0

    def save_checkpoint(self) -> None:
        if self._accelerator:
            self._accelerator.wait_for_everyone()
        super().save_checkpoint()

    def validate(self, byte_budget: int | None = None) -> dict[str, dict[str, float]]:
        """Bits per byte of held-out text per tokenizer of the pool."""
        budget = byte_budget or self.config.validation_bytes
        indices = np.random.default_rng([self.config.seed, 3]).permutation(self.store.validation_indices)
        # The same passages for every tokenizer, or the figures could not be compared.
        indices = indices[np.cumsum(self.store.byte_lengths(indices)) <= budget] if len(indices) else indices
        if not len(indices):
            return {}
        clean = [int(index) for index in indices if self.store.labels[index]]
        result: dict[str, dict[str, float]] = {}
        self.calibrator.eval()
        for entry in self.pool:
            bound = self.calibrator.bind(entry.vocabulary, use_disk_cache=False)
            row = {"vocabulary": float(len(entry.vocabulary))}
            for head, chosen in ((CALIBRATOR_HEAD, clean), (REFERENCE_HEAD, indices)):
                if len(chosen):
                    ids = entry.encode_batch(self.store.texts(int(index) for index in chosen))
                    row[head] = measure_fidelity(bound, ids, head=head).bits_per_byte
            result[entry.name] = row
        return result

    def validation_line(self) -> str:
        """Bits per byte of held-out text under the reference head, for the log."""
        rows = self.validate().items()
        return "bits per byte " + ", ".join(f"{name} {row.get(REFERENCE_HEAD, math.nan):.3f}" for name, row in rows)


def process_count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _accelerator(config: TrainingConfig) -> Any:  # noqa: ANN401
    """An Accelerator when the process was started as one of several, else None."""
    if process_count() == 1:
        return None
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingDependencyError(
            f"Training on {process_count()} processes needs accelerate: pip install 'calibfuse[train]'."
        ) from error
    if config.batch_size % process_count():
        raise InputError(
            f"batch_size ({config.batch_size}) must be a multiple of the number of processes ({process_count()})."
        )
    return Accelerator(cpu=not torch.cuda.is_available())
