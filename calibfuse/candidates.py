"""The target's candidates: which of its tokens fusion may re-rank, and how to find them cheaply.

By probability: 200 tokens hold nearly all that a sure target would say, and miss a sixth of what an unsure one says.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIN_PROBABILITY = 5e-5  # by default every token that the target gives at least this is a candidate, ...
MIN_CANDIDATES = 200  # ... and this many of its best in any case
# A log-probability below this is that of an excluded token, however that was written: its probability is 0 in float32.
EXCLUDED = -103.0
_STEP_DOWN = 4.0  # nats


class Candidates(NamedTuple):
    """The candidates of some rows."""

    # int64 [..., k], in no order; with `places` int64 [n], those of one row after those of another. None: all tokens
    # were looked at, and the last axis is the vocabulary.
    token_ids: Tensor | None
    log_probs: Tensor  # float32, the target's, of these tokens; same shape
    is_candidate: Tensor | None  # bool, likewise; None: all are
    places: Tensor | None = None  # int64 [n], the row of each over all leading axes; None: rows have axes of their own


def choose_candidates(
    scores: Tensor,
    count: int | None,
    always: Tensor | None = None,
    *,
    as_list: bool = False,
    log_sums: Tensor | None = None,
) -> Candidates:
    """Choose the candidates of each row, whatever the others are; a token that the target excludes is none.

    Args:
        scores: float32 [..., target_vocab_size], log-probabilities in nats.
        count: how many of the best; 0: the whole vocabulary; None: all of MIN_PROBABILITY or more, and the best
            MIN_CANDIDATES.
        always: int64 [n], ids that are candidates whatever their probability: an unsure target draws from its tail.
        as_list: give those by probability as a list, as many of each row as it has; on a CPU.
        log_sums: float32 [..., 1], for such a list: what is to be subtracted from scores that are not normalised.
    """
    vocab_size = scores.shape[-1]
    if count is None and as_list and scores.numel():
        return _listed(scores, always, log_sums)
    log_probs = scores if log_sums is None else scores - log_sums
    if count == 0 or vocab_size <= (MIN_CANDIDATES if count is None else count) or not scores.numel():
        return Candidates(None, log_probs, log_probs > EXCLUDED)
    if count is not None:
        values, token_ids = log_probs.topk(count, dim=-1, sorted=False)
        return Candidates(token_ids, values, values > EXCLUDED)
    # On an accelerator counting would make the host wait, and a full head costs nothing.
    searched = _raised(log_probs, always)
    least = searched.topk(MIN_CANDIDATES, dim=-1).values[..., -1:]
    return Candidates(None, log_probs, searched >= least.clamp(EXCLUDED, math.log(MIN_PROBABILITY)))


def _raised(log_probs: Tensor, always: Tensor | None) -> Tensor:
    """The log-probabilities, those of `always` at least what makes a candidate."""
    if always is None or not len(always):
        return log_probs
    raised = log_probs.clone()
    own = raised[..., always]
    raised[..., always] = torch.where(own > EXCLUDED, own.clamp(min=math.log(MIN_PROBABILITY)), own)
    return raised


def _listed(scores: Tensor, always: Tensor | None, log_sums: Tensor | None) -> Candidates:
    """By NumPy, which compares and finds several times as fast as torch does on a CPU."""
    vocab_size = scores.shape[-1]
    rows = scores.detach().reshape(-1, vocab_size).numpy()
    sums = np.zeros((len(rows), 1), np.float32) if log_sums is None else log_sums.reshape(-1, 1).numpy()
    mask = rows >= sums + np.float32(math.log(MIN_PROBABILITY))
    if always is not None and len(always):
        mask[:, always.numpy()] |= rows[:, always.numpy()] > sums + EXCLUDED
    for chosen, row, log_sum in zip(mask, rows, sums[:, 0], strict=True):
        if np.count_nonzero(chosen) < MIN_CANDIDATES:
            _fill_up(chosen, row, log_sum)
    flat = np.flatnonzero(mask)
    counts = np.diff(np.searchsorted(flat, np.arange(len(rows) + 1) * vocab_size))
    places = torch.from_numpy(np.repeat(np.arange(len(rows)), counts))
    values = scores.reshape(-1).index_select(0, torch.from_numpy(flat))
    if log_sums is not None:
        values = values - log_sums.reshape(-1).index_select(0, places)
    return Candidates(torch.from_numpy(flat) - places * vocab_size, values, None, places)


def _fill_up(chosen: NDArray[np.bool_], row: NDArray[np.float32], log_sum: float) -> None:
    """Choose the best of a row's other tokens until there are MIN_CANDIDATES, as far as they are not excluded."""
    log_prob, found = math.log(MIN_PROBABILITY), np.zeros(0, np.int64)
    while len(found) < MIN_CANDIDATES and log_prob > EXCLUDED:
        log_prob -= _STEP_DOWN
        found = np.flatnonzero(row > log_sum + max(log_prob, EXCLUDED))
    others = found[~chosen[found]]
    missing = MIN_CANDIDATES - np.count_nonzero(chosen)
    if len(others) > missing:
        others = others[np.argpartition(-row[others], missing - 1)[:missing]]
    chosen[others] = True
