"""The settings of a whole fine-tuning run, as one JSON file that every role's process reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from calibfuse.errors import InputError
from calibfuse.finetune.lora import LoraSettings
from calibfuse.finetune.schedule import ROLES, SEQUENTIAL, plan_stages
from calibfuse.finetune.tuning import TuningConfig
from calibfuse.generation.language_model import DTYPES
from calibfuse.value.auxiliary_training import AuxiliaryTrainingConfig
from calibfuse.value.samples import SamplingPlan


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where the model comes from.

    Attributes:
        name: folder or Hub id.
        dtype: of the weights while they learn: "float32", "bfloat16", "float16", or "auto", the checkpoint's own.
        revision: branch, tag or commit on the Hub.
        local_files_only: never touch the network.
        trust_remote_code: run Python code that the model brings along.
    """

    name: str
    dtype: str = "float32"
    revision: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `from_pretrained`."""
        options = {"local_files_only": self.local_files_only, "trust_remote_code": self.trust_remote_code}
        return options if self.revision is None else {**options, "revision": self.revision}


@dataclass(frozen=True, kw_only=True)
class OracleSource:
    """What decides whether a text satisfies the constraint; arguments of `calibfuse.value.oracle.load_oracle`."""

    spec: str
    power: float = 1.0
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A whole run, but for its texts.

    Attributes:
        model: what is tuned.
        oracle: the constraint; may be missing where the KL weight is 0.
        schedule: "sequential" or "parallel".
        iterations: how often the model is tuned, each time on a newer auxiliary model.
        tuning: one iteration of it.
        sampling: one draw of samples.
        keep_satisfied: share of the samples with C of at least 0.5 that is kept, with weights that make up for it; all
            others are kept. Below 1 the later roles spend their time on what the oracle refuses, which is rare.
        auxiliary: training of the model of R in each step; its seed is replaced by one of the run and the step.
        lora: an adapter in place of full fine-tuning.
        block_length: tokens of a corpus block.
        held_out_share: of the corpus's documents.
        held_out_blocks: for the corpus perplexity after each iteration, at most.
    """

    model: ModelSource
    oracle: OracleSource | None = None
    schedule: str = SEQUENTIAL
    iterations: int = 3
    tuning: TuningConfig = field(default_factory=TuningConfig)
    sampling: SamplingPlan = field(default_factory=SamplingPlan)
    keep_satisfied: float = 1.0
    auxiliary: AuxiliaryTrainingConfig = field(default_factory=AuxiliaryTrainingConfig)
    lora: LoraSettings | None = None
    block_length: int = 128
    held_out_share: float = 0.05
    held_out_blocks: int = 200

    def __post_init__(self) -> None:
        """Validate."""
        plan_stages(self.schedule, self.iterations)
        if self.held_out_blocks < 1:
            raise InputError(f"held_out_blocks must be at least 1, got {self.held_out_blocks}.")
        if not 0.0 < self.keep_satisfied <= 1.0:
            raise InputError(f"keep_satisfied must be above 0 and at most 1, got {self.keep_satisfied}.")

    @property
    def is_constrained(self) -> bool:
        """Whether there is a KL term at all."""
        return self.tuning.kl_weight > 0

    def seed_of(self, role: str, step: int) -> int:
        """A seed for one role and step, below 2**31."""
        sequence = np.random.SeedSequence([self.tuning.seed, 24, ROLES.index(role), step])
        return int(sequence.generate_state(1)[0]) >> 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneConfig:
        """Inverse of `to_dict`."""
        try:
            parts = {name: kind(**values[name]) for name, kind in _PARTS.items() if values[name] is not None}
            return cls(**{**values, **parts})
        except (KeyError, TypeError) as error:
            raise InputError(f"These are no settings of a fine-tuning run: {error}.") from error


_PARTS: dict[str, Any] = {
    "model": ModelSource,
    "oracle": OracleSource,
    "tuning": TuningConfig,
    "sampling": SamplingPlan,
    "auxiliary": AuxiliaryTrainingConfig,
    "lora": LoraSettings,
}
