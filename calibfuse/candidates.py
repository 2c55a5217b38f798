"""The target's candidates: which of its tokens fusion may re-rank, and how to find them cheaply.

Truncating by the target first bounds the loss of fluency and the cost of the guide's head (design lesson 2). A fixed
number does not fit both a sure and an unsure target: 200 tokens hold nearly everything that a sure one would say, and
miss a sixth of what an unsure one says (docs/results.md). So the default goes by probability, and a fixed number is an
option.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MIN_PROBABILITY = 5e-5
"""By default every token that the target gives at least this probability is a candidate, ..."""
MIN_CANDIDATES = 200
"""... and this many of its best in any case."""

_BLOCK = 16  # entries of a row that are searched as one


class Candidates(NamedTuple):
    """The candidates of some rows.

    Attributes:
        token_ids: int64 [..., k], in no order; None: all tokens were looked at, and the last axis is the vocabulary.
        log_probs: float32 [..., k], the target's, of these tokens.
        is_candidate: bool [..., k], False for the tokens that are there only because another row has more; None: all
            are.
    """

    token_ids: Tensor | None
    log_probs: Tensor
    is_candidate: Tensor | None


def choose_candidates(log_probs: Tensor, count: int | None, always: Tensor | None = None) -> Candidates:
    """Choose the candidates of each row.

    Args:
        log_probs: float32 [..., target_vocab_size], normalised, nats.
        count: how many of the best; 0: the whole vocabulary; None: all of MIN_PROBABILITY or more, and the best
            MIN_CANDIDATES.
        always: int64 [n], ids below target_vocab_size that are candidates by probability whatever theirs is, unless it
            is 0: an unsure target draws now and then from its tail, and some tokens are not to be met there.

    Returns:
        The candidates. What they are does not depend on the other rows (but for ties at the last place), how they are
        laid out does.
    """
    vocab_size = log_probs.shape[-1]
    if count == 0 or vocab_size <= (MIN_CANDIDATES if count is None else count):
        return Candidates(None, log_probs, None)
    if count is not None:
        values, token_ids = best(log_probs, count)
        return Candidates(token_ids, values, None)
    if always is None or not len(always):
        return _by_probability(log_probs)
    searched = log_probs.clone()
    own = searched[..., always]
    searched[..., always] = torch.where(own > -torch.inf, own.clamp(min=math.log(MIN_PROBABILITY)), own)
    found = _by_probability(searched)
    values = log_probs if found.token_ids is None else log_probs.gather(-1, found.token_ids)
    return Candidates(found.token_ids, values, found.is_candidate)


def _by_probability(log_probs: Tensor) -> Candidates:
    vocab_size = log_probs.shape[-1]
    rows = log_probs.numel() // vocab_size
    enough = math.log(MIN_PROBABILITY)
    if log_probs.device.type != "cpu":
        # counting would make the host wait, and a full head costs an accelerator nothing
        return Candidates(None, log_probs, log_probs >= _least(log_probs).clamp(max=enough))
    if not rows:
        return Candidates(None, log_probs, None)
    is_candidate = log_probs >= enough
    counts = is_candidate.sum(dim=-1)
    width = max(int(counts.max()), MIN_CANDIDATES)
    # Gathering a row of the head costs 0.27 us, streaming past one 0.12 us and 0.0175 us for each row of scores.
    is_few = 16 * rows * width <= vocab_size * (7 + rows)
    if is_few and width == MIN_CANDIDATES:  # a sure target
        values, token_ids = best(log_probs, width)
        return Candidates(token_ids, values, None)
    is_short = counts < MIN_CANDIDATES
    if bool(is_short.any()):
        is_candidate = log_probs >= torch.where(is_short[..., None], _least(log_probs), enough)
    return _listed(log_probs, is_candidate) if is_few else Candidates(None, log_probs, is_candidate)


def _listed(log_probs: Tensor, is_candidate: Tensor) -> Candidates:
    """The candidates as ids. Rows with fewer than the others are filled up with the first tokens that are none."""
    vocab_size = log_probs.shape[-1]
    mask = is_candidate.reshape(-1, vocab_size)
    counts = mask.sum(dim=-1)
    width = int(counts.max())
    missing = width - counts
    listed = mask
    if bool(missing.any()):
        # Of the first 2 * width tokens at least `width` are no candidates.
        others = ~mask[:, : 2 * width]
        listed = mask.clone()
        listed[:, : 2 * width] |= others & (others.cumsum(dim=-1, dtype=torch.int32) <= missing[:, None])
    shape = (*log_probs.shape[:-1], width)
    token_ids = listed.nonzero()[:, 1].reshape(shape)
    kept = None if listed is mask else is_candidate.gather(-1, token_ids)
    return Candidates(token_ids, log_probs.gather(-1, token_ids), kept)


def _least(values: Tensor) -> Tensor:
    """[..., 1], the least of the best MIN_CANDIDATES of each row."""
    return best(values, MIN_CANDIDATES)[0].amin(dim=-1, keepdim=True)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of each row, in no order, with their indices: `topk`, several times as fast on wide rows.

    The row is seen as blocks (a strided comb of _BLOCK entries each). Fewer than `count` blocks have a maximum above
    the count-th best entry, so the best `count` blocks hold all of the best entries, and only these are searched.
    """
    blocks = scores.shape[-1] // _BLOCK
    if blocks < 2 * count:
        values, index = scores.topk(count, dim=-1, sorted=False)
        return values, index
    combed = scores[..., : blocks * _BLOCK].reshape(*scores.shape[:-1], _BLOCK, blocks)
    found = combed.amax(dim=-2).topk(count, dim=-1, sorted=False).indices
    teeth = torch.arange(0, blocks * _BLOCK, blocks, device=scores.device)
    rest = torch.arange(blocks * _BLOCK, scores.shape[-1], device=scores.device)
    index = torch.cat([(found[..., None, :] + teeth[:, None]).flatten(-2), rest.expand(*found.shape[:-1], -1)], dim=-1)
    values, chosen = scores.gather(-1, index).topk(count, dim=-1, sorted=False)
    return values, index.gather(-1, chosen)
