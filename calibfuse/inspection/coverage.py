"""What of a target's vocabulary a calibrator covers, and how well it predicts text that is cut into its tokens.

Counts of ids say little: what matters is how much of real text the covered tokens carry, and how many bits per byte the
calibrator needs for it. Bits per byte are comparable across vocabularies, see calibfuse/bits_per_byte.py.

"Covered" is what the calibrator has something to say about: for the universal calibrator every id with text, for a
causal language model that is projected onto another vocabulary every id whose bytes its own tokens can spell.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from calibfuse.errors import DataError
from calibfuse.guide import CALIBRATOR_HEAD, VALUE_HEAD
from calibfuse.inspection.spelling import bytes_label
from calibfuse.vocabulary import Vocabulary

if TYPE_CHECKING:
    from calibfuse.guide import Guide

# A calibrator over one target vocabulary, of any kind.
BoundGuide: TypeAlias = "Guide"

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
class TokenFit:
    """How well one token is predicted where the text has it.

    Attributes:
        token_id: its id.
        text: as people read it.
        count: times it was scored.
        nats: mean negative log-probability.
        bytes: its length.
    """

    token_id: int
    text: str
    count: int
    nats: float
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Mean bits per byte of the token."""
        return self.nats / self.bytes / math.log(2)


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
        worst: the tokens with the highest mean surprise in bits per byte under the non-toxic head, among those that
            were scored often enough.
    """

    passages: int
    tokens: int
    bytes: int
    skipped: int
    distinct: int
    bits_per_byte: Mapping[str, float]
    worst: tuple[TokenFit, ...]

    @property
    def covered_mass(self) -> float:
        """Share of the text's tokens that are covered, in [0, 1]."""
        return self.tokens / (self.tokens + self.skipped)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        worst = [{**asdict(token), "bits_per_byte": token.bits_per_byte} for token in self.worst]
        return {**asdict(self), "worst": worst, "covered_mass": self.covered_mass}


def report_vocabulary(vocabulary: Vocabulary, bound: BoundGuide | None = None) -> VocabularyReport:
    """Count what a vocabulary is made of.

    Args:
        vocabulary: of the target.
        bound: the calibrator that covers it; None: one that covers every id with text.

    Returns:
        The counts.
    """
    tokens = [vocabulary.token_bytes(token_id) for token_id in range(len(vocabulary))]
    texts = [token for token in tokens if token]
    return VocabularyReport(
        name=vocabulary.name,
        fingerprint=vocabulary.fingerprint,
        size=len(vocabulary),
        special=int(np.count_nonzero(vocabulary.is_special)),
        duplicates=len(texts) - len(set(texts)),
        partial=sum(not _is_text(token) for token in texts),
        longest=max(map(len, texts)),
        unspelled=0 if bound is None else _count_unspelled(vocabulary, bound),
    )


def _count_unspelled(vocabulary: Vocabulary, bound: BoundGuide) -> int:
    """Ids with text that the calibrator does not cover."""
    covered = bound.covers(torch.arange(len(vocabulary), device=bound.device)).cpu().numpy()
    return int((~covered & ~vocabulary.is_special).sum())


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def report_text(
    bound: BoundGuide, sequences: Sequence[Sequence[int]], *, worst: int = 20, min_count: int = 3
) -> TextReport:
    """Score a text that is cut into the target's tokens.

    Args:
        bound: the calibrator over the vocabulary of the ids.
        sequences: token ids of passages, without special tokens.
        worst: how many of the worst predicted tokens are listed.
        min_count: a token is listed from so many occurrences; lowered to 1 where no token has them.

    Returns:
        The report.

    Raises:
        DataError: no sequence has a token with bytes.
        VocabularyMismatchError: an id is outside the vocabulary.
    """
    lengths = np.diff(bound.vocabulary.offsets)
    counts: Counter[int] = Counter()
    nats_of: dict[int, float] = {}
    totals = {head: 0.0 for head in bound.heads if head != VALUE_HEAD}
    skipped = 0
    for sequence in sequences:
        if not len(sequence):
            continue
        ids = torch.as_tensor(sequence, dtype=torch.int64, device=bound.device)
        surprise = _surprise(bound, ids, list(totals))  # (heads, length)
        covered = bound.covers(ids).tolist()
        for head, values in zip(totals, surprise, strict=True):
            for token_id, value, is_covered in zip(ids.tolist(), values.tolist(), covered, strict=True):
                if not is_covered:
                    continue
                totals[head] += value
                if head == CALIBRATOR_HEAD:
                    counts[token_id] += 1
                    nats_of[token_id] = nats_of.get(token_id, 0.0) + value
        skipped += covered.count(False)
    if not counts:
        raise DataError("There is no text to measure: expected at least one passage with a token that has bytes.")
    byte_count = sum(int(lengths[token_id]) * count for token_id, count in counts.items())
    least = min(min_count, max(counts.values()))
    fits = [
        TokenFit(
            token_id,
            bytes_label(bound.vocabulary.token_bytes(token_id)),
            count,
            nats_of[token_id] / count,
            int(lengths[token_id]),
        )
        for token_id, count in counts.items()
        if count >= least
    ]
    fits.sort(key=lambda fit: (-fit.bits_per_byte, fit.token_id))
    return TextReport(
        passages=sum(1 for sequence in sequences if len(sequence)),
        tokens=sum(counts.values()),
        bytes=byte_count,
        skipped=skipped,
        distinct=len(counts),
        bits_per_byte={head: total / byte_count / math.log(2) for head, total in totals.items()},
        worst=tuple(fits[:worst]),
    )


@torch.no_grad()
def _surprise(bound: BoundGuide, ids: Tensor, heads: Sequence[str]) -> list[Tensor]:
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
