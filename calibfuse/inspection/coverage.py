"""What of a target's vocabulary a calibrator covers, and how well it predicts text that is cut into its tokens.

Counts of ids say little: what matters is how much of real text the covered tokens carry, and how many bits per byte the
calibrator needs for it. Bits per byte are comparable across vocabularies, see calibfuse/bits_per_byte.py.

"Covered" is what the calibrator has something to say about: for the universal calibrator every id with text, for a
causal language model that is projected onto another vocabulary every id whose bytes its own tokens can spell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibfuse.errors import DataError
from calibfuse.guide import VALUE_HEAD, Guide
from calibfuse.vocabulary import Vocabulary

_BLOCK_ELEMENTS = 4_000_000  # of a [positions, vocabulary] block: bounds memory


@dataclass(frozen=True)
class VocabularyReport:
    """What a vocabulary is made of.

    Attributes:
        name: where it came from.
        fingerprint: of its bytes.
        size: ids, holes included.
        special: ids without text (begin, end, padding, chat marks, holes): never moved by fusion.
        duplicates: ids whose bytes an earlier id has too.
        partial: ids that are no whole UTF-8 text (parts of characters).
        longest: bytes of the longest token.
        unspelled: ids with text that the calibrator cannot spell: not covered either.
    """

    name: str
    fingerprint: str
    size: int
    special: int
    duplicates: int
    partial: int
    longest: int
    unspelled: int = 0

    @property
    def covered(self) -> int:
        """Ids that the calibrator has something to say about."""
        return self.size - self.special - self.unspelled

    @property
    def coverage(self) -> float:
        """Share of the ids that are covered, in [0, 1]."""
        return self.covered / self.size

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {**asdict(self), "covered": self.covered, "coverage": self.coverage}


@dataclass(frozen=True)
class TextReport:
    """How a bound calibrator fits a text.

    Attributes:
        passages: token sequences, each scored from an empty context.
        tokens: scored tokens.
        bytes: of the scored tokens.
        skipped: tokens of the text that are not covered (unknown marks), left out of all sums.
        distinct: different tokens that were scored.
        bits_per_byte: by head.
    """

    passages: int
    tokens: int
    bytes: int
    skipped: int
    distinct: int
    bits_per_byte: Mapping[str, float]

    @property
    def covered_mass(self) -> float:
        """Share of the text's tokens that are covered, in [0, 1]."""
        return self.tokens / (self.tokens + self.skipped)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {**asdict(self), "covered_mass": self.covered_mass}


def report_vocabulary(vocabulary: Vocabulary, bound: Guide | None = None) -> VocabularyReport:
    """Count what a vocabulary is made of.

    Args:
        vocabulary: of the target.
        bound: the calibrator that covers it; None: one that covers every id with text.

    Returns:
        The counts.
    """
    texts = [each for each in map(vocabulary.token_bytes, range(len(vocabulary))) if each]
    unspelled = 0
    if bound is not None:
        covered = bound.covers(torch.arange(len(vocabulary), device=bound.device)).cpu().numpy()
        unspelled = int((~covered & ~vocabulary.is_special).sum())
    return VocabularyReport(
        name=vocabulary.name,
        fingerprint=vocabulary.fingerprint,
        size=len(vocabulary),
        special=int(np.count_nonzero(vocabulary.is_special)),
        duplicates=len(texts) - len(set(texts)),
        partial=sum(text.decode("utf-8", errors="ignore").encode() != text for text in texts),
        longest=max(map(len, texts)),
        unspelled=unspelled,
    )


def report_text(bound: Guide, sequences: Sequence[Sequence[int]]) -> TextReport:
    """Score a text that is cut into the target's tokens.

    Args:
        bound: the calibrator over the vocabulary of the ids.
        sequences: token ids of passages, without special tokens.

    Returns:
        The report.

    Raises:
        DataError: no sequence has a token with bytes.
        VocabularyMismatchError: an id is outside the vocabulary.
    """
    lengths = np.diff(bound.vocabulary.offsets)
    passages = [torch.as_tensor(each, dtype=torch.int64, device=bound.device) for each in sequences if len(each)]
    nats = {head: 0.0 for head in bound.heads if head != VALUE_HEAD}
    scored: list[int] = []
    for ids in passages:
        covered = bound.covers(ids)
        scored += ids[covered].tolist()
        for head, values in zip(nats, _surprise(bound, ids, list(nats)), strict=True):
            nats[head] += float(values[covered].double().sum())
    if not scored:
        raise DataError("There is no text to measure: expected at least one passage with a token that has bytes.")
    byte_count = int(lengths[scored].sum())
    return TextReport(
        passages=len(passages),
        tokens=len(scored),
        bytes=byte_count,
        skipped=sum(map(len, passages)) - len(scored),
        distinct=len(set(scored)),
        bits_per_byte={head: total / byte_count / math.log(2) for head, total in nats.items()},
    )


@torch.no_grad()
def _surprise(bound: Guide, ids: Tensor, heads: Sequence[str]) -> list[Tensor]:
    """Negative log-probability of every token of one sequence, the first included: float32 [length] for each head."""
    said = bound.sequence(ids[None])
    step = max(1, _BLOCK_ELEMENTS // bound.target_vocab_size)
    parts: dict[str, list[Tensor]] = {head: [-bound.first_log_probs(head)[ids[:1]]] for head in heads}
    for start in range(0, len(ids) - 1, step):
        stop = min(start + step, len(ids) - 1)
        states = said.positions(start, stop)  # all heads of a block at once: a projection reads the text for each block
        for head in heads:
            log_probs = bound.normalise(states.log_scores(head)[0])
            parts[head].append(-log_probs.gather(1, ids[start + 1 : stop + 1, None])[:, 0])
    return [torch.cat(parts[head]) for head in heads]
