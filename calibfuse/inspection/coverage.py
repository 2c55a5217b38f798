"""What a calibrator is, what of a vocabulary it covers, and how well it predicts text cut into that vocabulary.

"Covered" is what it has something to say about: for the universal calibrator every id with text, for a causal language
model that is projected onto another vocabulary every id whose bytes its own tokens can spell.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibfuse.errors import DataError
from calibfuse.guide import VALUE_HEAD, Guide
from calibfuse.loading import PretrainedCalibrator
from calibfuse.vocabulary import Vocabulary

_BLOCK_ELEMENTS = 4_000_000  # of a [positions, vocabulary] block: bounds memory


@dataclass(frozen=True)
class CalibratorMetadata:
    """What one calibrator is."""

    fingerprint: str  # hex SHA-256 of shape and weights; the key of everything derived from them
    heads: tuple[str, ...]
    parameters: Mapping[str, int]  # number of parameters of each part, by name
    bytes_in_memory: int  # of the weights as loaded
    shape: Mapping[str, int]  # sizes of its config
    fusion: Mapping[str, Any]  # recommended options of fusion; what is missing is FusionConfig's default
    training: Mapping[str, Any]  # what its trainer noted

    @property
    def parameter_count(self) -> int:
        """Parameters of all parts."""
        return sum(self.parameters.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {**asdict(self), "heads": list(self.heads), "parameter_count": self.parameter_count}


def describe_calibrator(calibrator: PretrainedCalibrator) -> CalibratorMetadata:
    """Collect what `Calibrator.from_pretrained` loaded."""
    config = calibrator.config.to_dict()
    parameters: Counter[str] = Counter()
    for name, parameter in calibrator.named_parameters():
        parameters[name.split(".")[0]] += parameter.numel()
    return CalibratorMetadata(
        fingerprint=calibrator.fingerprint,
        heads=tuple(config["heads"]),
        parameters=dict(parameters),
        bytes_in_memory=sum(parameter.nbytes for _, parameter in calibrator.named_parameters()),
        shape={name: value for name, value in config.items() if isinstance(value, int)},
        fusion=dict(config["fusion"]),
        training=dict(config["training"]),
    )


@dataclass(frozen=True)
class VocabularyReport:
    """What a vocabulary is made of."""

    name: str  # where it came from
    fingerprint: str  # of its bytes
    size: int  # ids, holes included
    special: int  # ids without text (begin, end, padding, chat marks, holes): never moved by fusion
    duplicates: int  # ids whose bytes an earlier id has too
    partial: int  # ids that are no whole UTF-8 text (parts of characters)
    longest: int  # bytes of the longest token
    unspelled: int = 0  # ids with text that the calibrator cannot spell: not covered either

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

    def rows(self) -> list[tuple[str, str, str]]:
        """What, how many, share of all ids."""
        counts = [
            ("in the vocabulary", self.size),
            ("covered (have text)", self.covered),
            *([("text that the calibrator cannot spell", self.unspelled)] if self.unspelled else []),
            ("special or holes (never moved)", self.special),
            ("same bytes as another id", self.duplicates),
            ("parts of characters", self.partial),
        ]
        return [(name, f"{count:,}", f"{100 * count / self.size:.2f} %") for name, count in counts]


def report_vocabulary(vocabulary: Vocabulary, bound: Guide | None = None) -> VocabularyReport:
    """Count what a target's vocabulary is made of; without a bound calibrator every id with text is covered."""
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


@dataclass(frozen=True)
class TextReport:
    """How a bound calibrator fits a text."""

    passages: int  # token sequences, each scored from an empty context
    tokens: int  # scored tokens
    bytes: int  # of the scored tokens
    skipped: int  # tokens that are not covered (unknown marks), left out of all sums
    distinct: int  # different tokens that were scored
    bits_per_byte: Mapping[str, float]  # by head; comparable across vocabularies

    @property
    def covered_mass(self) -> float:
        """Share of the text's tokens that are covered, in [0, 1]."""
        return self.tokens / (self.tokens + self.skipped)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {**asdict(self), "covered_mass": self.covered_mass}

    def rows(self) -> list[tuple[str, str]]:
        """What, and its value."""
        return [
            ("passages", f"{self.passages:,}"),
            ("bytes", f"{self.bytes:,}"),
            ("tokens", f"{self.tokens + self.skipped:,} ({self.distinct:,} different)"),
            ("covered tokens of the text", f"{100 * self.covered_mass:.3f} %"),
            *((f"bits per byte, head {head!r}", f"{value:.3f}") for head, value in self.bits_per_byte.items()),
        ]


def report_text(bound: Guide, sequences: Sequence[Sequence[int]]) -> TextReport:
    """Score passages, token ids without special ones, each from an empty context.

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
