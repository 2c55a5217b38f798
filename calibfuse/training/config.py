"""What a calibrator is trained on, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibfuse.errors import InputError, check_ranges
from calibfuse.scorers import ToxicityScorer


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """What to train on: two piles of text that differ in one attribute, sorted by you or by a scorer.

    Each source is a file or a folder. Both heads learn wanted text, the reference head all.
    """

    wanted: Sequence[str] = ()  # text as the calibrator is to make it: non-toxic, polite, on topic
    unwanted: Sequence[str] = ()  # text that has the other value of the attribute, or unfiltered text
    unfiltered: Sequence[str] = ()  # text that `scorer` sorts into the two
    scorer: ToxicityScorer | None = None
    threshold: float = 0.5  # passages that score this or more are unwanted
    text_field: str | None = None  # column or key of the text; None: found by name

    def __post_init__(self) -> None:
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
        check_ranges(self, threshold="(0, 1]")

    @property
    def sources(self) -> list[tuple[str, bool]]:
        """Each file or folder, and whether it was given as wanted."""
        return [(str(path), True) for path in self.wanted] + [
            (str(path), False) for path in (*self.unwanted, *self.unfiltered)
        ]

    def facts(self) -> dict[str, Any]:
        """What a model card tells of it."""
        facts: dict[str, Any] = {"files": [Path(path).name for path, _ in self.sources]}
        if self.scorer is not None:
            facts["sorted by"] = f"{self.scorer.name}, toxic from {self.threshold:g}"
        return facts


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train."""

    steps: int = 4000  # optimiser steps in all
    batch_size: int = 12  # rows of a batch, over all processes
    sequence_length: int = 192  # tokens of a row
    learning_rate: float = 3e-3  # peak
    warmup: float = 0.02  # share of the steps in which the learning rate rises from 0
    decay: float = 0.4  # share of the steps, the last, in which it falls to 0
    weight_decay: float = 0.05  # of the matrices, not of the feature table
    reference_weight: float = 1.0  # weight of the reference head's loss
    flagged_share: float | None = None  # share of the passages that only the reference reads (default: as they come)
    # leave out unwanted passages until names of groups, and names much argued about, are in them no more often than
    # other words
    balance_identity_terms: bool = True
    word_table: bool = True  # bias words by themselves, and protect those names, in whatever pieces they are spelled
    neutral_share: float = 0.02  # share of passages that are made: neutral sentences about people, read by both heads
    heads_only: bool = False  # train only the heads and their biases: for weights that were trained before
    candidate_count: int = 2560  # tokens of the softmax subset
    vocabulary_size: int = 100_000  # to which the vocabularies of the pool are filled up with negatives
    split_rate: float = 0.05  # share of tokens cut in two, on every second batch, in place of BPE dropout
    seed: int = 0  # of initial weights, order and draws
    save_every: int = 500  # steps between checkpoints
    validate_every: int = 1000  # steps between validations; 0: only at the end
    validation_bytes: int = 30_000  # text of each validation, per tokenizer
    precision: str = "bf16"  # "bf16" or "fp32"

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "sequence_length", "candidate_count", "vocabulary_size", "save_every")
        check_ranges(self, **dict.fromkeys((*counts, "validation_bytes"), "[1, inf)"))
        check_ranges(self, **dict.fromkeys(("warmup", "decay", "split_rate", "neutral_share"), "[0, 1]"))
        check_ranges(self, learning_rate="(0, inf)", flagged_share="[0, 1)", precision=("bf16", "fp32"))
