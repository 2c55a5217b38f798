"""Attribute-controlled fine-tuning from texts to a checkpoint, in one process or several, resumably."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibfuse import hub
from calibfuse.errors import CheckpointError, DataError, InputError
from calibfuse.finetune.corpus import PackedCorpus, pack_corpus
from calibfuse.finetune.lora import import_peft
from calibfuse.finetune.parallel import find_devices, in_processes
from calibfuse.finetune.roles import CORPUS_NAME, OPTIMIZER_NAME, RECORD_NAME, RoleRunner
from calibfuse.finetune.schedule import MODEL, PARALLEL, Job, plan_stages, product_folder
from calibfuse.finetune.settings import FinetuneConfig
from calibfuse.finetune.tuning import check_corpus
from calibfuse.generation.decoding import check_lengths, encode_prompt
from calibfuse.generation.language_model import read_config
from calibfuse.training.work_folder import SETTINGS_NAME, is_begun, remove_leftovers, write_json
from calibfuse.value.oracle import Oracle

logger = logging.getLogger(__name__)

REPORT_NAME = "finetune.json"


def run_finetuning(
    config: FinetuneConfig,
    documents: Iterable[str],
    prompts: Sequence[str],
    output: str | os.PathLike[str],
    *,
    corpus_name: str = "",
    oracle: Oracle | None = None,
    resume: bool = False,
    device: str | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Fine-tune a model on a corpus under a constraint.

    Args:
        config: everything but the texts.
        documents: the corpus; not read when a resumed run has packed it.
        prompts: to draw samples from; may be empty where the KL weight is 0.
        output: folder of the result; products of the steps go to `work/step-N/{samples,auxiliary,model}` inside it.
        corpus_name: what the corpus is, for the report; a run is resumed only with the same.
        oracle: an object in place of `config.oracle`; only for the sequential schedule, because other processes load
            the oracle anew.
        resume: go on from the last complete products in the output folder.
        device: "cpu", "cuda:0", or several with commas for the parallel schedule; None: all GPUs, else MPS or the CPU.
        show_progress: draw progress bars on standard error.

    Returns:
        What also stands in finetune.json: settings, perplexities, seconds, figures of the roles.

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
    settings = asdict(config) | {"prompts": list(prompts), "corpus": corpus_name}
    runner = RoleRunner(config, prompts, work, devices[0], oracle=oracle, show_progress=show_progress)
    if not is_begun(work, settings, resume=resume):
        _pack(runner, documents, show_progress=show_progress).save(work / CORPUS_NAME)
        write_json(work / SETTINGS_NAME, settings)  # last, as the mark that all is there
    stages = plan_stages(config.schedule, config.iterations, constrained=config.is_constrained)
    logger.info("what is complete lies in %s, and resume goes on from it after a stop", work)
    remove_leftovers(work)
    is_parallel = config.schedule == PARALLEL and config.is_constrained
    try:
        with in_processes(config, prompts, work, devices) if is_parallel else contextlib.nullcontext(runner.run) as run:
            execute(stages, work, run)
    finally:
        remove_leftovers(work)
    _publish(product_folder(work, MODEL, config.iterations), output)
    report = _report(config, work, stages, corpus_name, len(prompts))
    write_json(output / REPORT_NAME, report)
    return report


def _check(config: FinetuneConfig, oracle: Oracle | None, prompts: Sequence[str]) -> None:
    if config.lora is not None:
        import_peft()
    if config.is_constrained and oracle is None and config.oracle is None:
        raise InputError("A KL weight above 0 needs an oracle that labels the samples; with weight 0 none is used.")
    if config.filter_corpus is not None and oracle is None and config.oracle is None:
        raise InputError("filter_corpus needs an oracle, which judges the documents.")
    if config.is_constrained and not prompts:
        raise DataError("Fine-tuning with a KL weight above 0 needs prompts to draw samples from, got none.")
    if oracle is not None and config.schedule == PARALLEL:
        raise InputError(
            "The parallel schedule loads the oracle in another process: give it in the settings, as the name of a "
            "scorer or as 'module:function', not as an object."
        )


def _pack(runner: RoleRunner, documents: Iterable[str], *, show_progress: bool) -> PackedCorpus:
    config, tokenizer = runner.config, runner.tokenizer
    source, plan = config.model, config.sampling
    if config.is_constrained:
        rows = [encode_prompt(tokenizer, prompt, chat=plan.chat, system=plan.system) for prompt in runner.prompts]
        check_lengths(read_config(source.name, **source.options()), rows, plan.max_new_tokens, "prompt")

    def keep(texts: Sequence[str]) -> NDArray[np.bool_]:  # a document that the oracle cannot label is not trained on
        answer: NDArray[np.bool_] = np.greater_equal(runner.oracle.satisfaction(texts), config.filter_corpus or 0.0)
        return answer

    corpus = pack_corpus(
        documents,
        tokenizer,
        block_length=config.block_length,
        held_out_share=config.held_out_share,
        keep=None if config.filter_corpus is None else keep,
        show_progress=show_progress,
    )
    check_corpus(corpus, config.tuning)
    counts = [f"{count:,}" for count in (corpus.documents, len(corpus.train), len(corpus.held_out))]
    logger.info("corpus: %s documents, %s blocks, %s held out", *counts)
    return corpus


def execute(
    stages: Sequence[Sequence[Job]], work: Path, run: Callable[[Sequence[Job]], dict[str, dict[str, Any]]]
) -> None:
    """Run all jobs whose products are missing, stage by stage."""
    for jobs in stages:
        missing = [job for job in jobs if not job.folder(work).is_dir()]
        for role, record in (run(missing) if missing else {}).items():
            figures = {name: value for name, value in record["figures"].items() if value is not None}
            told = [
                f"{record['seconds']:.1f} s",
                *(f"{name.replace('_', ' ')} {figures[name]:.4g}" for name in figures),
            ]
            logger.info("step %d, %s: %s", jobs[0].step, role, ", ".join(told))
        if jobs[-1].role == MODEL:  # the optimiser's state of the step before is not needed any more
            (product_folder(work, MODEL, jobs[0].step - 1) / OPTIMIZER_NAME).unlink(missing_ok=True)


def _report(
    config: FinetuneConfig, work: Path, stages: Sequence[Sequence[Job]], corpus_name: str, prompt_count: int
) -> dict[str, Any]:
    """Everything that is worth knowing of a finished run; a step takes as long as the slowest job of each stage."""
    corpus = PackedCorpus.load(work / CORPUS_NAME)
    steps: dict[int, dict[str, Any]] = {}
    for stage in stages:
        records = [hub.read_json(job.folder(work) / RECORD_NAME, "record of a role") for job in stage]
        step = steps.setdefault(stage[0].step, {"step": stage[0].step, "seconds": 0.0, "roles": {}})
        step["seconds"] = round(step["seconds"] + max(record["seconds"] for record in records), 3)
        step["roles"] |= {record["role"]: record for record in records}
    first, last = steps[1]["roles"][MODEL]["figures"], steps[config.iterations]["roles"][MODEL]["figures"]
    return {
        "format": "calibfuse-finetune-report",
        "format_version": 1,
        "settings": asdict(config),
        "corpus": {
            "name": corpus_name,
            "documents": corpus.documents,
            "dropped_documents": corpus.dropped,
            "blocks": len(corpus.train),
            "held_out_blocks": len(corpus.held_out),
            "block_length": corpus.block_length,
        },
        "prompts": prompt_count,
        "corpus_perplexity": {"before": first["corpus_perplexity_before"], "after": last["corpus_perplexity"]},
        "seconds": round(sum(step["seconds"] for step in steps.values()), 3),
        "steps": list(steps.values()),
    }


def _publish(model: Path, output: Path) -> None:
    try:
        shutil.copytree(model, output, ignore=shutil.ignore_patterns(RECORD_NAME, OPTIMIZER_NAME), dirs_exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write the tuned model to {str(output)!r}: {error.strerror or error}. It is complete in "
            f"{str(model)!r}; make room and resume."
        ) from error
