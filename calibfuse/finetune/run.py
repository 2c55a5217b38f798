"""Attribute-controlled fine-tuning from texts to a checkpoint: stages in order, in one process or several, resumably.

Each product of a role is written under a temporary name and renamed, so a folder that is there is complete, and a
killed run makes nothing twice but what was in the making.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from calibfuse import hub
from calibfuse.errors import CheckpointError, DataError, InputError
from calibfuse.finetune.corpus import Keep, PackedCorpus, pack_corpus
from calibfuse.finetune.lora import ADAPTER, import_peft
from calibfuse.finetune.parallel import ParallelRunner, find_devices, share_out
from calibfuse.finetune.products import (
    CORPUS_NAME,
    OPTIMIZER_NAME,
    PROMPTS_NAME,
    RECORD_NAME,
    SETTINGS_NAME,
    product_folder,
    remove_leftovers,
    write_json,
)
from calibfuse.finetune.roles import RoleRunner
from calibfuse.finetune.schedule import MODEL, PARALLEL, ROLES, Job, Stage, plan_stages
from calibfuse.finetune.settings import FinetuneConfig
from calibfuse.finetune.tuning import check_corpus
from calibfuse.generation.decoding import check_lengths, encode_prompt
from calibfuse.generation.language_model import read_config, read_tokenizer
from calibfuse.value.oracle import Oracle

logger = logging.getLogger(__name__)

REPORT_NAME = "finetune.json"
STEP_NAME = "step.json"
_OWN_FILES = (RECORD_NAME, OPTIMIZER_NAME, ADAPTER)


class StageRunner(Protocol):
    """Runs the jobs of a stage and waits for all of them; the records of roles.py come back."""

    def run(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """Run jobs."""
        ...


@dataclass(frozen=True)
class FinetuneResult:
    """What a run made.

    Attributes:
        output: folder of the tuned model, an ordinary transformers checkpoint.
        report: what also stands in `finetune.json` there: settings, corpus, perplexities, wall time of each step and
            role in seconds, figures of each role.
    """

    output: Path
    report: dict[str, Any]

    @property
    def corpus_perplexity(self) -> float | None:
        """Of the tuned model on the held-out share of the corpus; None without one."""
        value: float | None = self.report["corpus_perplexity"]["after"]
        return value


def run_finetuning(
    config: FinetuneConfig,
    documents: Iterable[str],
    prompts: Sequence[str],
    output: str | os.PathLike[str],
    *,
    corpus_name: str = "",
    keep: Keep | None = None,
    oracle: Oracle | None = None,
    save_adapter: bool = False,
    resume: bool = False,
    device: str | None = None,
    show_progress: bool = False,
) -> FinetuneResult:
    """Fine-tune a model on a corpus under a constraint.

    Args:
        config: everything but the texts.
        documents: the corpus; not read when a resumed run has packed it.
        prompts: to draw samples from; may be empty where the KL weight is 0.
        output: folder of the result; products of the steps go to `work/step-N/{samples,auxiliary,model}` inside it.
        corpus_name: what the corpus is, for the report; a run is resumed only with the same.
        keep: which documents to train on; see `pack_corpus`.
        oracle: an object in place of `config.oracle`; only for the sequential schedule, because other processes load
            the oracle anew.
        save_adapter: with LoRA, also leave the adapter in `adapter/` of the output.
        resume: go on from the last complete products in the output folder.
        device: "cpu", "cuda:0", or several with commas for the parallel schedule; None: all GPUs, else MPS or the CPU.
        show_progress: draw progress bars on standard error.

    Returns:
        The folder and the report.

    Raises:
        InputError: settings that do not fit together, prompts that are too long, or a loss that diverged.
        DataError: the corpus is too short, or there are no prompts.
        ScorerError: the oracle failed.
        CheckpointError: files that cannot be read or written, or products of another run.
        MissingDependencyError: LoRA without peft.
        KeyboardInterrupt: Ctrl-C; all processes have ended, complete products are kept.
    """
    _check(config, oracle, prompts)
    devices = find_devices(device)
    output = Path(output)
    work = output / "work"
    is_begun = (work / SETTINGS_NAME).exists()
    if resume and not is_begun:
        raise CheckpointError(f"There is nothing to go on from in {str(output)!r} yet: run it without resume.")
    if is_begun and not resume:
        raise CheckpointError(
            f"{str(output)!r} holds the products of an earlier fine-tuning: go on with resume, or choose another "
            "output folder."
        )
    if is_begun:
        _check_same_run(work, config, prompts, corpus_name)
        remove_leftovers(work)
    else:
        _prepare(config, documents, prompts, work, corpus_name, keep, show_progress=show_progress)
    stages = plan_stages(config.schedule, config.iterations, constrained=config.is_constrained)
    logger.info("%d steps; what is complete lies in %s, and resume goes on from it after a stop", stages[-1].step, work)
    try:
        execute(stages, work, lambda: _runner(config, work, devices, oracle, show_progress))
    finally:
        remove_leftovers(work)
    report = _report(config, work, stages)
    _publish(product_folder(work, MODEL, config.iterations), output, save_adapter=save_adapter)
    write_json(output / REPORT_NAME, report)
    return FinetuneResult(output, report)


def _check(config: FinetuneConfig, oracle: Oracle | None, prompts: Sequence[str]) -> None:
    if config.lora is not None:
        import_peft()
    if config.is_constrained and oracle is None and config.oracle is None:
        raise InputError("A KL weight above 0 needs an oracle that labels the samples; with weight 0 none is used.")
    if config.is_constrained and not prompts:
        raise DataError("Fine-tuning with a KL weight above 0 needs prompts to draw samples from, got none.")
    if oracle is not None and config.schedule == PARALLEL:
        raise InputError(
            "The parallel schedule loads the oracle in another process: give it in the settings, as the name of a "
            "scorer or as 'module:function', not as an object."
        )


def _prepare(
    config: FinetuneConfig,
    documents: Iterable[str],
    prompts: Sequence[str],
    work: Path,
    corpus_name: str,
    keep: Keep | None,
    *,
    show_progress: bool,
) -> None:
    """Check and write what the roles read; the settings last, as the mark that all is there."""
    source, plan = config.model, config.sampling
    tokenizer = read_tokenizer(source.name, **source.options())
    if config.is_constrained:
        rows = [encode_prompt(tokenizer, prompt, chat=plan.chat, system=plan.system) for prompt in prompts]
        check_lengths(read_config(source.name, **source.options()), rows, plan.max_new_tokens, "prompt")
    corpus = pack_corpus(
        documents,
        tokenizer,
        block_length=config.block_length,
        held_out_share=config.held_out_share,
        keep=keep,
        show_progress=show_progress,
    )
    check_corpus(corpus, config.tuning)
    counts = [f"{count:,}" for count in (corpus.documents, len(corpus.train), len(corpus.held_out))]
    logger.info("corpus: %s documents, %s blocks, %s held out", *counts)
    corpus.save(work / CORPUS_NAME)
    write_json(work / PROMPTS_NAME, {"prompts": list(prompts), "corpus_name": corpus_name})
    write_json(work / SETTINGS_NAME, config.to_dict())


def _check_same_run(work: Path, config: FinetuneConfig, prompts: Sequence[str], corpus_name: str) -> None:
    before = FinetuneConfig.from_dict(hub.read_json(work / SETTINGS_NAME, "settings of a fine-tuning run")).to_dict()
    texts = hub.read_json(work / PROMPTS_NAME, "prompts of a fine-tuning run")
    different = [key for key, value in config.to_dict().items() if value != before[key]]
    different += ["prompts"] if texts["prompts"] != list(prompts) else []
    different += ["corpus"] if texts["corpus_name"] != corpus_name else []
    if different:
        raise InputError(
            f"The products in {str(work)!r} were made with other settings ({', '.join(different)}); resume with the "
            "same ones, or choose another output folder."
        )


@contextlib.contextmanager
def _runner(
    config: FinetuneConfig, work: Path, devices: Sequence[str], oracle: Oracle | None, show_progress: bool
) -> Iterator[StageRunner]:
    """What runs the jobs: this process, or one process for each role."""
    if config.schedule == PARALLEL and config.is_constrained:
        places = share_out(devices, torch.get_num_threads())
        for role, place in places.items():
            logger.info("role %s: %s, %d thread(s)", role, place.device, place.threads)
        with ParallelRunner(work, places) as runner:
            yield runner
    else:
        yield InProcess(RoleRunner(work, devices[0], oracle=oracle, show_progress=show_progress))


class InProcess:
    """One job after the other, here."""

    def __init__(self, runner: RoleRunner) -> None:
        self._runner = runner

    def run(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """See `StageRunner.run`."""
        return {job.role: self._runner.run(job) for job in jobs}


def execute(
    stages: Sequence[Stage],
    work: Path,
    make_runner: Callable[[], contextlib.AbstractContextManager[StageRunner]],
) -> None:
    """Run all jobs whose products are missing, stage by stage, and note how long each step took."""
    if not any(_missing_jobs(work, stage) for stage in stages):
        return
    seconds: dict[int, float] = {}
    with make_runner() as runner:
        for stage, following in zip(stages, (*stages[1:], None), strict=True):
            jobs = _missing_jobs(work, stage)
            wall = 0.0
            if jobs:
                began = time.perf_counter()
                records = runner.run(jobs)
                wall = time.perf_counter() - began
                for role, record in records.items():
                    logger.info("step %d, %s: %s", stage.step, role, _summary(record))
            # jobs that an earlier run has done took as long as they say
            done = [float(_record(work, job)["seconds"]) for job in stage.jobs if job not in jobs]
            seconds[stage.step] = seconds.get(stage.step, 0.0) + max([wall, *done])
            if following is None or following.step != stage.step:
                _finish_step(work, stage.step, seconds[stage.step])


def _summary(record: Mapping[str, Any]) -> str:
    """One line of a record: seconds, then figures."""
    figures = (
        f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in record["figures"].items()
        if value is not None
    )
    return ", ".join([f"{record['seconds']:.1f} s", *figures])


def _missing_jobs(work: Path, stage: Stage) -> list[Job]:
    return [job for job in stage.jobs if not product_folder(work, job.role, job.step).is_dir()]


def _finish_step(work: Path, step: int, seconds: float) -> None:
    """Mark a step as complete; the optimiser's state of the step before is not needed any more."""
    place = work / f"step-{step}" / STEP_NAME
    if place.exists():
        return
    write_json(place, {"step": step, "seconds": round(seconds, 3)})
    (product_folder(work, MODEL, step - 1) / OPTIMIZER_NAME).unlink(missing_ok=True)
    logger.info("step %d: %.1f s", step, seconds)


def _record(work: Path, job: Job) -> dict[str, Any]:
    return hub.read_json(product_folder(work, job.role, job.step) / RECORD_NAME, "record of a role")


def _report(config: FinetuneConfig, work: Path, stages: Sequence[Stage]) -> dict[str, Any]:
    """Everything that is worth knowing of a finished run."""
    corpus = PackedCorpus.load(work / CORPUS_NAME)
    texts = hub.read_json(work / PROMPTS_NAME, "prompts of a fine-tuning run")
    steps = []
    for step in dict.fromkeys(stage.step for stage in stages):
        jobs = [job for stage in stages if stage.step == step for job in stage.jobs]
        roles = {job.role: _record(work, job) for job in sorted(jobs, key=lambda job: ROLES.index(job.role))}
        mark = hub.read_json(work / f"step-{step}" / STEP_NAME, "mark of a step")
        steps.append({"step": step, "seconds": mark["seconds"], "roles": roles})
    first, last = steps[-config.iterations]["roles"][MODEL], steps[-1]["roles"][MODEL]
    return {
        "format": "calibfuse-finetune-report",
        "format_version": 1,
        "settings": config.to_dict(),
        "corpus": {
            "name": texts["corpus_name"],
            "documents": corpus.documents,
            "dropped_documents": corpus.dropped,
            "blocks": len(corpus.train),
            "held_out_blocks": len(corpus.held_out),
            "block_length": corpus.block_length,
            "fingerprint": corpus.fingerprint,
        },
        "prompts": len(texts["prompts"]),
        "corpus_perplexity": {
            "before": first["figures"]["corpus_perplexity_before"],
            "after": last["figures"]["corpus_perplexity"],
        },
        "seconds": round(sum(step["seconds"] for step in steps), 3),
        "steps": steps,
    }


def _publish(model: Path, output: Path, *, save_adapter: bool) -> None:
    """Copy the last model to the output folder; its configuration comes last."""
    names = sorted(
        (place.name for place in model.iterdir() if place.name not in _OWN_FILES),
        key=lambda name: (name == "config.json", name),
    )
    adapters = [f"{ADAPTER}/{place.name}" for place in (model / ADAPTER).iterdir()] if save_adapter else []
    try:
        for name in [*adapters, *names]:
            target = output / name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                shutil.copyfile(model / name, temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write the tuned model to {str(output)!r}: {error.strerror or error}. It is complete in "
            f"{str(model)!r}; make room and resume."
        ) from error
