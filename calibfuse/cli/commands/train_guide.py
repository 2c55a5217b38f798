"""`calibfuse train-guide`: a target model, prompts and an oracle in, a value guide out."""

from __future__ import annotations

import argparse
import logging
from typing import Any

EXAMPLES = """\
examples:
  # a value head on the bundled calibrator; it guides any target, whatever its tokenizer
  calibfuse train-guide --target org/any-llm --oracle bundled --prompts prompts.jsonl --output my-guide

  # your own constraint: a function list[str] -> numbers in [0, 1], nan where it cannot tell
  calibfuse train-guide --target org/any-llm --oracle my_oracle:satisfied --prompts prompts.txt --output my-guide

  # a small language model on the target's own tokens, for this vocabulary only
  calibfuse train-guide --target org/any-llm --oracle bundled --threshold 0.5 --prompts prompts.txt \\
      --kind language-model --parameterisation dinado --output my-guide

  # rarer continuations too, by a higher temperature that the samples' weights undo
  calibfuse train-guide --target org/any-llm --oracle bundled --prompts prompts.txt --temperature 1.3 --output my-guide

  # go on after a kill or Ctrl-C, with the same arguments
  calibfuse train-guide --target org/any-llm --oracle bundled --prompts prompts.jsonl --output my-guide --resume

Then: calibfuse generate --model org/any-llm --calibrator my-guide --compare, or in Python
CalibFusion.from_pretrained("my-guide", tokenizer=tokenizer). Judge the result with another scorer than the oracle.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the guide; made when missing")
    parser.add_argument("--resume", action="store_true", help="go on with the samples and the checkpoint in --output")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    target = parser.add_argument_group("target model")
    target.add_argument(
        "--target", "--model", metavar="PATH_OR_HUB", help="causal language model (default: the demo target)"
    )
    target.add_argument("--revision", help="branch, tag or commit of the target on the Hub")
    target.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    target.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    target.add_argument("--local-files-only", action="store_true", help="never touch the network")
    target.add_argument("--trust-remote-code", action="store_true", help="run Python code that the model brings along")
    constraint = parser.add_argument_group("constraint")
    constraint.add_argument(
        "--oracle", required=True, metavar="SPEC", help="bundled, a scorer's folder or model, or module:function"
    )
    constraint.add_argument(
        "--power", type=float, default=1.0, help="of a scorer: C = 1 - toxicity^POWER (default: %(default)s)"
    )
    constraint.add_argument(
        "--threshold", type=float, metavar="P", help="of a scorer: C = 1 where the toxicity is below, else 0"
    )
    constraint.add_argument(
        "--continuation-only", action="store_true", help="show the oracle the continuation without its prompt"
    )
    _add_run_arguments(parser)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    samples = parser.add_argument_group("samples")
    samples.add_argument(
        "--prompts", required=True, metavar="FILE", help="what samples begin with: .jsonl or .txt, also .gz, .xz"
    )
    samples.add_argument("--prompt-count", type=int, default=500, metavar="N", help="0: all (default: %(default)s)")
    samples.add_argument("--per-prompt", type=int, default=16, metavar="N", help="(default: %(default)s)")
    samples.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="(default: %(default)s)")
    samples.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(default: %(default)s)")
    samples.add_argument("--sampling-batch-size", type=int, default=64, metavar="ROWS", help="(default: %(default)s)")
    guide = parser.add_argument_group("guide")
    guide.add_argument(
        "--kind",
        choices=("calibrator", "language-model"),
        default="calibrator",
        help="a value head on a calibrator, for any vocabulary; or a small LM on the target's (default: %(default)s)",
    )
    guide.add_argument("--calibrator", metavar="PATH_OR_HUB", help="that gets the head (default: the bundled one)")
    guide.add_argument(
        "--backbone",
        metavar="PATH_OR_HUB",
        help="LM with the target's tokens that a language-model begins as",
    )
    guide.add_argument(
        "--parameterisation", choices=("nado", "dinado"), default="nado", help="dinado: language-model only"
    )
    guide.add_argument("--alpha", type=float, default=1.0, help="strength to recommend (default: %(default)s)")
    guide.add_argument("--name", help="name of the guide on its model card")
    guide.add_argument("--license", help="licence of the weights on the model card, e.g. apache-2.0")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=300, help="optimiser steps (default: %(default)s)")
    training.add_argument("--batch-size", type=int, default=32, metavar="SAMPLES", help="(default: %(default)s)")
    training.add_argument("--learning-rate", type=float, default=1e-3, help="peak (default: %(default)s)")
    training.add_argument(
        "--consistency-weight", type=float, default=0.5, metavar="W", help="of the forward consistency (%(default)s)"
    )
    training.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from calibfuse.errors import InputError
    from calibfuse.value.auxiliary_training import AuxiliaryTrainingConfig
    from calibfuse.value.training import GuideConfig, train_guide

    config = GuideConfig(  # bad numbers fail before anything is loaded
        kind=args.kind,
        parameterisation=args.parameterisation,
        per_prompt=args.per_prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        sampling_batch_size=args.sampling_batch_size,
        continuation_only=args.continuation_only,
        alpha=args.alpha,
        training=AuxiliaryTrainingConfig(
            steps=args.steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            consistency_weight=args.consistency_weight,
        ),
        seed=args.seed,
    )
    if args.calibrator is not None and args.kind != "calibrator":
        raise InputError("--calibrator is for --kind calibrator; a language-model takes --backbone.")
    if args.backbone is not None and args.kind != "language-model":
        raise InputError("--backbone is for --kind language-model; a calibrator has a body of its own.")
    from calibfuse.evaluation.prompts import load_prompts
    from calibfuse.generation.language_model import load_language_model
    from calibfuse.value.oracle import load_oracle

    logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(message)s")
    oracle = load_oracle(args.oracle, power=args.power, threshold=args.threshold, device=args.device)
    prompts = [prompt.text for prompt in load_prompts(args.prompts, count=args.prompt_count or None, seed=args.seed)]
    loading: dict[str, Any] = {
        "local_files_only": args.local_files_only,
        "trust_remote_code": args.trust_remote_code,
        "device": args.device,
    }
    target = load_language_model(args.target, dtype=args.dtype, revision=args.revision, **loading)
    backbone = None if args.backbone is None else load_language_model(args.backbone, dtype="float32", **loading).model
    try:
        result = train_guide(
            target.model,
            target.tokenizer,
            prompts,
            oracle,
            args.output,
            config=config,
            calibrator=_calibrator(args),
            backbone=backbone,
            target_name=target.name,
            facts={key: value for key, value in (("name", args.name), ("license", args.license)) if value},
            resume=args.resume,
            show_progress=not args.quiet,
        )
    except KeyboardInterrupt:
        print(f"Stopped. Go on with the same command and --resume (samples and checkpoint in {args.output}/work).")
        return 130
    figures = result.figures
    print(
        f"{figures['samples']:.0f} samples, mean C {figures['mean_satisfaction']:.3f}; held-out cross-entropy "
        f"{figures['held_out_bce']:.4f} nats per token, {figures['prior_bce']:.4f} without a guide."
    )
    if figures["left_out"]:
        print(f"{figures['left_out']:.0f} samples were left out: the oracle could not label them.")
    source = f" --model {args.target}" if args.target else ""
    print(f"Guide written to {args.output}. Try: calibfuse generate{source} --calibrator {args.output} --compare")
    return 0


def _calibrator(args: argparse.Namespace) -> Any:  # noqa: ANN401
    if args.calibrator is None:
        return None
    from calibfuse.calibrator import Calibrator

    return Calibrator.from_pretrained(args.calibrator, local_files_only=args.local_files_only)
