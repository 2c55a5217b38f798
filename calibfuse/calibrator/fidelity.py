"""Bits per byte of text under a bound calibrator: the measure that is comparable across vocabularies.

Cross-entropy per token depends on how long tokens are; per byte of text it does not. Tokens without bytes (unknown
marks) are left out of both sums and counted, so that a lossy tokenizer cannot look good by not spelling the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibfuse.calibrator.binding import BoundCalibrator, GuideStates
from calibfuse.calibrator.model import CALIBRATOR_HEAD
from calibfuse.errors import DataError

_BLOCK_ELEMENTS = 8_000_000  # of a [positions, vocabulary] block: bounds memory


@dataclass(frozen=True)
class Fidelity:
    """How well a head predicts text.

    Attributes:
        nats: total negative log-likelihood.
        bytes: of the scored tokens.
        tokens: scored.
        skipped: tokens without bytes.
    """

    nats: float
    bytes: int
    tokens: int
    skipped: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte."""
        return self.nats / self.bytes / math.log(2)

    @property
    def nats_per_token(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens


@torch.no_grad()
def measure_fidelity(
    bound: BoundCalibrator, sequences: Sequence[Sequence[int]], *, head: str = CALIBRATOR_HEAD, batch_size: int = 16
) -> Fidelity:
    """Score token sequences, each from an empty context.

    Args:
        bound: the calibrator, bound to the vocabulary of the ids.
        sequences: token ids of texts, without special tokens.
        head: which distribution.
        batch_size: sequences per forward pass.

    Returns:
        The sums; the first token of each sequence is scored too.

    Raises:
        DataError: no sequence has a token with bytes.
    """
    lengths = torch.from_numpy(np.diff(bound.vocabulary.offsets).copy()).to(bound.device)
    ordered = sorted((sequence for sequence in sequences if len(sequence)), key=len)
    nats, byte_count, tokens, skipped = 0.0, 0, 0, 0
    for start in range(0, len(ordered), batch_size):
        group = ordered[start : start + batch_size]
        width = len(group[-1])
        ids = torch.zeros(len(group), width, dtype=torch.int64, device=bound.device)
        present = torch.zeros_like(ids, dtype=torch.bool)
        for row, sequence in enumerate(group):
            ids[row, : len(sequence)] = torch.as_tensor(sequence)
            present[row, : len(sequence)] = True
        hidden, _ = bound._advance(ids, None, None, None)
        scored = present & bound.covers(ids)
        targets = ids[scored]
        token_nats = _token_nats(bound, hidden[:, :-1][scored], targets, head)
        nats += float(token_nats.double().sum())
        byte_count += int(lengths[targets].sum())
        tokens += len(targets)
        skipped += int((present & ~scored).sum())
    if not byte_count:
        raise DataError("There is no text to measure: expected at least one sequence with a token that has bytes.")
    return Fidelity(nats, byte_count, tokens, skipped)


def _token_nats(bound: BoundCalibrator, hidden: Tensor, targets: Tensor, head: str) -> Tensor:
    """Negative log-probability of each target: float32 [positions]."""
    step = max(1, _BLOCK_ELEMENTS // bound.target_vocab_size)
    parts = []
    for start in range(0, len(targets), step):
        log_probs = bound.normalise(GuideStates(bound, hidden[start : start + step]).log_scores(head))
        parts.append(-log_probs.gather(1, targets[start : start + step, None])[:, 0])
    return torch.cat(parts) if parts else hidden.new_zeros(0)
