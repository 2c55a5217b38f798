"""The target's candidates: which of its tokens fusion may re-rank, and how to find them cheaply.

By default they go by probability: 200 tokens hold nearly everything that a sure target would say, and miss a sixth of
what an unsure one says.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MIN_PROBABILITY = 5e-5  # by default every token that the target gives at least this is a candidate, ...
MIN_CANDIDATES = 200  # ... and this many of its best in any case
# A log-probability below this is that of an excluded token, however that was written: its probability is 0 in float32.
EXCLUDED = -103.0
_BLOCK = 16  # entries of a row that are searched as one


class Candidates(NamedTuple):
    """The candidates of some rows."""

    # int64 [..., k], in no order; with `places` int64 [n], those of one row after those of another. None: all tokens
    # were looked at, and the last axis is the vocabulary.
    token_ids: Tensor | None
    log_probs: Tensor  # float32, the target's, of these tokens; same shape
    is_candidate: Tensor | None  # bool, likewise; None: all are
    places: Tensor | None = None  # int64 [n], the row of each over all leading axes; None: rows have axes of their own


def choose_candidates(
    log_probs: Tensor, count: int | None, always: Tensor | None = None, *, as_list: bool = False
) -> Candidates:
    """Choose the candidates of each row. A token that the target excludes is none, however exclusion is written.

    Args:
        log_probs: float32 [..., target_vocab_size], normalised, nats.
        count: how many of the best; 0: the whole vocabulary; None: all of MIN_PROBABILITY or more, and the best
            MIN_CANDIDATES.
        always: int64 [n], ids below target_vocab_size that are candidates by probability whatever theirs is, unless it
            is 0: an unsure target draws now and then from its tail, and some tokens are not to be met there.
        as_list: give those by probability as a list, as many of each row as it has. It makes the host wait.

    Returns:
        The candidates. What they are does not depend on the other rows (but for ties at the last place), how they are
        laid out does.
    """
    vocab_size = log_probs.shape[-1]
    if count == 0 or vocab_size <= (MIN_CANDIDATES if count is None else count) or not log_probs.numel():
        return Candidates(None, log_probs, log_probs > EXCLUDED)
    if count is not None:
        values, token_ids = best(log_probs, count)
        return Candidates(token_ids, values, values > EXCLUDED)
    if as_list:
        return _listed(log_probs, always)
    # On an accelerator counting would make the host wait, and a full head costs nothing.
    searched = _raised(log_probs, always)
    least = best(searched, MIN_CANDIDATES)[0].amin(dim=-1, keepdim=True)
    return Candidates(None, log_probs, searched >= least.clamp(EXCLUDED, math.log(MIN_PROBABILITY)))


def _raised(log_probs: Tensor, always: Tensor | None) -> Tensor:
    """The log-probabilities, those of `always` at least what makes a candidate."""
    if always is None or not len(always):
        return log_probs
    raised = log_probs.clone()
    own = raised[..., always]
    raised[..., always] = torch.where(own > EXCLUDED, own.clamp(min=math.log(MIN_PROBABILITY)), own)
    return raised


def _listed(log_probs: Tensor, always: Tensor | None) -> Candidates:
    vocab_size = log_probs.shape[-1]
    rows = log_probs.reshape(-1, vocab_size)
    mask = rows.detach() >= math.log(MIN_PROBABILITY)
    if always is not None and len(always):
        mask[:, always] |= rows.detach()[:, always] > EXCLUDED
    flat = _nonzero(mask)
    places = flat.div(vocab_size, rounding_mode="floor")
    short = (torch.bincount(places, minlength=len(rows)) < MIN_CANDIDATES).nonzero()[:, 0]
    if len(short):
        values, chosen = best(_raised(rows.detach()[short], always), MIN_CANDIDATES)
        mask[short] = False
        mask[short[:, None], chosen] = values > EXCLUDED
        flat = _nonzero(mask)
        places = flat.div(vocab_size, rounding_mode="floor")
    token_ids, values = flat - places * vocab_size, rows.reshape(-1).index_select(0, flat)
    if len(rows) == 1:  # one row needs no list
        shape = (*log_probs.shape[:-1], len(flat))
        return Candidates(token_ids.view(shape), values.view(shape), None)
    return Candidates(token_ids, values, None, places)


def _nonzero(mask: Tensor) -> Tensor:
    """Where a mask is True, counted over all axes: int64 [n]; NumPy finds them several times as fast on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]


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
