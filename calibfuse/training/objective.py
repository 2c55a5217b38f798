"""The training loss: two next-token cross-entropies on one body.

The reference head learns from every passage, the calibrator head from the non-toxic ones only. Both read the same
states of the same body, so what the two disagree about is what the toxic passages hold, not the noise of two trainings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibfuse.calibrator import Calibrator
from calibfuse.guide import CALIBRATOR_HEAD, REFERENCE_HEAD
from calibfuse.training.batches import BOUNDARY, IGNORE, TrainingBatch


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropies in nats per token."""

    total: Tensor  # what is minimised
    calibrator: Tensor  # of the non-toxic head on non-toxic passages; 0 where a batch has none
    reference: Tensor  # of the reference head on all passages
    tokens: Tensor  # number of scored tokens


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; keeps the probabilities instead of the log-probabilities.

    The same numbers as torch's cross_entropy, with half its passes over the [positions, candidates] block, which are a
    third of a training step's time on a CPU.
    """

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
