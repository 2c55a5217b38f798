"""`calibfuse finetune`: attribute-controlled fine-tuning, from a model, a corpus and an oracle to a model."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibfuse.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from calibfuse.finetune.corpus import Keep
    from calibfuse.finetune.settings import FinetuneConfig, OracleSource

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the result; made when missing")
    parser.add_argument("--resume", action="store_true", help="go on with the complete products in --output")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", "--target", metavar="PATH_OR_HUB", help="causal language model (default: the demo target)"
    )
    model.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    model.add_argument("--device", help="cpu, cuda, or several for the parallel schedule: cuda:0,cuda:1")
    model.add_argument("--threads", type=int, metavar="N", help="CPU threads of all roles together")
    model.add_argument(
        "--dtype", choices=("float32", "bfloat16", "auto"), default="float32", help="of the weights while they learn"
    )
    model.add_argument("--local-files-only", action="store_true", help="never touch the network")
    model.add_argument("--trust-remote-code", action="store_true", help="run Python code that the model brings along")
    model.add_argument("--lora", type=int, metavar="RANK", help="train an adapter of this rank (extra: lora)")
    model.add_argument("--lora-alpha", type=float, metavar="A", help="its scale (default: twice the rank)")
    model.add_argument("--lora-dropout", type=float, default=0.0, metavar="P", help="(default: %(default)s)")
    model.add_argument("--lora-targets", nargs="+", default=[], metavar="NAME", help="layers (default: all linear)")
    model.add_argument("--save-adapter", action="store_true", help="also leave the adapter in DIR/adapter")
    corpus = parser.add_argument_group("corpus")
    corpus.add_argument("--corpus", nargs="+", required=True, metavar="FILE", help=".txt, .jsonl, .csv, folders, hf:")
    corpus.add_argument("--text-field", help="key or column of the text (default: found by name)")
    corpus.add_argument("--block-length", type=int, default=128, metavar="TOKENS", help="(default: %(default)s)")
    corpus.add_argument("--held-out-share", type=float, default=0.05, metavar="P", help="(default: %(default)s)")
    corpus.add_argument(
        "--filter-corpus", type=float, metavar="C", help="train only on documents that the oracle gives at least C"
    )
    constraint = parser.add_argument_group("constraint")
    constraint.add_argument("--oracle", help="bundled, a scorer's folder or model, or module:function")
    constraint.add_argument("--power", type=float, default=1.0, help="C = 1 - toxicity^POWER (default: %(default)s)")
    constraint.add_argument("--threshold", type=float, metavar="P", help="C = 1 where the toxicity is below, else 0")
    constraint.add_argument(
        "--continuation-only", action="store_true", help="show the oracle the continuation without its prompt"
    )
    constraint.add_argument("--prompts", metavar="FILE", help="what samples begin with: .jsonl or .txt, also .gz, .xz")
    constraint.add_argument("--prompt-count", type=int, default=500, metavar="N", help="0: all (default: %(default)s)")
    constraint.add_argument("--min-prompt-toxicity", type=float, metavar="P", help="only prompts of at least this")
    constraint.add_argument("--kl-weight", type=float, default=1.0, metavar="W", help="0: plain (default: %(default)s)")
    constraint.add_argument("--strength", type=float, default=1.0, metavar="S", help="q = p R^S (default: %(default)s)")
    _add_run_arguments(parser)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument("--schedule", choices=("sequential", "parallel"), default="sequential")
    run.add_argument("--iterations", type=int, default=3, metavar="K", help="(default: %(default)s)")
    run.add_argument("--steps", type=int, default=200, help="optimiser steps of an iteration (default: %(default)s)")
    run.add_argument("--batch-size", type=int, default=8, metavar="BLOCKS", help="(default: %(default)s)")
    run.add_argument("--sample-batch-size", type=int, default=32, metavar="N", help="(default: %(default)s)")
    run.add_argument("--learning-rate", type=float, default=1e-4, help="peak (default: %(default)s)")
    run.add_argument("--weight-decay", type=float, default=0.0, help="(default: %(default)s)")
    run.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    run.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    samples = parser.add_argument_group("samples of an iteration")
    samples.add_argument("--per-prompt", type=int, default=4, metavar="N", help="(default: %(default)s)")
    samples.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="(default: %(default)s)")
    samples.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(default: %(default)s)")
    samples.add_argument(
        "--keep-satisfied",
        type=float,
        default=1.0,
        metavar="P",
        help="share kept of those that satisfy the oracle, weighted accordingly (default: all)",
    )
    samples.add_argument("--sampling-batch-size", type=int, default=64, metavar="ROWS", help="(default: %(default)s)")
    auxiliary = parser.add_argument_group("auxiliary model")
    auxiliary.add_argument("--auxiliary", choices=("language-model", "calibrator"), default="language-model")
    auxiliary.add_argument("--parameterisation", choices=("nado", "dinado"), default="nado")
    auxiliary.add_argument("--auxiliary-steps", type=int, help="optimiser steps of an iteration")
    auxiliary.add_argument("--auxiliary-batch-size", type=int, metavar="N")
    auxiliary.add_argument("--auxiliary-learning-rate", type=float, metavar="RATE")
    auxiliary.add_argument("--consistency-weight", type=float, metavar="W", help="of the forward consistency")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads must be at least 1, got {args.threads}.")
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when torch is first used
    _check(args)
    import torch
    from transformers.utils import logging as transformers_logging

    from calibfuse.evaluation.prompts import load_prompts
    from calibfuse.finetune.run import run_finetuning
    from calibfuse.textfiles import iter_documents

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(message)s")
    prompts: list[str] = []
    if args.prompts is not None:
        found = load_prompts(
            args.prompts, count=args.prompt_count or None, seed=args.seed, min_toxicity=args.min_prompt_toxicity
        )
        prompts = [prompt.text for prompt in found]
    try:
        result = run_finetuning(
            _config(args),
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
    print(f"Model written to {result.output}. Try: calibfuse evaluate --target {result.output} --no-fusion ...")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that do not go together, before anything heavy is imported."""
    if args.kl_weight > 0:
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
    from calibfuse.finetune.settings import AuxiliaryPlan, FinetuneConfig, ModelSource, SamplingPlan
    from calibfuse.finetune.tuning import TuningConfig
    from calibfuse.value.auxiliary_training import AuxiliaryTrainingConfig

    chosen: dict[str, Any] = {
        "steps": args.auxiliary_steps,
        "batch_size": args.auxiliary_batch_size,
        "learning_rate": args.auxiliary_learning_rate,
        "consistency_weight": args.consistency_weight,
    }
    training = AuxiliaryTrainingConfig(**{name: value for name, value in chosen.items() if value is not None})
    lora = None
    if args.lora is not None:
        lora = LoraSettings(
            rank=args.lora,
            alpha=2.0 * args.lora if args.lora_alpha is None else args.lora_alpha,
            dropout=args.lora_dropout,
            targets=tuple(args.lora_targets),
        )
    return FinetuneConfig(
        model=ModelSource(
            name=args.model or _bundled_target(),
            dtype=args.dtype,
            revision=args.revision,
            local_files_only=args.local_files_only,
            trust_remote_code=args.trust_remote_code,
        ),
        oracle=_oracle_source(args),
        schedule=args.schedule,
        iterations=args.iterations,
        tuning=TuningConfig(
            steps=args.steps,
            batch_size=args.batch_size,
            sample_batch_size=args.sample_batch_size,
            kl_weight=args.kl_weight,
            strength=args.strength,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            precision=args.precision,
            seed=args.seed,
        ),
        sampling=SamplingPlan(
            per_prompt=args.per_prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            keep_satisfied=args.keep_satisfied,
            batch_size=args.sampling_batch_size,
        ),
        auxiliary=AuxiliaryPlan(kind=args.auxiliary, parameterisation=args.parameterisation, training=training),
        lora=lora,
        block_length=args.block_length,
        held_out_share=args.held_out_share,
    )


def _oracle_source(args: argparse.Namespace) -> OracleSource | None:
    from calibfuse.finetune.settings import OracleSource

    if args.oracle is None:
        return None
    return OracleSource(
        spec=args.oracle, power=args.power, threshold=args.threshold, continuation_only=args.continuation_only
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
