"""Mode "embedding": the source paper's fusion of last hidden states, done on scores (Tian et al. 2025).

h' = (1 - a) h + a LN(t A): h the state that the target's output head receives, t the calibrator's, A the alignment. The
head is linear, so the target's scores and one more call of its head give the fusion exactly, over all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from calibfuse.embedding.output_head import OutputHead
from calibfuse.errors import VocabularyMismatchError


def aligned_states(states: Tensor, matrix: Tensor) -> Tensor:
    """LN(t A): states t [..., width] and matrix A [width, hidden_size] -> float32 [..., hidden_size]."""
    return functional.layer_norm(states.float() @ matrix.to(states.device, torch.float32), (matrix.shape[-1],))


@dataclass(frozen=True, eq=False)
class EmbeddingFusion:
    """Fuses the calibrator's hidden state into the target's, before the target's output head."""

    matrix: Tensor  # A, float32 [width, hidden_size]
    head: OutputHead  # of the target
    alpha: float  # a in [0, 1); 0 leaves the target as it is
    # True: as published, where the factor 1 - a on the target's own logits is a temperature, whatever the calibrator
    # says. False: h' = h + a / (1 - a) LN(t A), so that the target keeps weight 1.
    hidden_temperature: bool = True

    def __post_init__(self) -> None:
        if self.matrix.shape[-1] != self.head.linear.in_features:
            raise VocabularyMismatchError(
                f"The alignment maps to {self.matrix.shape[-1]} channels, but the target's output head takes "
                f"{self.head.linear.in_features}. Make one for this target with `calibfuse align-embedding`."
            )

    def __call__(self, scores: Tensor, states: Tensor) -> Tensor:
        """The fused log-probabilities, float32, shape of `scores`, nats; -inf stays -inf.

        Args:
            scores: float [..., target_vocab_size], logits or (unless the target soft-caps them) log-probabilities.
            states: t, float [..., width], leading axes of `scores`.
        """
        if self.alpha == 0.0:
            return scores.float().log_softmax(dim=-1)
        target = self.head.undo(scores)
        aligned, width = aligned_states(states, self.matrix), scores.shape[-1]
        if self.hidden_temperature:
            fused = (1.0 - self.alpha) * target + self.alpha * self.head.logits(aligned, width)
        else:
            fused = target + self.alpha / (1.0 - self.alpha) * self.head.logits(aligned, width, bias=False)
        return self.head.redo(fused).log_softmax(dim=-1)
