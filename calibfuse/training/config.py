"""What a calibrator is trained on, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibfuse.errors import InputError
from calibfuse.scorers import ToxicityScorer
from calibfuse.textfiles import HUB_PREFIX
from calibfuse.training.loop import learning_rate


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """What to train on: two piles of text that differ in one attribute, sorted by you or by a scorer.

    Attributes:
        wanted: files, folders or hf:NAME of text as the calibrator is to make it (non-toxic, polite, on topic): both
            heads learn from it.
        unwanted: likewise, text that has the other value of the attribute, or unfiltered text: the reference head's.
        unfiltered: likewise, text that `scorer` sorts into the two.
        scorer: toxicity scorer for `unfiltered`.
        threshold: passages that score this or more are unwanted.
        text_field: column or key of the text; None: found by name.
    """

    wanted: Sequence[str] = ()
    unwanted: Sequence[str] = ()
    unfiltered: Sequence[str] = ()
    scorer: ToxicityScorer | None = None
    threshold: float = 0.5
    text_field: str | None = None

    def __post_init__(self) -> None:
        """Validate."""
        if self.unfiltered and (self.wanted or self.unwanted):
            raise InputError(
                "Give either unfiltered text, which a scorer sorts, or wanted and unwanted text, not both."
            )
        if not self.unfiltered and not self.wanted:
            raise InputError(
                "Training needs wanted (for instance non-toxic) and unwanted text, or unfiltered text that a scorer "
                "sorts."
            )
        if self.unfiltered and self.scorer is None:
            raise InputError("Unfiltered text needs a toxicity scorer that sorts it.")
        if not 0.0 < self.threshold <= 1.0:
            raise InputError(f"The toxicity threshold must be above 0 and at most 1, got {self.threshold}.")

    @property
    def sources(self) -> list[tuple[str, bool]]:
        """Each file, folder or hf:NAME, and whether it was given as wanted."""
        return [(str(path), True) for path in self.wanted] + [
            (str(path), False) for path in (*self.unwanted, *self.unfiltered)
        ]

    def facts(self) -> dict[str, Any]:
        """What a model card tells of it."""
        facts: dict[str, Any] = {
            "files": [path if path.startswith(HUB_PREFIX) else Path(path).name for path, _ in self.sources]
        }
        if self.scorer is not None:
            facts["sorted by"] = f"{self.scorer.name}, toxic from {self.threshold:g}"
        return facts


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train.

    Attributes:
        steps: optimiser steps in all.
        batch_size: rows of a batch, over all processes.
        sequence_length: tokens of a row.
        learning_rate: peak.
        warmup: share of the steps in which the rate rises from 0.
        decay: share of the steps, at the end, in which the rate falls to 0. In between it is constant, so that a
            run can be resumed with fewer steps to make it end sooner, or with more.
        weight_decay: of the body's matrices; the hashed table has none.
        reference_weight: weight of the reference head's loss.
        flagged_share: share of the passages drawn from the unwanted ones, which only the reference sees; None: as they
            come.
        balance_identity_terms: leave out unwanted passages until the names of groups of people, and other names that
            are much argued about (words/names.py), are in them no more often than other words; see words/balance.py.
        word_table: let the calibrator also bias words by themselves, and protect those names, in whatever pieces a
            vocabulary spells them; see words/counts.py and words/protected.py.
        neutral_share: share of passages that are made: neutral sentences which name groups of people, read alike by
            both heads; see words/neutral_sentences.py.
        heads_only: leave body and token vectors as they are, and train the heads and their biases: for weights that
            were trained before, when the text is sorted anew. Half the time a step.
        candidate_count: tokens of the softmax subset.
        vocabulary_size: size to which the vocabularies of the pool are filled up with negatives.
        split_rate: share of tokens cut in two, on every second batch, in place of BPE dropout.
        seed: of initial weights, order and draws.
        save_every: steps between checkpoints.
        validate_every: steps between validations; 0: only at the end.
        validation_bytes: text of each validation, per tokenizer.
        precision: "bf16" or "fp32".
    """

    steps: int = 4000
    batch_size: int = 12
    sequence_length: int = 192
    learning_rate: float = 3e-3
    warmup: float = 0.02
    decay: float = 0.4
    weight_decay: float = 0.05
    reference_weight: float = 1.0
    flagged_share: float | None = None
    balance_identity_terms: bool = True
    word_table: bool = True
    neutral_share: float = 0.02
    heads_only: bool = False
    candidate_count: int = 2560
    vocabulary_size: int = 100_000
    split_rate: float = 0.05
    seed: int = 0
    save_every: int = 500
    validate_every: int = 1000
    validation_bytes: int = 30_000
    precision: str = "bf16"

    def __post_init__(self) -> None:
        """Validate."""
        counts = ("steps", "batch_size", "sequence_length", "candidate_count", "vocabulary_size", "save_every")
        for name in (*counts, "validation_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("warmup", "decay", "split_rate", "neutral_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"learning_rate must be a positive number, got {self.learning_rate}.")
        if self.flagged_share is not None and not 0.0 <= self.flagged_share < 1.0:
            raise InputError(f"flagged_share must be in [0, 1), got {self.flagged_share}.")
        if self.precision not in ("bf16", "fp32"):
            raise InputError(f"precision must be 'bf16' or 'fp32', got {self.precision!r}.")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: rises, stays, falls to 0 over the last `decay` share."""
        return learning_rate(step, self.steps, peak=self.learning_rate, warmup=self.warmup, decay=self.decay)
