"""Bits per byte of text under a bound calibrator: the measure that is comparable across vocabularies.

Tokens without bytes (unknown marks) are left out of both sums and counted: a lossy tokenizer must not look good.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibfuse.calibrator.binding import BoundCalibrator, GuideStates
from calibfuse.errors import DataError
from calibfuse.guide import CALIBRATOR_HEAD, SPECIAL_MASS

_BLOCK_ELEMENTS = 4_000_000  # of a [positions, vocabulary] block: bounds memory


@dataclass(frozen=True)
class Fidelity:
    """How well a head predicts text."""

    nats: float  # total negative log-likelihood
    bytes: int  # of the scored tokens
    tokens: int  # scored
    skipped: int  # without bytes

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte."""
        return self.nats / self.bytes / math.log(2)


@torch.no_grad()
def iter_scored(
    bound: BoundCalibrator, sequences: Sequence[Sequence[int]], *, head: str = CALIBRATOR_HEAD, batch_size: int = 16
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The covered tokens of sequences, each read from an empty context, in blocks; in no order.

    Gives log-probabilities up to a constant, float32 [n, vocabulary], -inf for special tokens; the tokens, int64
    [n]; and those before them, -1 where a text begins.
    """
    special = (~bound.covers(torch.arange(bound.target_vocab_size, device=bound.device))).nonzero()[:, 0]
    ordered = sorted((sequence for sequence in sequences if len(sequence)), key=len)
    for first in range(0, len(ordered), batch_size):
        group = ordered[first : first + batch_size]
        ids = torch.zeros(len(group), len(group[-1]), dtype=torch.int64, device=bound.device)
        present = torch.zeros_like(ids, dtype=torch.bool)
        for row, sequence in enumerate(group):
            ids[row, : len(sequence)] = torch.as_tensor(sequence)
            present[row, : len(sequence)] = True
        # What precedes each token: nothing, which ends a word as an unknown id does, then the others.
        before = torch.cat([torch.full_like(ids[:, :1], -1), ids[:, :-1]], dim=1)
        states = GuideStates(bound, bound.states(ids)[:, :-1], bound.spelled(before.tolist()))
        scored = present & bound.covers(ids)
        step = max(1, _BLOCK_ELEMENTS // (len(ids) * bound.target_vocab_size))
        for start in range(0, ids.shape[1], step):
            wanted = scored[:, start : start + step]
            scores = states.positions(start, start + step).log_scores(head)[wanted].index_fill_(1, special, -torch.inf)
            yield scores, ids[:, start : start + step][wanted], before[:, start : start + step][wanted]


@torch.no_grad()
def measure_fidelity(
    bound: BoundCalibrator, sequences: Sequence[Sequence[int]], *, head: str = CALIBRATOR_HEAD, batch_size: int = 16
) -> Fidelity:
    """Score token sequences, each from an empty context; a DataError where no token has bytes."""
    lengths = torch.from_numpy(np.diff(bound.vocabulary.offsets).copy()).to(bound.device)
    log_rest = math.log1p(-SPECIAL_MASS) if bound.coverage < 1.0 else 0.0  # what `normalise` leaves to the others
    nats, byte_count, tokens = 0.0, 0, 0
    for scores, targets, _ in iter_scored(bound, sequences, head=head, batch_size=batch_size):
        surprise = scores.logsumexp(dim=1) - scores.gather(1, targets[:, None])[:, 0] - log_rest
        nats += float(surprise.double().sum())
        byte_count += int(lengths[targets].sum())
        tokens += len(targets)
    if not byte_count:
        raise DataError("There is no text to measure: expected at least one sequence with a token that has bytes.")
    return Fidelity(nats, byte_count, tokens, sum(map(len, sequences)) - tokens)
