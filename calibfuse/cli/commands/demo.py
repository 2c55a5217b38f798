"""`calibfuse demo`: a small language model continues a few prompts with and without the calibrator, side by side.

Everything it needs comes with the package: a demo target trained on unfiltered text, a calibrator, a toxicity scorer
and prompts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibfuse.cli.masking import Mask, masking
from calibfuse.cli.terminal import Terminal, printable
from calibfuse.errors import CheckpointError, InputError
from calibfuse.generation.decoding import Decoding

if TYPE_CHECKING:
    from calibfuse.cli.comparison import Outcome

EXAMPLES = """\
examples:
  calibfuse demo
  calibfuse demo --alpha 2 --seed 1
  calibfuse demo --prompts 5 --samples 4 --unmasked

The models are tiny, so that this takes less than a minute. For figures that mean something, run `calibfuse evaluate`
on your own model; `calibfuse generate` continues your own prompts.
"""

PROMPTS_FILE = "demo-prompts.json"
PROMPTS_FORMAT = "calibfuse-demo-prompts"
_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    parser.add_argument(
        "--prompts", type=int, default=30, metavar="N", help="of the bundled ones (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=10, metavar="N", help="per prompt (default: %(default)s)")
    parser.add_argument("--alpha", type=float, help="strength; 0 is off (default: what the calibrator recommends)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--unmasked", action="store_true", help="show offensive words as they are")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Load, continue, show."""
    started = time.monotonic()
    decoding = _decoding(args)
    prompts = bundled_prompts(args.prompts)
    import torch

    from calibfuse.calibrator import BoundCalibrator
    from calibfuse.cli.comparison import TOXIC_FROM, continue_both, score
    from calibfuse.generation.language_model import load_language_model
    from calibfuse.processor import CalibFusion
    from calibfuse.scorers import load_scorer

    # Such small models gain nothing from a second thread, and on a busy machine threads that wait for each other lose
    # most of the speed.
    torch.set_num_threads(1)
    scorer = load_scorer("bundled")
    mask = masking(not args.unmasked, scorer)
    target = load_language_model(None, device="cpu")
    fusion = CalibFusion.from_pretrained(tokenizer=target.tokenizer, alpha=args.alpha)
    outcomes = continue_both(target, fusion, prompts, decoding, args.seed, show_progress=not args.no_progress)
    for outcome in outcomes.values():
        score(outcome, scorer)
    terminal = Terminal()
    _show_pairs(terminal, prompts, outcomes, mask)
    _show_table(terminal, outcomes)
    terminal.write()
    config = fusion.config
    assert isinstance(fusion.guide, BoundCalibrator)  # as every universal calibrator is
    sizes = [sum(each.numel() for each in model.parameters()) for model in (target.model, fusion.guide.calibrator)]
    terminal.note(
        f"The demo target has {sizes[0] / 1e6:.1f} M parameters, the calibrator {sizes[1] / 1e6:.1f} M; beside a model "
        "of usual size the loss of speed is far smaller."
    )
    terminal.note(
        f"{len(prompts)} prompts x {decoding.samples} continuations of at most {decoding.max_new_tokens} "
        f"tokens, top-p {decoding.top_p:g}, seed {args.seed}; mode {config.mode}, alpha {config.alpha:g}; scorer "
        f"{scorer.name!r}, toxic from {TOXIC_FROM:g}; {time.monotonic() - started:.0f} s in all. These numbers are of "
        "this run on a toy model: another seed gives others. `calibfuse evaluate` measures your model, with intervals; "
        "`calibfuse generate --compare` shows your own prompts."
    )
    return 0


def _decoding(args: argparse.Namespace) -> Decoding:
    for name in ("prompts", "samples", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed must lie in 0..2**32-1, got {args.seed}.")
    if args.alpha is not None:
        from calibfuse.fusion import FusionConfig

        FusionConfig.from_dict({"alpha": args.alpha})
    return Decoding(max_new_tokens=args.max_new_tokens, samples=args.samples)


def bundled_prompts(count: int) -> list[str]:
    """The first prompts of the bundled set.

    Args:
        count: how many.

    Returns:
        `count` prompts.

    Raises:
        InputError: there are fewer.
        CheckpointError: the file is missing from this installation, or damaged.
    """
    from calibfuse.hub import read_config

    folder = Path(__file__).parent.parent.parent / "pretrained"
    prompts = read_config(folder, PROMPTS_FILE, format_name=PROMPTS_FORMAT, supported_version=1).get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise CheckpointError(f"The bundled {PROMPTS_FILE} is damaged: expected a list of prompts.")
    if count > len(prompts):
        raise InputError(f"There are {len(prompts)} bundled prompts, but --prompts asks for {count}.")
    return prompts[:count]


def _show_pairs(terminal: Terminal, prompts: Sequence[str], outcomes: dict[str, Outcome], mask: Mask) -> None:
    from calibfuse.cli.comparison import most_different

    def shown(text: str) -> str:
        return printable(mask(text)).strip()

    pairs = most_different(outcomes, _SHOWN)
    total = len(outcomes["plain"].scores)
    terminal.heading(f"The {len(pairs)} of {total} pairs whose toxicity differs most (same prompt, same random draws)")
    for prompt, sample in pairs:
        terminal.write()
        terminal.write(terminal.style(shown(prompts[prompt]) + " ...", "cyan"))
        columns = []
        for way, name in (("plain", "without calibrator"), ("fused", "with calibrator")):
            outcome = outcomes[way]
            columns.append(
                [f"{name}, toxicity {outcome.toxicity[prompt][sample]:.2f}", shown(outcome.texts[prompt][sample])]
            )
        terminal.side_by_side(*columns)
    terminal.write()


def _show_table(terminal: Terminal, outcomes: dict[str, Outcome]) -> None:
    from calibfuse.cli.comparison import WAYS, speed_kept

    plain, fused = (outcomes[way] for way in WAYS)

    def share(value: float) -> str:
        return f"{100 * value:.1f} %"

    def change(before: float, after: float) -> str:
        return f"{100 * (after / before - 1):+.1f} %" if before else "-"

    rows = [
        (name, form(before), form(after), change(before, after))
        for name, form, before, after in (
            ("toxic continuations", share, plain.toxic_share, fused.toxic_share),
            ("mean toxicity", _three, plain.mean_toxicity, fused.mean_toxicity),
            ("expected maximum toxicity", _three, plain.expected_maximum, fused.expected_maximum),
            ("toxicity probability", share, plain.toxicity_probability, fused.toxicity_probability),
            ("perplexity under the target", _one, plain.perplexity, fused.perplexity),
        )
    ]
    rows.append(
        (
            "tokens per second",
            f"{plain.tokens_per_second:,.0f}",
            f"{fused.tokens_per_second:,.0f}",
            f"{100 * (speed_kept(outcomes) - 1):+.1f} %",
        )
    )
    terminal.table(("", "without", "with", "change"), rows)


def _three(value: float) -> str:
    return f"{value:.3f}"


def _one(value: float) -> str:
    return f"{value:.1f}"
