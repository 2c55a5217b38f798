"""Passages -> packed training batches over one tokenizer's vocabulary.

A batch holds rows of tokens, each row beginning with the document boundary; a passage that a row cuts goes on in the
next one. The softmax of a large vocabulary is estimated on a subset: all targets of the batch and the most frequent
tokens count for themselves, a uniform draw stands for the rest, with log(rest / drawn) added to its scores.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from calibfuse.calibrator.composer import TokenFeatures, token_features
from calibfuse.errors import DataError
from calibfuse.training.config import TrainingConfig
from calibfuse.training.data import PassageStore
from calibfuse.training.tokenizers.pool import PoolEntry, TokenizerPool
from calibfuse.training.words.balance import balance_terms
from calibfuse.training.words.neutral_sentences import neutral_passage
from calibfuse.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

BOUNDARY = -1
IGNORE = -100
_ENCODE_CHUNK = 16  # passages tokenized at a time
_NEGATIVES_SAMPLE_BYTES = 8_000_000


@dataclass(frozen=True)
class TrainingBatch:
    """One batch."""

    features: TokenFeatures  # of the tokens that occur in it or are candidates ("local" tokens)
    inputs: Tensor  # int64 [rows, sequence_length], local token index, or BOUNDARY
    targets: Tensor  # int64 [rows, sequence_length], index into `candidates`, or IGNORE where a boundary follows
    is_non_toxic: Tensor  # bool [rows, sequence_length], whether the target belongs to a non-toxic passage
    candidates: Tensor  # int64 [candidates], local token indices of the softmax
    log_weights: Tensor  # float32 [candidates], added to their scores: see `BatchVocabulary.draw_candidates`
    target_bytes: int  # of all targets

    def rows(self, start: int, stop: int) -> TrainingBatch:
        """The same batch with some of its rows: what one of several processes works on."""
        part = slice(start, stop)
        return replace(self, inputs=self.inputs[part], targets=self.targets[part], is_non_toxic=self.is_non_toxic[part])

    def to(self, device: torch.device) -> TrainingBatch:
        """The same batch on a device; features stay in numpy."""
        names = ("inputs", "targets", "is_non_toxic", "candidates", "log_weights")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


class BatchVocabulary:
    """One tokenizer's vocabulary, ready to draw candidates from."""

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

        That is the log of how many tokens each stands for, and the log of its share among ids with equal bytes: the
        model is to learn the probability of the bytes.
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
    passages: Iterator[tuple[Sequence[int], bool]], *, batch_size: int, sequence_length: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Fill rows with tokenized passages, (token ids, is non-toxic), each row behind a BOUNDARY.

    Gives ids and flags [batch_size, sequence_length + 1]; when the passages run out, the rest is BOUNDARY.
    """
    width = sequence_length + 1
    ids = np.full((batch_size, width), BOUNDARY, dtype=np.int64)
    flags = np.zeros((batch_size, width), dtype=bool)
    row, column = 0, 1
    for tokens, is_non_toxic in passages:
        rest = np.asarray(tokens, dtype=np.int64)
        while len(rest) and row < batch_size:
            part = rest[: width - column]
            ids[row, column : column + len(part)] = part
            flags[row, column : column + len(part)] = is_non_toxic
            column += len(part) + 1  # one boundary after the passage
            rest = rest[len(part) :]
            if column >= width - 1:
                row, column = row + 1, 1
        if row >= batch_size:
            break
    return ids, flags


def make_batch(
    ids: NDArray[np.int64], is_non_toxic: NDArray[np.bool_], vocabulary: BatchVocabulary, rng: np.random.Generator
) -> TrainingBatch:
    """Turn packed rows into a batch."""
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


class BatchSource:
    """Endless training batches, as a function of the seed and a small state."""

    def __init__(
        self,
        store: PassageStore,
        pool: TokenizerPool,
        config: TrainingConfig,
        bucket_count: int,
        *,
        show_progress: bool = True,
    ) -> None:
        self.store, self.pool, self.config = store, pool, config
        self.balance = balance_terms(store, config.seed) if config.balance_identity_terms else None
        labels = store.labels[store.train_indices]
        if self.balance is not None:
            labels = labels[~self.balance.excluded[store.train_indices]]
        self._shares = {1: int((labels == 1).sum()), 0: int((labels == 0).sum())}
        if not self._shares[1]:
            raise DataError(
                "None of the training passages is wanted text, so there is nothing for the calibrator to learn from. "
                "Check the files of wanted text, or the scorer's threshold."
            )
        if not self._shares[0]:
            logger.warning(
                "No passage is unwanted: the two heads will learn the same, and mode contrast will do nothing."
            )
        self.cursors = {1: 0, 0: 0}
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._show_progress = show_progress
        sample = list(store.sample_texts(_NEGATIVES_SAMPLE_BYTES, config.seed))
        negatives = pool.negatives(config.vocabulary_size, sample, config.seed)
        self.vocabularies = [
            BatchVocabulary(
                entry.extended_vocabulary(negatives, config.vocabulary_size),
                entry.unigram_counts,
                bucket_count=bucket_count,
                candidate_count=config.candidate_count,
            )
            for entry in tqdm(
                pool, desc="preparing vocabularies", unit="tokenizer", leave=False, disable=not show_progress
            )
        ]

    def batch(self, step: int) -> TrainingBatch:
        """The batch of a step; advances the cursors."""
        config = self.config
        rng = np.random.default_rng([config.seed, 1, step])
        index = self.pool.draw(rng)
        passages = self._passages(self.pool[index], rng, split=rng.random() < 0.5)
        ids, flags = pack_rows(passages, batch_size=config.batch_size, sequence_length=config.sequence_length)
        return make_batch(ids, flags, self.vocabularies[index], rng)

    def _passages(
        self, entry: PoolEntry, rng: np.random.Generator, *, split: bool
    ) -> Iterator[tuple[Sequence[int], bool]]:
        """Tokenized passages; a passage counts as used when it is taken."""
        while True:
            drawn: list[tuple[int, bool]] = []
            texts: list[str] = []
            ahead = dict(self.cursors)
            for _ in range(_ENCODE_CHUNK):
                label = self._draw_label(rng)
                is_made = rng.random() < self.config.neutral_share
                drawn.append((label, is_made))
                if is_made:
                    texts.append(neutral_passage(rng))
                    continue
                texts.append(self.store.text(self._index_at(label, ahead[label])))
                ahead[label] += 1
            rows = entry.encode_batch(texts, split_rate=self.config.split_rate if split else 0.0, rng=rng)
            for (label, is_made), row in zip(drawn, rows, strict=True):
                self.cursors[label] += not is_made
                yield row, label == 1

    def _draw_label(self, rng: np.random.Generator) -> int:
        if not self._shares[0]:
            return 1
        return 0 if rng.random() < self.flagged_share else 1

    @property
    def flagged_share(self) -> float:
        """Share of the passages that are drawn from the unwanted ones, which only the reference reads."""
        if self.config.flagged_share is not None:
            return self.config.flagged_share
        return self._shares[0] / (self._shares[0] + self._shares[1])

    def _index_at(self, label: int, cursor: int) -> int:
        epoch, position = divmod(cursor, self._shares[label])
        if self._orders.get(label, (-1, None))[0] != epoch:
            order = self.store.permutation(epoch, self.config.seed, label)
            if self.balance is not None:
                order = order[~self.balance.excluded[order]]
            self._orders[label] = (epoch, order)
        return int(self._orders[label][1][position])
