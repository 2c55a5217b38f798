"""What the three roles do: read products from folders, make the next one, write it whole."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calibfuse import hub
from calibfuse.errors import InputError, ScorerError
from calibfuse.finetune.corpus import PackedCorpus, corpus_perplexity
from calibfuse.finetune.lora import ADAPTER, add_adapter, load_adapter, merge_adapter
from calibfuse.finetune.schedule import AUXILIARY, MODEL, SAMPLES, Job, product_folder
from calibfuse.finetune.settings import FinetuneConfig
from calibfuse.finetune.tuning import Constraint, tune, tuning_optimizer
from calibfuse.generation.language_model import read_model, read_tokenizer
from calibfuse.loading import quiet_transformers
from calibfuse.training.loop import load_optimizer, optimizer_tensors
from calibfuse.training.work_folder import new_folder, write_json
from calibfuse.value.auxiliary import load_auxiliary_model, make_auxiliary_model
from calibfuse.value.auxiliary_training import train_auxiliary
from calibfuse.value.oracle import Oracle, load_oracle
from calibfuse.value.samples import SampleSet

CORPUS_NAME = "corpus.safetensors"
RECORD_NAME = "role.json"
OPTIMIZER_NAME = "optimizer.safetensors"
_SATISFIED = 0.5


class RoleRunner:
    """Runs jobs of a run in this process: `work` is the run's folder, with its packed corpus.

    An `oracle` in place of the one that the settings name is only for runs in one process.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        prompts: Sequence[str],
        work: Path,
        device: torch.device | str,
        *,
        oracle: Oracle | None = None,
        show_progress: bool = False,
    ) -> None:
        self.config, self.prompts, self.work = config, list(prompts), work
        self.device = torch.device(device)
        self._given_oracle = oracle
        self._show_progress = show_progress

    def run(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """Run jobs, one after the other; gives the record of each role."""
        return {job.role: self.make(job) for job in jobs}

    def make(self, job: Job) -> dict[str, Any]:
        """Make the product of a job; gives its record, which stands in the product's role.json too."""
        make = {SAMPLES: self._make_samples, AUXILIARY: self._make_auxiliary, MODEL: self._make_model}[job.role]
        began, clock = time.time(), time.perf_counter()
        try:
            with new_folder(job.folder(self.work), f"the product of role {job.role!r}") as folder:
                figures = make(job, folder)
                record = {
                    "role": job.role,
                    "step": job.step,
                    "reads": dict(job.reads),
                    "device": str(self.device),
                    "threads": torch.get_num_threads(),
                    "began": round(began, 3),
                    "seconds": round(time.perf_counter() - clock, 3),
                    # JSON has no nan
                    "figures": {name: value if math.isfinite(value) else None for name, value in figures.items()},
                }
                write_json(folder / RECORD_NAME, record)
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(
                f"The role {job.role!r} needs more memory than {self.device} has. Choose smaller batches, or give each "
                "role a device of its own."
            ) from error
        return record

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model that is tuned."""
        return read_tokenizer(self.config.model.name, **self.config.model.options())

    @cached_property
    def oracle(self) -> Oracle:
        """The constraint."""
        if self._given_oracle is not None:
            return self._given_oracle
        assert self.config.oracle is not None  # run.py has checked
        return load_oracle(**dataclasses.asdict(self.config.oracle), device=str(self.device))

    def _product(self, job: Job, role: str) -> Path:
        return product_folder(self.work, role, job.reads[role])

    def _model(self, step: int) -> PreTrainedModel:
        """The model of a step, on the device; the user's own for step 0."""
        source = self.config.model
        name, options = source.name, source.options()
        if step > 0:
            name = str(product_folder(self.work, MODEL, step))
            options |= {"local_files_only": True, "revision": None}
        return read_model(name, device=self.device, dtype=source.dtype, **options)

    def _make_samples(self, job: Job, folder: Path) -> dict[str, float]:
        seed = self.config.seed_of(SAMPLES, job.step)
        oracle = self.oracle  # before the work, so that a bad one fails at once
        samples = self.config.sampling.draw(
            self._model(job.reads[MODEL]),
            self.tokenizer,
            self.prompts,
            oracle,
            seed=seed,
            show_progress=self._show_progress,
        )
        labels = samples.satisfaction[~samples.satisfaction.isnan()]
        if not len(labels):
            raise ScorerError(f"The oracle could not label any of the {len(samples)} samples.")
        kept = thin_satisfied(samples, self.config.keep_satisfied, seed=seed)
        kept.save(folder)
        return {
            "samples": len(samples),
            "kept": len(kept),
            "unlabelled": int(samples.satisfaction.isnan().sum()),
            "mean_satisfaction": float(labels.mean()),
            "tokens": int((samples.lengths - samples.prompt_lengths).sum()),
        }

    def _make_auxiliary(self, job: Job, folder: Path) -> dict[str, float]:
        base = self._model(job.reads[MODEL])
        samples = SampleSet.load(self._product(job, SAMPLES))
        seed = self.config.seed_of(AUXILIARY, job.step)
        if AUXILIARY in job.reads:
            auxiliary = load_auxiliary_model(self._product(job, AUXILIARY), base, self.tokenizer)
        else:
            auxiliary = make_auxiliary_model(base, self.tokenizer, seed=seed)
        training = dataclasses.replace(self.config.auxiliary, seed=seed)
        figures = train_auxiliary(auxiliary, base, samples, training, show_progress=self._show_progress)
        auxiliary.save_pretrained(folder)
        return figures

    def _make_model(self, job: Job, folder: Path) -> dict[str, float]:
        config, before = self.config, job.reads[MODEL]
        corpus = PackedCorpus.load(self.work / CORPUS_NAME)
        held_out = corpus.held_out[: config.held_out_blocks]
        model = self._trainable(before)
        optimizer = tuning_optimizer(model, config.tuning)
        parameters = dict(model.named_parameters())
        figures: dict[str, float] = {}
        if before == 0:
            figures["corpus_perplexity_before"] = corpus_perplexity(model, held_out)
        else:
            load_optimizer(optimizer, parameters, hub.read_tensors(self._product(job, MODEL) / OPTIMIZER_NAME))
        constraint = None
        if AUXILIARY in job.reads:
            base = self._model(before)
            auxiliary = load_auxiliary_model(self._product(job, AUXILIARY), base, self.tokenizer)
            constraint = Constraint(base, auxiliary, SampleSet.load(self._product(job, SAMPLES)))
        figures |= tune(
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
        return {**figures, "corpus_perplexity": corpus_perplexity(model, held_out)}

    def _trainable(self, step: int) -> PreTrainedModel:
        if self.config.lora is None:
            return self._model(step).requires_grad_(True)
        base = self._model(0)
        if step > 0:
            return load_adapter(base, product_folder(self.work, MODEL, step) / ADAPTER)
        return add_adapter(base, self.config.lora, seed=self.config.seed_of(MODEL, 0))


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write an ordinary transformers checkpoint with safetensors."""
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def thin_satisfied(samples: SampleSet, share: float, *, seed: int) -> SampleSet:
    """Keep all samples but a share of those that satisfy the constraint; weights make up for what is left out."""
    if share >= 1.0:
        return samples
    satisfied = samples.satisfaction >= _SATISFIED  # nan is not
    drawn = torch.from_numpy(np.random.default_rng([seed, 25]).random(len(satisfied)) < share)
    log_weights = samples.log_weights - math.log(share) * satisfied.to(samples.log_weights.dtype)
    return dataclasses.replace(samples, log_weights=log_weights).rows(~satisfied | drawn)
