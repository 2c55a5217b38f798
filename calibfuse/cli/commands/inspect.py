"""`calibfuse inspect`: what a calibrator is, or what it did to a text, token by token."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibfuse.cli.loading import DECODING, check_fusion, check_model, decoding_of, load_fusion, load_model
from calibfuse.cli.options import add, add_calibrator, add_model
from calibfuse.cli.terminal import Mask, Terminal, masking, printable
from calibfuse.errors import InputError
from calibfuse.generation.decoding import Decoding, check_lengths

if TYPE_CHECKING:
    from calibfuse.generation.language_model import LanguageModel
    from calibfuse.inspection import StepTrace
    from calibfuse.processor import CalibFusion

EXAMPLES = """\
examples:
  calibfuse inspect "My neighbour is such a" --model org/any-llm
  calibfuse inspect "My neighbour is such a" --continuation " nice person"     # on the bundled demo target
  calibfuse inspect "My neighbour is such a" --calibrator ./my-calibrator --html trace.html
  calibfuse inspect                                                            # what the bundled calibrator is
  calibfuse inspect --calibrator ./my-calibrator --json
"""

_MOVED = 0.1  # nats: smaller shifts get no colour


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    help_ = "trace what the calibrator does after this text (none: describe the calibrator)"
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help=help_)
    add(parser, continuation={"metavar": "TEXT", "help": "trace this text after the prompt; nothing is generated"})
    add_model(parser)
    add_calibrator(parser)
    decoding = parser.add_argument_group("decoding")
    DECODING.add(decoding)
    add(decoding, "greedy")
    output = parser.add_argument_group("output")
    page = {"metavar": "FILE", "help": "write a page that needs no other file"}
    top = {"type": int, "default": 5, "metavar": "N", "help": "candidates per step"}
    add(output, "json", "mask", html=page, top=top)


def run(args: argparse.Namespace) -> int:
    """Describe a calibrator, or trace it."""
    prompts: list[str] = args.prompt
    if len(prompts) > 1:
        raise InputError(f"inspect follows one prompt, got {len(prompts)}; put it into quotation marks.")
    if prompts:
        return _trace(args, prompts[0])
    for name in ("continuation", "html", "chat", "model"):
        if getattr(args, name):
            raise InputError(f'--{name} is for tracing a text, which needs one: calibfuse inspect "a prompt" ...')
    return _describe(args)


def _describe(args: argparse.Namespace) -> int:
    from calibfuse.calibrator import Calibrator
    from calibfuse.inspection import describe_calibrator

    facts = describe_calibrator(Calibrator.from_pretrained(args.calibrator))
    terminal = Terminal()
    if args.json:
        terminal.write(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    terminal.heading(args.calibrator or "the calibrator bundled with calibfuse")
    for line in _flat(facts):
        terminal.write(printable(line))
    return 0


def _flat(values: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", *_flat(value, indent + "  ")]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{indent}{key}: {f'{shown:,}' if type(shown) is int else shown}")
    return lines


def _trace(args: argparse.Namespace, prompt: str) -> int:
    decoding = decoding_of(args)
    check_fusion(args)
    if args.top < 1:
        raise InputError(f"--top must be at least 1, got {args.top}.")
    if (args.chat or args.system) and args.continuation is not None:
        raise InputError("--chat and --continuation exclude each other.")
    if not prompt.strip():
        raise InputError("The prompt is blank; give the model at least one word to continue.")
    mask = masking(args.mask)
    page = Path(args.html).expanduser() if args.html else None
    if page is not None and page.is_dir():
        raise InputError(f"--html expects a file, but {args.html!r} is a folder.")
    if page is not None:
        from calibfuse.html import require

        require("jinja2")
    check_model(args)
    target = load_model(args, args.model)
    given = args.continuation
    ids = decoding.encode(target.tokenizer, prompt + (given or ""))
    check_lengths(target.model, [ids], decoding.max_new_tokens if given is None else 0, "prompt")
    fusion = load_fusion(args, target)
    from calibfuse.inspection import trace_generation, trace_page

    options: dict[str, Any] = {"continuation": given}
    if given is None:
        options = {**decoding.options(), "pad_token_id": target.tokenizer.pad_token_id, "seed": decoding.seed}
    traced = ids if given is None else prompt
    steps = trace_generation(target.model, target.tokenizer, fusion, traced, top=args.top, **options)
    settings = _settings(args, decoding, target, fusion)
    if page is not None:
        from calibfuse.hub import write_files

        text = trace_page(steps, prompt=prompt, metadata=settings, mask=mask)
        write_files(page.parent, {page.name: text.encode("utf-8")})
    terminal = Terminal()
    if args.json:
        record = {"prompt": prompt, "fusion": fusion.config.to_dict(), "steps": [step.to_dict() for step in steps]}
        terminal.write(json.dumps(record, ensure_ascii=False))
    else:
        _show_steps(terminal, prompt, steps, settings, mask)
        if page is not None:
            terminal.write(f"written to {page}")
    return 0


def _settings(
    args: argparse.Namespace, decoding: Decoding, target: LanguageModel, fusion: CalibFusion
) -> dict[str, str]:
    config = fusion.config
    count = config.candidates
    candidates = "candidates by probability" if count is None else f"{count or 'all'} candidates"
    drawn = "greedy" if args.greedy else f"sampling, seed {decoding.seed}"
    return {
        "target": target.name,
        "calibrator": args.calibrator or "bundled",
        "fusion": f"{config.mode}, alpha {config.alpha:g}, {candidates}",
        **({"decoding": drawn} if args.continuation is None else {"continuation": "given"}),
    }


def _show_steps(
    terminal: Terminal, prompt: str, steps: Sequence[StepTrace], settings: Mapping[str, str], mask: Mask
) -> None:
    from calibfuse.inspection import mask_pieces

    terminal.note(", ".join(f"{name}: {value}" for name, value in settings.items()))
    terminal.note("log-probabilities in nats; the heads' are among the movable candidates; > marks the chosen token")
    text = prompt
    for number, step in enumerate(steps, start=1):
        terminal.write()
        terminal.heading(f"step {number}: changed by {step.divergence:.3f} nats, {100 * step.moved_mass:.1f} % moved")
        _show_candidates(terminal, step, text, mask)
        text += step.text
    pieces = mask_pieces([prompt, *(step.text for step in steps)], mask)
    shown = [terminal.style(printable(pieces[0], keep_lines=True), "dim")]
    for step, piece in zip(steps, pieces[1:], strict=True):
        colour = ["red"] if step.divergence >= _MOVED else []
        shown.append(terminal.style(printable(piece, keep_lines=True), *colour))
    terminal.write()
    terminal.write("".join(shown))


def _show_candidates(terminal: Terminal, step: StepTrace, before: str, mask: Mask) -> None:
    from calibfuse.inspection import mask_in_context

    heads = list(next((each.heads for each in step.candidates if each.heads), {}))
    rows, styles = [], []
    for each in step.candidates:
        label = repr(printable(mask_in_context(before, each.text, mask).replace("\n", "⏎")))
        is_chosen = each == step.chosen
        said = [f"{each.heads[head]:.2f}" if head in each.heads else "" for head in heads]
        shift = f"{each.shift:+.2f}"
        rank = f"{each.plain_rank} -> {each.fused_rank}"
        mark = ">" if is_chosen else " "
        rows.append((f"{mark} {label}", f"{each.plain:.2f}", *said, shift, f"{each.fused:.2f}", rank))
        usual = None if each.is_movable else "dim"
        moved = usual if abs(each.shift) < _MOVED else "red" if each.shift < 0 else "green"
        styles.append(["bold" if is_chosen else usual, usual, *[usual] * len(heads), moved, usual, usual])
    terminal.table(("  candidate", "plain", *heads, "shift", "fused", "rank"), rows, styles=styles)
