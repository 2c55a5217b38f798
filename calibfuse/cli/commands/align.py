"""`calibfuse align`: bind a calibrator to a tokenizer ahead of time, and report how much of it is covered."""

from __future__ import annotations

import argparse
import json
import time

from calibfuse.cli.loading import check_calibrator
from calibfuse.cli.options import SWITCH, add
from calibfuse.cli.terminal import Terminal
from calibfuse.errors import InputError

EXAMPLES = """\
examples:
  calibfuse align --tokenizer org/any-llm                  # the bundled calibrator, bound and cached
  calibfuse align --calibrator ./my-calibrator --tokenizer ./my-model --report
  calibfuse align --calibrator org/small-lm --tokenizer org/any-llm --report     # a projected language model

The bound vectors go to the cache folder (CALIBFUSE_CACHE, else ~/.cache/calibfuse), so that loading takes a moment
where the vocabulary would be composed anew. (For mode embedding: calibfuse align-embedding.)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    tokenizer = {"metavar": "PATH_OR_HUB", "required": True, "help": "of the target: folder, file or Hub id"}
    report = SWITCH | {"help": "print what is covered"}
    add(parser, "calibrator", "json", tokenizer=tokenizer, report=report)


def run(args: argparse.Namespace) -> int:
    """Bind, then report."""
    check_calibrator(args.calibrator)
    from calibfuse.calibrator import Calibrator
    from calibfuse.hub import check_tokenizer
    from calibfuse.inspection import report_vocabulary

    check_tokenizer(args.tokenizer)
    calibrator = Calibrator.from_pretrained(args.calibrator)
    if not (isinstance(calibrator, Calibrator) or args.report or args.json):
        raise InputError(
            f"align binds a universal calibrator (format calibfuse-calibrator), and {args.calibrator} is a causal "
            "language model: there is nothing to compile ahead of time. Use it with `calibfuse generate --calibrator`, "
            "or add --report to see what it covers."
        )
    start = time.perf_counter()
    bound = calibrator.bind(args.tokenizer, device="cpu")
    seconds = time.perf_counter() - start
    report = report_vocabulary(bound.vocabulary, bound)
    terminal = Terminal()
    if args.json:
        terminal.write(json.dumps({"vocabulary": report.to_dict(), "bind_seconds": seconds}, ensure_ascii=False))
        return 0
    terminal.write(
        f"bound {args.calibrator or 'the bundled calibrator'} to {args.tokenizer}: {bound.target_vocab_size:,} "
        f"ids, {100 * bound.coverage:.2f} % covered, {bound.memory_bytes / 1e6:.1f} MB, {seconds:.2f} s"
    )
    if args.report:
        terminal.write()
        terminal.table(("ids", "count", "share"), report.rows())
    return 0
