"""`calibfuse finetune`: attribute-controlled fine-tuning, from a model, a corpus and an oracle to a model."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibfuse.cli.options import SWITCH, Fields, add
from calibfuse.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from calibfuse.finetune.corpus import Keep
    from calibfuse.finetune.settings import FinetuneConfig

EXAMPLES = """\
examples:
  # learn from a corpus, away from what the scorer finds toxic
  calibfuse finetune --model org/any-llm --corpus domain.jsonl.xz --oracle bundled --prompts prompts.jsonl \\
      --kl-weight 1 --iterations 3 --output tuned

  # sampling, auxiliary training and fine-tuning at the same time, each on a GPU of its own
  calibfuse finetune --model org/any-llm --corpus domain/ --oracle my_oracle:score --prompts prompts.txt \\
      --schedule parallel --device cuda:0,cuda:1,cuda:2 --output tuned

  # a LoRA adapter in place of full fine-tuning (extra: lora); the result is the merged model, the adapter beside it
  calibfuse finetune --model org/any-llm --corpus domain/ --oracle bundled --prompts prompts.txt --lora 8 \\
      --save-adapter --output tuned

  # the two baselines: plain fine-tuning, and on the documents that satisfy the oracle only (DAPT)
  calibfuse finetune --model org/any-llm --corpus domain/ --kl-weight 0 --output plain
  calibfuse finetune --model org/any-llm --corpus domain/ --kl-weight 0 --oracle bundled --filter-corpus 0.5 \\
      --output filtered

  # go on after a kill or Ctrl-C, with the same arguments
  calibfuse finetune ... --output tuned --resume

The output is an ordinary transformers checkpoint with a report, finetune.json. Its folder work/ holds the products of
each step and can be deleted after the run.
"""


MODEL = Fields("calibfuse.finetune.settings:ModelSource", "dtype", "trust_remote_code")
TUNING = Fields(
    "calibfuse.finetune.tuning:TuningConfig",
    *("steps", "batch_size", "sample_batch_size", "learning_rate", "precision", "seed"),
)
CONSTRAINT = Fields(TUNING.source, "kl_weight", "strength")
SAMPLING = Fields(
    "calibfuse.value.samples:SamplingPlan",
    *("max_new_tokens", "temperature", "chat", "system"),
    per_prompt="samples",
)
AUXILIARY = Fields(
    "calibfuse.value.auxiliary_training:AuxiliaryTrainingConfig",
    "consistency_weight",
    steps="auxiliary_steps",
    batch_size="auxiliary_batch_size",
    learning_rate="auxiliary_learning_rate",
)
RUN = Fields(
    "calibfuse.finetune.settings:FinetuneConfig",
    *("schedule", "iterations", "block_length", "held_out_share", "keep_satisfied"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    add(parser, "resume", "quiet", output={"required": True})
    model = parser.add_argument_group("model")
    add(model, "model")
    add(model, device={"help": "cpu, cuda, or several for the parallel schedule: cuda:0,cuda:1"})
    MODEL.add(model, dtype={"choices": ("float32", "bfloat16", "auto")})
    add(model, threads={"type": int, "metavar": "N", "help": "CPU threads of all roles together"})
    lora = {"type": int, "metavar": "RANK", "help": "train an adapter of this rank (extra: lora), not the whole model"}
    add(model, lora=lora, save_adapter=SWITCH | {"help": "also leave the adapter in DIR/adapter"})
    corpus = parser.add_argument_group("corpus")
    files = {"nargs": "+", "required": True, "metavar": "FILE", "help": ".txt, .jsonl, .csv, folders, hf:NAME"}
    add(corpus, "text_field", corpus=files)
    condition = {"type": float, "metavar": "C", "help": "train only on documents that the oracle gives at least C"}
    add(corpus, filter_corpus=condition)
    constraint = parser.add_argument_group("constraint")
    add(constraint, "oracle", "power", "threshold", "continuation_only")
    add(constraint, "prompts", "prompt_count", "min_prompt_toxicity")
    CONSTRAINT.add(constraint)
    run = parser.add_argument_group("run")
    schedules = {"choices": ("sequential", "parallel"), "help": "roles in turn, or at once (default: sequential)"}
    RUN.add(run, schedule=schedules)
    TUNING.add(run, precision={"choices": ("fp32", "bf16")})
    SAMPLING.add(parser.add_argument_group("samples of an iteration"))
    AUXILIARY.add(parser.add_argument_group("auxiliary model"))


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads must be at least 1, got {args.threads}.")
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when torch is first used
    _check(args)
    config = _config(args)
    import torch

    from calibfuse.evaluation.prompts import load_prompts
    from calibfuse.finetune.run import run_finetuning
    from calibfuse.textfiles import iter_documents

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(message)s")
    prompts: list[str] = []
    if args.prompts is not None:
        options: dict[str, Any] = {"count": args.prompt_count or None, "min_toxicity": args.min_prompt_toxicity}
        found = load_prompts(args.prompts, seed=config.tuning.seed, **options)
        prompts = [prompt.text for prompt in found]
    try:
        result = run_finetuning(
            config,
            iter_documents(args.corpus, text_field=args.text_field),
            prompts,
            args.output,
            corpus_name=_corpus_name(args),
            keep=_filter(args),
            save_adapter=args.save_adapter,
            resume=args.resume,
            device=args.device,
            show_progress=not args.quiet,
        )
    except KeyboardInterrupt:
        print(f"Stopped. Go on with the same command and --resume (complete products in {args.output}/work).")
        return 130
    perplexity = result.report["corpus_perplexity"]
    if perplexity["before"] is not None:
        print(f"Corpus perplexity on held-out documents: {perplexity['before']:.2f} -> {perplexity['after']:.2f}.")
    for step in result.report["steps"]:
        roles = ", ".join(f"{role} {record['seconds']:.1f} s" for role, record in step["roles"].items())
        print(f"Step {step['step']}: {step['seconds']:.1f} s ({roles}).")
    print(f"Model written to {result.output}. Try: calibfuse evaluate --model {result.output} --alpha 0")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that do not go together, before anything heavy is loaded."""
    if args.kl_weight is None or args.kl_weight > 0:
        for value, name in ((args.oracle, "--oracle"), (args.prompts, "--prompts")):
            if value is None:
                raise InputError(f"A --kl-weight above 0 needs {name}; with --kl-weight 0 it is plain fine-tuning.")
    if args.filter_corpus is not None:
        if args.oracle is None:
            raise InputError("--filter-corpus needs --oracle, which judges the documents.")
        if not 0.0 < args.filter_corpus <= 1.0:
            raise InputError(f"--filter-corpus must be above 0 and at most 1, got {args.filter_corpus}.")
    if args.save_adapter and args.lora is None:
        raise InputError("--save-adapter needs --lora; without it there is no adapter.")


def _config(args: argparse.Namespace) -> FinetuneConfig:
    from calibfuse.finetune.lora import LoraSettings
    from calibfuse.finetune.settings import FinetuneConfig, ModelSource, OracleSource
    from calibfuse.finetune.tuning import TuningConfig
    from calibfuse.value.auxiliary_training import AuxiliaryTrainingConfig
    from calibfuse.value.samples import SamplingPlan

    oracle = None
    if args.oracle is not None:
        oracle = OracleSource(spec=args.oracle, power=args.power, threshold=args.threshold)
    return FinetuneConfig(
        model=ModelSource(name=args.model or _bundled_target(), **MODEL.values(args)),
        oracle=oracle,
        tuning=TuningConfig(**TUNING.values(args), **CONSTRAINT.values(args)),
        sampling=SamplingPlan(continuation_only=args.continuation_only, **SAMPLING.values(args)),
        auxiliary=AuxiliaryTrainingConfig(**AUXILIARY.values(args)),
        lora=None if args.lora is None else LoraSettings(rank=args.lora, alpha=2.0 * args.lora),
        **RUN.values(args),
    )


def _bundled_target() -> str:
    from calibfuse.generation.language_model import DEMO_TARGET
    from calibfuse.hub import resolve_checkpoint

    return str(resolve_checkpoint(None, default=DEMO_TARGET))


def _corpus_name(args: argparse.Namespace) -> str:
    names = ", ".join(Path(path).name or path for path in args.corpus)
    return names if args.filter_corpus is None else f"{names}, C of at least {args.filter_corpus:g}"


def _filter(args: argparse.Namespace) -> Keep | None:
    """Which documents satisfy the oracle; one that it cannot label is not trained on."""
    if args.filter_corpus is None:
        return None
    from calibfuse.value.oracle import load_oracle

    oracle = load_oracle(args.oracle, power=args.power, threshold=args.threshold, device=args.device)

    def keep(texts: Sequence[str]) -> NDArray[np.bool_]:
        answer: NDArray[np.bool_] = oracle.satisfaction(texts) >= args.filter_corpus
        return answer

    return keep
