"""The settings of a whole fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calibfuse.errors import check_ranges
from calibfuse.finetune.schedule import ROLES, SEQUENTIAL, plan_stages
from calibfuse.finetune.tuning import TuningConfig
from calibfuse.generation.language_model import DTYPES
from calibfuse.value.auxiliary_training import AuxiliaryTrainingConfig
from calibfuse.value.samples import SamplingPlan


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where the model comes from."""

    name: str  # folder or Hub id
    dtype: str = "float32"  # of the weights while they learn; "auto": the checkpoint's own
    revision: str | None = None  # branch, tag or commit on the Hub
    local_files_only: bool = False  # never touch the network
    trust_remote_code: bool = False  # run Python code that the model brings along

    def __post_init__(self) -> None:
        check_ranges(self, dtype=DTYPES)

    def options(self) -> dict[str, Any]:
        """Arguments of `read_model` and `read_tokenizer`."""
        return {name: getattr(self, name) for name in ("revision", "local_files_only", "trust_remote_code")}


@dataclass(frozen=True, kw_only=True)
class OracleSource:
    """What decides whether a text satisfies the constraint; arguments of `calibfuse.value.oracle.load_oracle`."""

    spec: str
    power: float = 1.0
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A whole run, but for its texts."""

    model: ModelSource
    oracle: OracleSource | None = None  # the constraint; may be missing where the KL weight is 0
    schedule: str = SEQUENTIAL  # "sequential" or "parallel"
    iterations: int = 3  # how often the model is tuned, each time on a newer auxiliary model
    tuning: TuningConfig = field(default_factory=TuningConfig)
    sampling: SamplingPlan = field(default_factory=SamplingPlan)
    # All samples with C below 0.5 are kept, and weights make up for the others: below 1 the later roles spend their
    # time on what the oracle refuses, which is rare.
    keep_satisfied: float = 1.0  # share of the samples with C of at least 0.5 that is kept
    auxiliary: AuxiliaryTrainingConfig = field(default_factory=AuxiliaryTrainingConfig)  # the run gives each its seed
    lora: int | None = None  # rank of an adapter (extra: lora) that is trained in place of the whole model
    filter_corpus: float | None = None  # train only on documents that the oracle gives at least this C
    block_length: int = 128  # tokens of a corpus block
    held_out_share: float = 0.05  # of the corpus's documents
    held_out_blocks: int = 200  # for the corpus perplexity after each iteration, at most

    def __post_init__(self) -> None:
        plan_stages(self.schedule, self.iterations)
        check_ranges(self, held_out_blocks="[1, inf)", lora="[1, inf)", filter_corpus="(0, 1]", keep_satisfied="(0, 1]")

    @property
    def is_constrained(self) -> bool:
        """Whether there is a KL term at all."""
        return self.tuning.kl_weight > 0

    def seed_of(self, role: str, step: int) -> int:
        """A seed for one role and step, below 2**31."""
        sequence = np.random.SeedSequence([self.tuning.seed, 24, ROLES.index(role), step])
        return int(sequence.generate_state(1)[0]) >> 1
