"""`calibfuse finetune`: attribute-controlled fine-tuning, from a model, a corpus and an oracle to a model."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from calibfuse.cli.options import Fields, add
from calibfuse.errors import InputError

EXAMPLES = """\
examples:
  # learn from a corpus, away from what the scorer finds toxic
  calibfuse finetune --model org/any-llm --corpus domain.jsonl.xz --oracle bundled --prompts prompts.jsonl \\
      --kl-weight 1 --iterations 3 --output tuned

  # sampling, auxiliary training and fine-tuning at the same time, each on a GPU of its own
  calibfuse finetune --model org/any-llm --corpus domain/ --oracle my_oracle:score --prompts prompts.txt \\
      --schedule parallel --device cuda:0,cuda:1,cuda:2 --output tuned

  # a LoRA adapter in place of full fine-tuning (extra: lora); the result is the merged model, the adapter beside it
  calibfuse finetune --model org/any-llm --corpus domain/ --oracle bundled --prompts prompts.txt --lora 8 --output tuned

  # the two baselines: plain fine-tuning, and on the documents that satisfy the oracle only (DAPT)
  calibfuse finetune --model org/any-llm --corpus domain/ --kl-weight 0 --output plain
  calibfuse finetune --model org/any-llm --corpus domain/ --kl-weight 0 --oracle bundled --filter-corpus 0.5 \\
      --output filtered

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
    "calibfuse.value.samples:SamplingPlan", *("max_new_tokens", "temperature", "chat", "system"), per_prompt="samples"
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
    *("schedule", "iterations", "block_length", "held_out_share", "keep_satisfied", "lora", "filter_corpus"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    add(parser, "resume", "quiet", output={"required": True})
    model = parser.add_argument_group("model")
    add(model, "model", device={"help": "cpu, cuda, or several for the parallel schedule: cuda:0,cuda:1"})
    MODEL.add(model, dtype={"choices": ("float32", "bfloat16", "auto")})
    files = {"nargs": "+", "required": True, "metavar": "FILE", "help": ".txt, .jsonl, .csv, or folders"}
    add(parser.add_argument_group("corpus"), "text_field", corpus=files)
    constraint = parser.add_argument_group("constraint")
    add(constraint, "oracle", "power", "threshold", "continuation_only")
    add(constraint, "prompts", "prompt_count", "min_prompt_toxicity")
    CONSTRAINT.add(constraint)
    run = parser.add_argument_group("run")
    RUN.add(run, schedule={"choices": ("sequential", "parallel"), "help": "roles in turn, or at once"})
    TUNING.add(run, precision={"choices": ("fp32", "bf16")})
    SAMPLING.add(parser.add_argument_group("samples of an iteration"))
    AUXILIARY.add(parser.add_argument_group("auxiliary model"))


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.kl_weight is None or args.kl_weight > 0:
        for value, name in ((args.oracle, "--oracle"), (args.prompts, "--prompts")):
            if value is None:
                raise InputError(f"A --kl-weight above 0 needs {name}; with --kl-weight 0 it is plain fine-tuning.")
    from calibfuse.evaluation.prompts import load_prompts
    from calibfuse.finetune.run import run_finetuning
    from calibfuse.finetune.settings import FinetuneConfig, ModelSource, OracleSource
    from calibfuse.finetune.tuning import TuningConfig
    from calibfuse.generation.language_model import locate
    from calibfuse.textfiles import iter_documents
    from calibfuse.value.auxiliary_training import AuxiliaryTrainingConfig
    from calibfuse.value.samples import SamplingPlan

    logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(message)s")
    oracle = None
    if args.oracle is not None:
        oracle = OracleSource(spec=args.oracle, power=args.power, threshold=args.threshold)
    config = FinetuneConfig(
        model=ModelSource(name=args.model or locate(None)[0], **MODEL.values(args)),
        oracle=oracle,
        tuning=TuningConfig(**TUNING.values(args), **CONSTRAINT.values(args)),
        sampling=SamplingPlan(continuation_only=args.continuation_only, **SAMPLING.values(args)),
        auxiliary=AuxiliaryTrainingConfig(**AUXILIARY.values(args)),
        **RUN.values(args),
    )
    prompts: list[str] = []
    if args.prompts is not None:
        found = load_prompts(
            args.prompts,
            seed=config.tuning.seed,
            count=args.prompt_count or None,
            min_toxicity=args.min_prompt_toxicity,
        )
        prompts = [prompt.text for prompt in found]
    try:
        report = run_finetuning(
            config,
            iter_documents(args.corpus, text_field=args.text_field),
            prompts,
            args.output,
            corpus_name=", ".join(Path(path).name or path for path in args.corpus),
            resume=args.resume,
            device=args.device,
            show_progress=not args.quiet,
        )
    except KeyboardInterrupt:
        print(f"Stopped. Go on with the same command and --resume (complete products in {args.output}/work).")
        return 130
    perplexity = report["corpus_perplexity"]
    if perplexity["before"] is not None:
        print(f"Corpus perplexity on held-out documents: {perplexity['before']:.2f} -> {perplexity['after']:.2f}.")
    for step in report["steps"]:
        roles = ", ".join(f"{role} {record['seconds']:.1f} s" for role, record in step["roles"].items())
        print(f"Step {step['step']}: {step['seconds']:.1f} s ({roles}).")
    print(f"Model written to {args.output}. Try: calibfuse evaluate --model {args.output} --alpha 0")
    return 0
