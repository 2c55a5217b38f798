"""Bits per byte of text under a bound calibrator: the measure that is comparable across vocabularies.

Cross-entropy per token depends on how long tokens are; per byte of text it does not. Tokens without bytes (unknown
marks) are left out of both sums and counted, so that a lossy tokenizer cannot look good by not spelling the text.

Fusion asks the calibrator about a target's likeliest tokens only, so what it thinks of all others costs nothing there.
The figure "restricted to candidates" measures that: the likelihood of each token among a set of candidates,
renormalised over the set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibfuse.calibrator.binding import BoundCalibrator, GuideStates
from calibfuse.errors import DataError
from calibfuse.guide import CALIBRATOR_HEAD, SPECIAL_MASS

_BLOCK_ELEMENTS = 4_000_000  # of a [positions, vocabulary] block: bounds memory

# Ids of the tokens before [positions] (-1: a text begins) -> which tokens are candidates, bool [positions, vocabulary].
Candidates = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fidelity:
    """How well a head predicts text.

    Attributes:
        nats: total negative log-likelihood.
        bytes: of the scored tokens.
        tokens: scored.
        skipped: tokens without bytes.
        restricted_nats: the same sum with every distribution renormalised over the candidates; None: not asked for.
    """

    nats: float
    bytes: int
    tokens: int
    skipped: int
    restricted_nats: float | None = None

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte."""
        return self.nats / self.bytes / math.log(2)

    @property
    def restricted_bits_per_byte(self) -> float | None:
        """Bits per byte among the candidates."""
        return None if self.restricted_nats is None else self.restricted_nats / self.bytes / math.log(2)


class FrequentCandidates:
    """What a target would hold likely, by counts: the stand-in for its top-k where there is no target model.

    The candidates after a token are the tokens that followed it most often in some text of the tokenizer, and the
    tokens that are the most frequent of all.

    Args:
        sequences: token ids of the text that is counted.
        target_vocab_size: ids of the tokenizer.
        count: most followers of a token, and most frequent tokens.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], target_vocab_size: int, *, count: int) -> None:
        self.target_vocab_size = target_vocab_size
        previous = [-1, *(token for sequence in sequences for token in (*sequence, -1))][:-1]
        ids = np.array([token for sequence in sequences for token in (*sequence, -1)], dtype=np.int64)
        before = np.array(previous, dtype=np.int64)[ids >= 0]
        ids = ids[ids >= 0]
        frequencies = np.bincount(ids, minlength=target_vocab_size)
        self._frequent = torch.from_numpy(np.argsort(-frequencies, kind="stable")[:count].copy())
        pairs, pair_counts = np.unique((before + 1) * target_vocab_size + ids, return_counts=True)
        order = np.lexsort((-pair_counts, pairs // target_vocab_size))
        owners, followers = pairs[order] // target_vocab_size, pairs[order] % target_vocab_size
        starts = np.searchsorted(owners, np.arange(target_vocab_size + 2))
        kept = np.arange(len(owners)) - starts[owners] < count
        self._followers: NDArray[np.int64] = followers[kept]
        self._starts = np.searchsorted(owners[kept], np.arange(target_vocab_size + 2))

    def __call__(self, previous_ids: Tensor) -> Tensor:
        """See `Candidates`."""
        before = previous_ids.cpu().numpy() + 1
        counts = self._starts[before + 1] - self._starts[before]
        rows = np.repeat(np.arange(len(before)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = self._followers[np.repeat(self._starts[before], counts) + within]
        mask = torch.zeros(len(before), self.target_vocab_size, dtype=torch.bool)
        mask[:, self._frequent] = True
        mask[torch.from_numpy(rows), torch.from_numpy(columns)] = True
        return mask.to(previous_ids.device)


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

    Args:
        states: what is said before each token, [rows, positions].
        scored: bool [rows, positions].
        ids: int64 [rows, positions].
        before: likewise, the token before, -1 where a text begins.
        head: which distribution.
        candidates: see `measure_fidelity`.
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
