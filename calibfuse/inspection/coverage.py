"""What a calibrator is, and what of a vocabulary it covers.

"Covered" is what it has something to say about: for the universal calibrator every id with text, for a causal language
model that is projected onto another vocabulary every id whose bytes its own tokens can spell.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from calibfuse.guide import Guide
from calibfuse.loading import PretrainedCalibrator
from calibfuse.vocabulary import Vocabulary


def describe_calibrator(calibrator: PretrainedCalibrator) -> dict[str, Any]:
    """What `Calibrator.from_pretrained` loaded, JSON-ready: number of parameters by part, sizes, fusion."""
    config = calibrator.config.to_dict()
    parameters: Counter[str] = Counter()
    for name, parameter in calibrator.named_parameters():
        parameters[name.split(".")[0]] += parameter.numel()
    return {
        "fingerprint": calibrator.fingerprint,
        "heads": list(config["heads"]),
        "parameters": dict(parameters),
        "parameter_count": parameters.total(),
        "bytes_in_memory": sum(parameter.nbytes for _, parameter in calibrator.named_parameters()),
        "shape": {name: value for name, value in config.items() if isinstance(value, int)},
        "fusion": dict(config["fusion"]),
        "training": dict(config["training"]),
    }


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
    unspelled: int  # ids with text that the calibrator cannot spell: not covered either

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
