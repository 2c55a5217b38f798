"""Random cuts of tokens into two tokens of the same vocabulary: what BPE dropout does, for every kind of model.

The BPE dropout of `tokenizers` (Provilkov et al. 2020, arXiv 1910.13267) cannot be seeded, and is for BPE alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibfuse.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class SplitTable:
    """All ways to cut a token into two tokens of the same vocabulary, with weights."""

    counts: npt.NDArray[np.int64]  # [size], number of ways per token
    starts: npt.NDArray[np.int64]  # [size], first way of each token in the arrays below
    left: npt.NDArray[np.int64]  # [ways], id of the left half
    right: npt.NDArray[np.int64]  # [ways], id of the right half
    # [ways], cumulative share of the way within its token, ending at 1; shifted by the token id, so that the whole
    # array rises and one search serves all tokens
    cumulative: npt.NDArray[np.float64]

    @classmethod
    def of(cls, vocabulary: Vocabulary, unigram_counts: npt.NDArray[np.int64]) -> SplitTable:
        """Find the ways; one weighs the geometric mean of its halves' counts, as merges of common pieces come first."""
        tokens = [vocabulary.token_bytes(index) for index in range(len(vocabulary))]
        by_bytes: dict[bytes, int] = {}
        for index, token in enumerate(tokens):
            # Of equal byte strings (a letter and its byte token) the one that the text produces counts.
            if token and (token not in by_bytes or unigram_counts[index] > unigram_counts[by_bytes[token]]):
                by_bytes[token] = index
        ways = [
            (index, by_bytes[token[:cut]], by_bytes[token[cut:]])
            for index, token in enumerate(tokens)
            for cut in range(1, len(token))
            if token[:cut] in by_bytes and token[cut:] in by_bytes
        ]
        owner, heads, tails = np.asarray(ways, dtype=np.int64).reshape(-1, 3).T.copy()
        weights = np.sqrt((unigram_counts[heads] + 1.0) * (unigram_counts[tails] + 1.0))
        counts = np.bincount(owner, minlength=len(tokens)).astype(np.int64)
        starts = np.cumsum(counts) - counts
        totals = np.bincount(owner, weights=weights, minlength=len(tokens))
        running = np.cumsum(weights)
        before = np.concatenate([[0.0], running])[starts]
        share = (running - before[owner]) / totals[owner]
        return cls(counts=counts, starts=starts, left=heads, right=tails, cumulative=np.minimum(share, 1.0) + owner)

    def split_randomly(
        self, ids: npt.NDArray[np.int64], rate: float, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Cut a share of the tokens in two: ids, and for each the place in `ids` that it comes from."""
        draws, choices = rng.random(len(ids)), rng.random(len(ids))
        is_cut = (draws < rate) & (self.counts[ids] > 0)
        cut_ids = ids[is_cut]
        way = np.searchsorted(self.cumulative, cut_ids + choices[is_cut], side="left")
        # Rounding of the shifted shares may point one way outside the token's own.
        way = np.clip(way, self.starts[cut_ids], self.starts[cut_ids] + self.counts[cut_ids] - 1)
        sources = np.repeat(np.arange(len(ids)), 1 + is_cut)
        first = np.flatnonzero(np.concatenate([[True], np.diff(sources) > 0])) if len(ids) else sources
        result = ids[sources]
        result[first[is_cut]] = self.left[way]
        result[first[is_cut] + 1] = self.right[way]
        return result, sources
