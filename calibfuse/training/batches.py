"""Passages -> packed training batches over one tokenizer's vocabulary.

A batch holds rows of slots, each row beginning with the document boundary; passages follow one another with boundaries
between them, and a passage that a row cuts goes on in the next one. One tokenizer of the pool serves a whole batch.

The softmax of a large vocabulary is estimated on a subset of it: all targets of the batch and the tokenizer's most
frequent tokens count for themselves, a uniform draw stands for the rest, with log(rest / drawn) added to its scores.
The estimate of the partition function is unbiased, and the frequent tokens that dominate it are never left to chance.
So vocabularies of 200,000 tokens cost no more than small ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibfuse.calibrator.composer import TokenFeatures, token_features
from calibfuse.vocabulary import Vocabulary

BOUNDARY = -1
IGNORE = -100


@dataclass(frozen=True)
class TrainingBatch:
    """One batch.

    Attributes:
        features: of the tokens that occur in it or are candidates ("local" tokens).
        inputs: int64 [rows, slots], local token index, or BOUNDARY.
        targets: int64 [rows, slots], index into `candidates`, or IGNORE where the next slot is a boundary.
        is_non_toxic: bool [rows, slots], whether the target belongs to a non-toxic passage.
        candidates: int64 [candidates], local token indices of the softmax.
        log_weights: float32 [candidates], log of how many tokens of the vocabulary each stands for, plus the log of its
            share of the probability of its bytes.
        target_bytes: bytes of all targets.
    """

    features: TokenFeatures
    inputs: Tensor
    targets: Tensor
    is_non_toxic: Tensor
    candidates: Tensor
    log_weights: Tensor
    target_bytes: int

    def rows(self, start: int, stop: int) -> TrainingBatch:
        """The same batch with some of its rows: what one of several processes works on."""
        part = slice(start, stop)
        return replace(self, inputs=self.inputs[part], targets=self.targets[part], is_non_toxic=self.is_non_toxic[part])

    def to(self, device: torch.device) -> TrainingBatch:
        """The same batch on a device; features stay in numpy."""
        names = ("inputs", "targets", "is_non_toxic", "candidates", "log_weights")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


class BatchVocabulary:
    """One tokenizer's vocabulary, ready to draw candidates from.

    Args:
        vocabulary: with the negatives appended.
        counts: int64 [at most len(vocabulary)], how often each id occurred in the training sample.
        bucket_count: rows of the composer's table.
        candidate_count: size of the softmax subset; vocabularies up to this size are used whole.
    """

    def __init__(
        self, vocabulary: Vocabulary, counts: NDArray[np.int64], *, bucket_count: int, candidate_count: int
    ) -> None:
        self.vocabulary = vocabulary
        self.features = token_features(vocabulary.data, vocabulary.offsets, bucket_count)
        self.covered_ids = np.flatnonzero(~vocabulary.is_special)
        self.candidate_count = candidate_count
        full = np.zeros(len(vocabulary), dtype=np.int64)
        full[: len(counts)] = counts
        full[vocabulary.is_special] = -1
        self.frequent_ids = np.argsort(-full, kind="stable")[: min(candidate_count // 4, len(self.covered_ids))]

    def draw_candidates(
        self, target_ids: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Token ids of the softmax subset and what is added to their scores.

        That is the log of how many tokens each stands for, and for ids with equal bytes the log of their share, as
        binding adds it: the model is to learn the probability of the bytes.
        """
        shares = self.vocabulary.log_shares
        if len(self.covered_ids) <= self.candidate_count:
            return self.covered_ids, shares[self.covered_ids]
        certain = np.union1d(target_ids, self.frequent_ids)
        wanted = max(self.candidate_count - len(certain), self.candidate_count // 4)
        is_rest = ~self.vocabulary.is_special
        is_rest[certain] = False
        rest = np.flatnonzero(is_rest)
        if len(rest) <= wanted:
            return self.covered_ids, shares[self.covered_ids]
        drawn = rng.choice(rest, size=wanted, replace=False, shuffle=False)
        candidates = np.concatenate([certain, drawn])
        log_weights = shares[candidates]
        log_weights[len(certain) :] += np.float32(np.log(len(rest) / wanted))
        return candidates, log_weights


def pack_rows(
    passages: Iterator[tuple[Sequence[int], bool]], *, rows: int, slots: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Fill rows with tokenized passages.

    Args:
        passages: (token ids, is non-toxic), as many as needed.
        rows: number of rows.
        slots: inputs per row; each row gets slots + 1 entries.

    Returns:
        ids [rows, slots + 1], BOUNDARY at the start of rows and passages, and the non-toxic flag of every entry. When
        the passages run out, the rest is BOUNDARY.
    """
    width = slots + 1
    ids = np.full((rows, width), BOUNDARY, dtype=np.int64)
    flags = np.zeros((rows, width), dtype=bool)
    row, column = 0, 1
    for tokens, is_non_toxic in passages:
        rest = np.asarray(tokens, dtype=np.int64)
        while len(rest) and row < rows:
            part = rest[: width - column]
            ids[row, column : column + len(part)] = part
            flags[row, column : column + len(part)] = is_non_toxic
            column += len(part) + 1  # one boundary after the passage
            rest = rest[len(part) :]
            if column >= width - 1:
                row, column = row + 1, 1
        if row >= rows:
            break
    return ids, flags


def make_batch(
    ids: NDArray[np.int64], is_non_toxic: NDArray[np.bool_], vocabulary: BatchVocabulary, rng: np.random.Generator
) -> TrainingBatch:
    """Turn packed rows into a batch.

    Args:
        ids: [rows, slots + 1] of `pack_rows`.
        is_non_toxic: likewise.
        vocabulary: of the tokenizer that made the ids.
        rng: for the candidates.
    """
    special = vocabulary.vocabulary.is_special
    ids = np.where((ids >= 0) & special[np.maximum(ids, 0)], BOUNDARY, ids)  # an unknown-token mark has no bytes
    inputs, targets = ids[:, :-1], ids[:, 1:]
    target_ids = np.unique(targets[targets >= 0])
    candidates, log_weights = vocabulary.draw_candidates(target_ids, rng)
    local_ids = np.union1d(candidates, np.unique(inputs[inputs >= 0]))
    local_of = np.full(len(vocabulary.vocabulary), -1, dtype=np.int64)
    local_of[local_ids] = np.arange(len(local_ids))
    slot_of = np.full(len(vocabulary.vocabulary), IGNORE, dtype=np.int64)
    slot_of[candidates] = np.arange(len(candidates))
    return TrainingBatch(
        features=vocabulary.features.take(local_ids),
        inputs=torch.from_numpy(np.where(inputs >= 0, local_of[np.maximum(inputs, 0)], BOUNDARY)),
        targets=torch.from_numpy(np.where(targets >= 0, slot_of[np.maximum(targets, 0)], IGNORE)),
        is_non_toxic=torch.from_numpy(is_non_toxic[:, 1:] & (targets >= 0)),
        candidates=torch.from_numpy(local_of[candidates]),
        log_weights=torch.from_numpy(log_weights),
        target_bytes=int(np.diff(vocabulary.vocabulary.offsets)[targets[targets >= 0]].sum()),
    )
