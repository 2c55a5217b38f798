"""`calibfuse train-guide`: a target model, prompts and an oracle in, a value guide out."""

from __future__ import annotations

import argparse
import logging

from calibfuse.cli.loading import check_calibrator, check_model, load_model
from calibfuse.cli.options import Fields, add, add_model

EXAMPLES = """\
examples:
  # a value head on the bundled calibrator; it guides any target, whatever its tokenizer
  calibfuse train-guide --model org/any-llm --oracle bundled --prompts prompts.jsonl --output my-guide

  # your own constraint: a function list[str] -> numbers in [0, 1], nan where it cannot tell
  calibfuse train-guide --model org/any-llm --oracle my_oracle:satisfied --prompts prompts.txt --output my-guide

  # rarer continuations too, by a higher temperature that the samples' weights undo
  calibfuse train-guide --model org/any-llm --oracle bundled --prompts prompts.txt --temperature 1.3 --output my-guide

Then: calibfuse generate "a prompt" --model org/any-llm --calibrator my-guide --compare, or in Python
CalibFusion.from_pretrained("my-guide", tokenizer=tokenizer). Judge the result with another scorer than the oracle.
"""


GUIDE = Fields("calibfuse.value.training:GuideConfig", "alpha", "seed")
SAMPLES = Fields(GUIDE.source, "max_new_tokens", "temperature", "chat", "system", per_prompt="samples")
TRAINING = Fields(
    "calibfuse.value.auxiliary_training:AuxiliaryTrainingConfig",
    *("steps", "batch_size", "learning_rate", "consistency_weight"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    add(parser, "resume", "quiet", output={"required": True})
    add_model(parser)
    constraint = parser.add_argument_group("constraint")
    add(constraint, "power", "threshold", "continuation_only", oracle={"required": True})
    samples = parser.add_argument_group("samples")
    add(samples, "prompt_count", prompts={"required": True})
    SAMPLES.add(samples)
    guide = parser.add_argument_group("guide")
    GUIDE.add(guide)
    add(guide, "name", "license", calibrator={"help": "that gets the head (default: the bundled one)"})
    TRAINING.add(parser.add_argument_group("training"))


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from calibfuse.value.auxiliary_training import AuxiliaryTrainingConfig
    from calibfuse.value.training import GuideConfig, train_guide

    config = GuideConfig(  # bad numbers fail before anything is loaded
        training=AuxiliaryTrainingConfig(**TRAINING.values(args)),
        continuation_only=args.continuation_only,
        **GUIDE.values(args),
        **SAMPLES.values(args),
    )
    from calibfuse.calibrator import load_universal
    from calibfuse.evaluation.prompts import load_prompts
    from calibfuse.value.oracle import load_oracle

    check_model(args)
    check_calibrator(args.calibrator)

    logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(message)s")
    oracle = load_oracle(args.oracle, power=args.power, threshold=args.threshold, device=args.device)
    prompts = [prompt.text for prompt in load_prompts(args.prompts, count=args.prompt_count or None, seed=config.seed)]
    target = load_model(args, args.model)
    try:
        figures = train_guide(
            target.model,
            target.tokenizer,
            prompts,
            oracle,
            args.output,
            config=config,
            calibrator=load_universal(args.calibrator, why="The value head needs a universal calibrator"),
            target_name=target.name,
            facts={key: value for key, value in (("name", args.name), ("license", args.license)) if value},
            resume=args.resume,
            show_progress=not args.quiet,
        )
    except KeyboardInterrupt:
        print(f"Stopped. Go on with the same command and --resume (samples and checkpoint in {args.output}/work).")
        return 130
    print(
        f"{figures['samples']:.0f} samples, mean C {figures['mean_satisfaction']:.3f}; held-out cross-entropy "
        f"{figures['held_out_bce']:.4f} nats per token, {figures['prior_bce']:.4f} without a guide."
    )
    if figures["left_out"]:
        print(f"{figures['left_out']:.0f} samples were left out: the oracle could not label them.")
    source = f" --model {args.model}" if args.model else ""
    trial = f'calibfuse generate "The new neighbour is"{source} --calibrator {args.output} --compare'
    print(f"Guide written to {args.output}. Try: {trial}")
    return 0
