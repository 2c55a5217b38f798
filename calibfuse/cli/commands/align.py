"""`calibfuse align`: bind a calibrator to a tokenizer ahead of time, and report how much of it is covered."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from calibfuse.cli.loading import check_calibrator
from calibfuse.cli.options import SWITCH, add
from calibfuse.cli.terminal import Terminal
from calibfuse.errors import InputError

if TYPE_CHECKING:
    from calibfuse.guide import Guide

EXAMPLES = """\
examples:
  calibfuse align --tokenizer org/any-llm                  # the bundled calibrator, bound and cached
  calibfuse align --calibrator ./my-calibrator --tokenizer ./my-model --report
  calibfuse align --tokenizer ./tokenizer.json --text held-out.jsonl.xz
  calibfuse align --calibrator org/small-lm --tokenizer org/any-llm --report     # a projected language model

The bound vectors go to the cache folder (CALIBFUSE_CACHE, else ~/.cache/calibfuse), so that loading takes a moment
where the vocabulary would be composed anew. With --text the report also tells how well the calibrator predicts that
text, in bits per byte. (For mode embedding: calibfuse align-embedding.)
"""

_PASSAGE_BYTES = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    tokenizer = {"metavar": "PATH_OR_HUB", "help": "tokenizer of the target: folder, file or Hub id"}
    device = {"help": "where the report on a text is computed (default: cpu)"}
    add(parser, "calibrator", tokenizer=tokenizer, device=device)
    add(
        parser.add_argument_group("report"),
        "json",
        report=SWITCH | {"help": "print what is covered (implied by the options below)"},
        text={"metavar": "FILE", "help": "measure on this text: .txt, .jsonl or .csv, also .gz and .xz"},
        max_bytes={"type": int, "default": 65_536, "metavar": "N", "help": "read so much of the text"},
    )


def run(args: argparse.Namespace) -> int:
    """Bind, then report."""
    if not args.tokenizer:
        raise InputError("calibfuse align needs the target's vocabulary: give --tokenizer, a folder, file or Hub id.")
    if args.max_bytes < 1:
        raise InputError(f"--max-bytes must be at least 1, got {args.max_bytes}.")
    check_calibrator(args.calibrator)
    # The text is read first: it is the quickest to be found wanting.
    passages = _read_passages(args.text, args.max_bytes) if args.text else []
    from calibfuse.hub import check_tokenizer

    check_tokenizer(args.tokenizer)
    is_report = bool(args.report or args.text or args.json)
    bound, seconds = _bind(args, for_report=is_report)
    terminal = Terminal()
    if not args.json:
        terminal.write(
            f"bound {args.calibrator or 'the bundled calibrator'} to {args.tokenizer}: {bound.target_vocab_size:,} "
            f"ids, {100 * bound.coverage:.2f} % covered, {bound.memory_bytes / 1e6:.1f} MB, {seconds:.2f} s"
        )
    if not is_report:
        return 0
    from calibfuse.inspection import report_text, report_vocabulary

    vocabulary = report_vocabulary(bound.vocabulary, bound)
    text = report_text(bound, _encode(args.tokenizer, passages)) if args.text else None
    if args.json:
        record = {"vocabulary": vocabulary.to_dict(), "bind_seconds": seconds, "text": text and text.to_dict()}
        terminal.write(json.dumps(record, ensure_ascii=False))
        return 0
    terminal.write()
    terminal.table(("ids", "count", "share"), vocabulary.rows())
    if text is None:
        terminal.note("Give --text FILE to see how well the calibrator predicts text that is cut into these tokens.")
    else:
        terminal.write()
        terminal.table(("text", "value"), text.rows())
    return 0


def _bind(args: argparse.Namespace, *, for_report: bool) -> tuple[Guide, float]:
    """The bound calibrator, and how many seconds binding took."""
    from calibfuse.calibrator import Calibrator

    calibrator = Calibrator.from_pretrained(args.calibrator)
    if not isinstance(calibrator, Calibrator) and not for_report:
        raise InputError(
            f"align binds a universal calibrator (format calibfuse-calibrator), and {args.calibrator} is a causal "
            "language model: there is nothing to compile ahead of time. Use it with `calibfuse generate --calibrator`, "
            "or add --report to see what it covers."
        )
    start = time.perf_counter()
    bound: Guide = calibrator.bind(args.tokenizer, device=args.device or "cpu")
    return bound, time.perf_counter() - start


def _read_passages(path: str, max_bytes: int) -> list[str]:
    """Passages from the start of a file, `max_bytes` of UTF-8 in all."""
    from calibfuse.textfiles import iter_documents, split_passages

    passages: list[str] = []
    for document in iter_documents([path]):
        for passage in split_passages(document, _PASSAGE_BYTES):
            passages.append(passage)
            max_bytes -= len(passage.encode())
            if max_bytes <= 0:
                return passages
    return passages


def _encode(tokenizer: str, passages: list[str]) -> list[list[int]]:
    """Token ids of the passages, without begin and end marks."""
    from calibfuse.generation.language_model import load_tokenizer
    from calibfuse.inspection import text_encoder

    file = Path(tokenizer).expanduser()
    return text_encoder(file if file.is_file() else load_tokenizer(tokenizer))(passages)
