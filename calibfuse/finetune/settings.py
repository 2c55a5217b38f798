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
    """What decides whether a text satisfies the constraint; see `oracle.load_oracle`.

    Attributes:
        spec: a toxicity scorer, or "module:function".
        power: C = 1 - toxicity ** power.
        threshold: C = 1 where the toxicity is below, else 0; None: soft labels.
        continuation_only: show the oracle the continuation without its prompt.
    """

    spec: str
    power: float = 1.0
    threshold: float | None = None
    continuation_only: bool = False


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """How continuations are drawn for labelling.

    Attributes:
        per_prompt: continuations of each prompt and step.
        max_new_tokens: length.
        temperature: above 1 draws rarer continuations; the weights of the samples undo it.
        keep_satisfied: share of the samples with C of at least 0.5 that is kept, with weights that make up for it; all
            others are kept. Below 1 the later roles spend their time on what the oracle refuses, which is rare.
        batch_size: rows per forward pass.
        chat: put each prompt into the tokenizer's chat template; the oracle then sees the continuation alone.
        system: system message of the chat template; implies `chat`.
    """

    per_prompt: int = 4
    max_new_tokens: int = 20
    temperature: float = 1.0
    keep_satisfied: float = 1.0
    batch_size: int = 64
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("per_prompt", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0.0 < self.keep_satisfied <= 1.0:
            raise InputError(f"keep_satisfied must be above 0 and at most 1, got {self.keep_satisfied}.")
        if not self.temperature > 0:
            raise InputError(f"The sampling temperature must be above 0, got {self.temperature}.")


@dataclass(frozen=True, kw_only=True)
class AuxiliaryPlan:
    """The auxiliary model and its training.

    Attributes:
        kind: "language-model" or "calibrator"; see `auxiliary.make_auxiliary_model`.
        parameterisation: "nado" or "dinado".
        training: how it learns in each step; its seed is replaced by one of the run and the step.
    """

    kind: str = "language-model"
    parameterisation: str = "nado"
    training: AuxiliaryTrainingConfig = field(default_factory=AuxiliaryTrainingConfig)


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
        auxiliary: the model of R.
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
    auxiliary: AuxiliaryPlan = field(default_factory=AuxiliaryPlan)
    lora: LoraSettings | None = None
    block_length: int = 128
    held_out_share: float = 0.05
    held_out_blocks: int = 200

    def __post_init__(self) -> None:
        """Validate."""
        plan_stages(self.schedule, self.iterations)
        if self.held_out_blocks < 1:
            raise InputError(f"held_out_blocks must be at least 1, got {self.held_out_blocks}.")

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
        rest = dict(values)
        try:
            parts: dict[str, Any] = {"model": ModelSource(**rest.pop("model"))}
            auxiliary = dict(rest.pop("auxiliary"))
            training = AuxiliaryTrainingConfig(**auxiliary.pop("training"))
            parts["auxiliary"] = AuxiliaryPlan(training=training, **auxiliary)
            parts["tuning"] = TuningConfig(**rest.pop("tuning"))
            parts["sampling"] = SamplingPlan(**rest.pop("sampling"))
            oracle, lora = rest.pop("oracle"), rest.pop("lora")
            parts["oracle"] = None if oracle is None else OracleSource(**oracle)
            parts["lora"] = None if lora is None else LoraSettings(**lora)
            return cls(**parts, **rest)
        except (KeyError, TypeError) as error:
            raise InputError(f"These are no settings of a fine-tuning run: {error}.") from error
