"""Bits per byte of text under a bound calibrator: the measure that is comparable across vocabularies.

Tokens without bytes (unknown marks) are left out of both sums and counted, so that a lossy tokenizer cannot look good
by not spelling the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibfuse.calibrator.binding import BoundCalibrator, GuideStates
from calibfuse.errors import DataError
from calibfuse.guide import CALIBRATOR_HEAD, SPECIAL_MASS

_BLOCK_ELEMENTS = 4_000_000  # of a [positions, vocabulary] block: bounds memory

# Ids of the tokens before [positions] (-1: a text begins) -> which tokens are candidates, bool [positions, vocabulary].
Candidates = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fidelity:
    """How well a head predicts text."""

    nats: float  # total negative log-likelihood
    bytes: int  # of the scored tokens
    tokens: int  # scored
    skipped: int  # without bytes
    # The same sum with every distribution renormalised over candidates, which are all that fusion asks for.
    restricted_nats: float | None = None

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte."""
        return self.nats / self.bytes / math.log(2)

    @property
    def restricted_bits_per_byte(self) -> float | None:
        """Bits per byte among the candidates."""
        return None if self.restricted_nats is None else self.restricted_nats / self.bytes / math.log(2)


@torch.no_grad()
def measure_fidelity(
    bound: BoundCalibrator,
    sequences: Sequence[Sequence[int]],
    *,
    head: str = CALIBRATOR_HEAD,
    batch_size: int = 16,
    candidates: Candidates | None = None,
) -> Fidelity:
    """Score token sequences, each from an empty context.

    Args:
        bound: the calibrator, bound to the vocabulary of the ids.
        sequences: token ids of texts, without special tokens.
        head: which distribution.
        batch_size: sequences per forward pass.
        candidates: which tokens a target would consider after a token; the one that comes is always added, special ones
            never count. None leaves the restricted figure out.

    Returns:
        The sums; the first token of each sequence is scored too.

    Raises:
        DataError: no sequence has a token with bytes.
    """
    lengths = torch.from_numpy(np.diff(bound.vocabulary.offsets).copy()).to(bound.device)
    ordered = sorted((sequence for sequence in sequences if len(sequence)), key=len)
    nats, restricted, byte_count, tokens, skipped = 0.0, 0.0, 0, 0, 0
    for start in range(0, len(ordered), batch_size):
        group = ordered[start : start + batch_size]
        width = len(group[-1])
        ids = torch.zeros(len(group), width, dtype=torch.int64, device=bound.device)
        present = torch.zeros_like(ids, dtype=torch.bool)
        for row, sequence in enumerate(group):
            ids[row, : len(sequence)] = torch.as_tensor(sequence)
            present[row, : len(sequence)] = True
        hidden = bound.states(ids)
        scored = present & bound.covers(ids)
        targets = ids[scored]
        before = torch.cat([torch.full_like(ids[:, :1], -1), ids[:, :-1]], dim=1)
        # What precedes each token: nothing, which ends a word as an unknown id does, then the others.
        states = GuideStates(bound, hidden[:, :-1], bound.spelled(before.tolist()))
        token_nats = _token_nats(states, scored, ids, before, head, candidates)
        nats += float(token_nats[0].double().sum())
        restricted += float(token_nats[1].double().sum())
        byte_count += int(lengths[targets].sum())
        tokens += len(targets)
        skipped += int((present & ~scored).sum())
    if not byte_count:
        raise DataError("There is no text to measure: expected at least one sequence with a token that has bytes.")
    return Fidelity(nats, byte_count, tokens, skipped, restricted if candidates is not None else None)


def _token_nats(
    states: GuideStates, scored: Tensor, ids: Tensor, before: Tensor, head: str, candidates: Candidates | None
) -> Tensor:
    """Negative log-probability of each scored token, among all tokens and among the candidates: float32 [2, tokens].

    What is given is [rows, positions]: the states before each token, which tokens count, they and those before them.
    """
    bound = states.bound
    step = max(1, _BLOCK_ELEMENTS // (len(ids) * bound.target_vocab_size))
    special = (~bound.covers(torch.arange(bound.target_vocab_size, device=ids.device))).nonzero()[:, 0]
    log_rest = math.log1p(-SPECIAL_MASS) if len(special) else 0.0  # what `normalise` leaves to the others
    parts = [torch.zeros(2, 0, device=ids.device)]
    for start in range(0, ids.shape[1], step):
        block = slice(start, start + step)
        wanted = scored[:, block]
        targets = ids[:, block][wanted]
        # In place, on the scores: a pass over this block costs as much as computing it.
        scores = states.positions(start, start + step).log_scores(head)[wanted].index_fill_(1, special, -torch.inf)
        chosen = scores.gather(1, targets[:, None])[:, 0]
        part = torch.zeros(2, len(chosen), device=ids.device)
        part[0] = scores.logsumexp(dim=1) - chosen - log_rest
        if candidates is not None:
            mask = candidates(before[:, block][wanted]).scatter_(1, targets[:, None], True)
            part[1] = scores.masked_fill_(mask.logical_not_(), -torch.inf).logsumexp(dim=1) - chosen
        parts.append(part)
    return torch.cat(parts, dim=1)
