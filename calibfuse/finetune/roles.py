"""What the three roles do: read products from folders, make the next one, write it whole.

A role knows nothing of the others but their folders, so each can run in a process of its own. Everything that it
draws at random follows from the seed, the role and the step: a step that is made anew comes out the same.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calibfuse import hub
from calibfuse.errors import CheckpointError, DataError, InputError, ScorerError
from calibfuse.finetune.corpus import PackedCorpus, corpus_perplexity, limit_held_out
from calibfuse.finetune.lora import ADAPTER, add_adapter, load_adapter, merge_adapter
from calibfuse.finetune.products import (
    CORPUS_NAME,
    OPTIMIZER_NAME,
    PROMPTS_NAME,
    RECORD_NAME,
    SETTINGS_NAME,
    new_folder,
    product_folder,
    write_json,
)
from calibfuse.finetune.schedule import AUXILIARY, MODEL, SAMPLES, Job
from calibfuse.finetune.settings import FinetuneConfig, ModelSource
from calibfuse.finetune.tuning import Constraint, tune, tuning_optimizer
from calibfuse.generation.language_model import read_model, read_tokenizer
from calibfuse.training.loop import load_optimizer, optimizer_tensors
from calibfuse.value.auxiliary import AuxiliaryModel, make_auxiliary_model
from calibfuse.value.auxiliary_training import train_auxiliary
from calibfuse.value.oracle import Oracle, load_oracle
from calibfuse.value.samples import SampleSet, draw_samples, label_samples

_SATISFIED = 0.5


class RoleRunner:
    """Runs jobs of a run in this process.

    Args:
        work: the run's folder of products, with its settings, prompts and packed corpus.
        device: where models run.
        oracle: in place of the one that the settings name; only for runs in one process.
        show_progress: draw progress bars on standard error.
    """

    def __init__(
        self, work: Path, device: torch.device | str, *, oracle: Oracle | None = None, show_progress: bool = False
    ) -> None:
        self.work = work
        self.config = FinetuneConfig.from_dict(hub.read_json(work / SETTINGS_NAME, "settings of a fine-tuning run"))
        self.device = torch.device(device)
        self._oracle = oracle
        self._show_progress = show_progress
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def run(self, job: Job) -> dict[str, Any]:
        """Make the product of a job.

        Returns:
            What also stands in the product's role.json: role, step, what it read, device, threads, wall time from
            `began` (seconds since the epoch) for `seconds`, and the role's figures.
        """
        make = {SAMPLES: self._make_samples, AUXILIARY: self._make_auxiliary, MODEL: self._make_model}[job.role]
        began, clock = time.time(), time.perf_counter()
        final = product_folder(self.work, job.role, job.step)
        try:
            with new_folder(final, f"the product of role {job.role!r}") as folder:
                figures = make(job, folder)
                record = {
                    "role": job.role,
                    "step": job.step,
                    "reads": dict(job.reads),
                    "device": str(self.device),
                    "threads": torch.get_num_threads(),
                    "began": round(began, 3),
                    "seconds": round(time.perf_counter() - clock, 3),
                    "figures": figures,
                }
                write_json(folder / RECORD_NAME, record)
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(
                f"The role {job.role!r} needs more memory than {self.device} has. Choose smaller batches, or give each "
                "role a device of its own."
            ) from error
        return record

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model that is tuned."""
        if self._tokenizer is None:
            self._tokenizer = read_tokenizer(self.config.model.name, **self.config.model.options())
        return self._tokenizer

    @property
    def oracle(self) -> Oracle:
        """The constraint, loaded once."""
        if self._oracle is None:
            source = self.config.oracle
            if source is None:
                raise InputError("A KL weight above 0 needs an oracle that labels the samples.")
            self._oracle = load_oracle(
                source.spec, power=source.power, threshold=source.threshold, device=str(self.device)
            )
        return self._oracle

    def _model(self, step: int) -> PreTrainedModel:
        """The model of a step, on the device; the user's own for step 0."""
        source = self.config.model
        if step > 0:
            place = product_folder(self.work, MODEL, step)
            options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": source.trust_remote_code}
            return read_model(str(place), device=self.device, dtype=source.dtype, **options)
        return read_model(source.name, device=self.device, dtype=source.dtype, **source.options())

    def _make_samples(self, job: Job, folder: Path) -> dict[str, Any]:
        plan = self.config.sampling
        oracle = self.oracle  # before the work, so that a bad one fails at once
        samples = draw_samples(
            self._model(job.reads[MODEL]),
            self.tokenizer,
            hub.read_json(self.work / PROMPTS_NAME, "prompts of a fine-tuning run")["prompts"],
            per_prompt=plan.per_prompt,
            max_new_tokens=plan.max_new_tokens,
            temperature=plan.temperature,
            seed=self.config.seed_of(SAMPLES, job.step),
            batch_size=plan.batch_size,
            chat=plan.chat,
            system=plan.system,
            show_progress=self._show_progress,
        )
        source = self.config.oracle
        alone = plan.chat or plan.system is not None or (source is not None and source.continuation_only)
        samples = label_samples(
            samples,
            self.tokenizer,
            oracle,
            continuation_only=alone,
            show_progress=self._show_progress,
        )
        labels = samples.satisfaction[~samples.satisfaction.isnan()]
        if not len(labels):
            raise ScorerError(f"The oracle could not label any of the {len(samples.satisfaction)} samples.")
        kept = thin_satisfied(samples, plan.keep_satisfied, seed=self.config.seed_of(SAMPLES, job.step))
        kept.save(folder)
        return {
            "samples": len(samples.satisfaction),
            "kept": len(kept.satisfaction),
            "unlabelled": int(samples.satisfaction.isnan().sum()),
            "mean_satisfaction": float(labels.mean()),
            "tokens": int((samples.lengths - samples.prompt_lengths).sum()),
        }

    def _make_auxiliary(self, job: Job, folder: Path) -> dict[str, Any]:
        plan = self.config.auxiliary
        base = self._model(job.reads[MODEL])
        samples = SampleSet.load(product_folder(self.work, SAMPLES, job.reads[SAMPLES]))
        seed = self.config.seed_of(AUXILIARY, job.step)
        if AUXILIARY in job.reads:
            auxiliary = AuxiliaryModel.from_pretrained(product_folder(self.work, AUXILIARY, job.reads[AUXILIARY]))
        else:
            auxiliary = make_auxiliary_model(
                base, self.tokenizer, kind=plan.kind, parameterisation=plan.parameterisation, seed=seed
            )
        figures = train_auxiliary(
            auxiliary,
            base,
            samples,
            dataclasses.replace(plan.training, seed=seed),
            device=str(self.device),
            show_progress=self._show_progress,
        )
        auxiliary.save_pretrained(folder)
        return {name: _number(value) for name, value in figures.items()}

    def _make_model(self, job: Job, folder: Path) -> dict[str, Any]:
        config, before = self.config, job.reads[MODEL]
        corpus = PackedCorpus.load(self.work / CORPUS_NAME)
        model = self._trainable(before)
        optimizer = tuning_optimizer(model, config.tuning)
        parameters = dict(model.named_parameters())
        held_out = limit_held_out(corpus, config.held_out_blocks).held_out
        perplexities = {} if before else {"corpus_perplexity_before": _number(corpus_perplexity(model, held_out))}
        if before > 0:
            place = product_folder(self.work, MODEL, before) / OPTIMIZER_NAME
            load_optimizer(optimizer, parameters, hub.read_tensors(place))
        constraint = None
        if AUXILIARY in job.reads:
            place = product_folder(self.work, AUXILIARY, job.reads[AUXILIARY])
            constraint = Constraint(
                self._model(before),
                AuxiliaryModel.from_pretrained(place).to(self.device).eval(),
                SampleSet.load(product_folder(self.work, SAMPLES, job.reads[SAMPLES])),
            )
        figures = tune(
            model,
            optimizer,
            corpus,
            config.tuning,
            iteration=job.step,
            iterations=config.iterations,
            constraint=constraint,
            show_progress=self._show_progress,
        )
        hub.write_tensors(folder / OPTIMIZER_NAME, optimizer_tensors(optimizer, parameters))
        if config.lora is not None:
            model.save_pretrained(folder / ADAPTER)
            model = merge_adapter(model)
        save_model(model, self.tokenizer, folder)
        told = {name: _number(value) for name, value in dataclasses.asdict(figures).items()}
        return {**told, **perplexities, "corpus_perplexity": _number(corpus_perplexity(model, held_out))}

    def _trainable(self, step: int) -> PreTrainedModel:
        """The model of a step with the parameters that learn."""
        if self.config.lora is None:
            return self._model(step).requires_grad_(True)
        base = self._model(0)
        if step > 0:
            return load_adapter(base, product_folder(self.work, MODEL, step) / ADAPTER)
        return add_adapter(base, self.config.lora, seed=self.config.seed_of(MODEL, 0))


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary transformers checkpoint with safetensors."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def thin_satisfied(samples: SampleSet, share: float, *, seed: int) -> SampleSet:
    """Keep a random share of the samples that satisfy the constraint, and all others.

    The kept ones stand for those that were left out: log(1 / share) is added to their log-weights, so weighted means
    over the result estimate those over all samples.
    """
    if share >= 1.0:
        return samples
    satisfied = samples.satisfaction >= _SATISFIED  # nan is not
    drawn = torch.from_numpy(np.random.default_rng([seed, 25]).random(len(satisfied)) < share)
    weighted = dataclasses.replace(
        samples, log_weights=samples.log_weights - math.log(share) * satisfied.to(samples.log_weights.dtype)
    )
    return weighted.rows(~satisfied | drawn)


def check_prompts(
    tokenizer: PreTrainedTokenizerBase, source: ModelSource, prompts: list[str], max_new_tokens: int
) -> None:
    """Refuse prompts that are missing or leave no room for a continuation, before anything else is done."""
    from transformers import AutoConfig

    if not prompts:
        raise DataError("Fine-tuning with a KL weight above 0 needs prompts to draw samples from, got none.")
    try:
        config = AutoConfig.from_pretrained(source.name, **source.options())
    except Exception as error:  # transformers and the Hub's client raise errors of their own
        raise CheckpointError(f"Cannot load the configuration of {source.name!r}: {error}") from error
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    rows: Any = tokenizer(prompts, verbose=False)["input_ids"]
    for prompt, row in zip(prompts, rows, strict=True):
        if not len(row):
            raise InputError(f"The model's tokenizer finds no token in the prompt {prompt!r}.")
        if isinstance(limit, int) and len(row) + max_new_tokens > limit:
            raise InputError(
                f"The prompt that begins with {prompt[:40]!r} has {len(row)} tokens and {max_new_tokens} more follow, "
                f"but the model has {limit} positions; leave long prompts out or lower the number of new tokens."
            )


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return value if math.isfinite(value) else None
