"""`calibfuse align`: bind a calibrator to a tokenizer ahead of time, and report how much of it is covered."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibfuse.cli.loading import check_calibrator
from calibfuse.cli.options import SWITCH, add
from calibfuse.cli.terminal import Terminal
from calibfuse.errors import InputError

if TYPE_CHECKING:
    from calibfuse.guide import Guide
    from calibfuse.inspection import TextReport, VocabularyReport

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
    add(
        parser,
        "calibrator",
        tokenizer={"metavar": "PATH_OR_HUB", "help": "tokenizer of the target: folder, file or Hub id"},
        dtype={"choices": ("float32", "bfloat16"), "default": "float32", "help": "of the bound vectors"},
        device={"help": "where the report on a text is computed (default: cpu)"},
        local_files_only={},
    )
    add(
        parser.add_argument_group("report"),
        "text_field",
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
    passages = _read_passages(args.text, args.text_field, args.max_bytes) if args.text else []
    is_report = bool(args.report or args.text or args.json)
    bound, seconds = _bind(args, for_report=is_report)
    terminal = Terminal()
    if not is_report:
        terminal.write(_summary(args, bound, seconds))
        return 0
    from calibfuse.inspection import report_text, report_vocabulary

    vocabulary = report_vocabulary(bound.vocabulary, bound)
    text = report_text(bound, _encode(args, passages)) if args.text else None
    if args.json:
        record: dict[str, Any] = {"vocabulary": vocabulary.to_dict(), "bind_seconds": seconds}
        record["text"] = text.to_dict() if text is not None else None
        terminal.write(json.dumps(record, ensure_ascii=False))
        return 0
    terminal.write(_summary(args, bound, seconds))
    _show_report(terminal, vocabulary, text)
    return 0


def _bind(args: argparse.Namespace, *, for_report: bool) -> tuple[Guide, float]:
    """The bound calibrator, and how many seconds binding took."""
    import torch

    from calibfuse.calibrator import Calibrator
    from calibfuse.generation.language_model import choose_device

    calibrator = Calibrator.from_pretrained(args.calibrator, local_files_only=args.local_files_only)
    if not isinstance(calibrator, Calibrator) and not for_report:
        raise InputError(
            f"align binds a universal calibrator (format calibfuse-calibrator), and {args.calibrator} is a causal "
            "language model: there is nothing to compile ahead of time. Use it with `calibfuse generate --calibrator`, "
            "or add --report to see what it covers."
        )
    tokenizer = args.tokenizer
    if args.local_files_only:
        from calibfuse.vocabulary import Vocabulary

        tokenizer = Vocabulary.from_tokenizer(tokenizer, local_files_only=True)
    device = choose_device(args.device or "cpu")
    start = time.perf_counter()
    bound: Guide = calibrator.bind(tokenizer, dtype=getattr(torch, args.dtype), device=device)
    return bound, time.perf_counter() - start


def _summary(args: argparse.Namespace, bound: Guide, seconds: float) -> str:
    return (
        f"bound {args.calibrator or 'the bundled calibrator'} to {args.tokenizer}: {bound.target_vocab_size:,} ids, "
        f"{100 * bound.coverage:.2f} % covered, {bound.memory_bytes / 1e6:.1f} MB, {seconds:.2f} s"
    )


def _read_passages(path: str, text_field: str | None, max_bytes: int) -> list[str]:
    """Passages from the start of a file, `max_bytes` of UTF-8 in all."""
    from calibfuse.textfiles import iter_documents, split_passages

    passages: list[str] = []
    left = max_bytes
    for document in iter_documents([path], text_field=text_field):
        for passage in split_passages(document, _PASSAGE_BYTES):
            passages.append(passage)
            left -= len(passage.encode())
            if left <= 0:
                return passages
    return passages


def _encode(args: argparse.Namespace, passages: list[str]) -> list[list[int]]:
    """Token ids of the passages, without begin and end marks."""
    from calibfuse.generation.language_model import load_tokenizer
    from calibfuse.inspection import text_encoder

    name = Path(args.tokenizer).expanduser()
    if name.is_file():
        return text_encoder(name)(passages)
    return text_encoder(load_tokenizer(args.tokenizer, local_files_only=args.local_files_only))(passages)


def _show_report(terminal: Terminal, vocabulary: VocabularyReport, text: TextReport | None) -> None:
    terminal.write()
    terminal.table(("ids", "count", "share"), vocabulary.rows())
    if text is None:
        terminal.note("Give --text FILE to see how well the calibrator predicts text that is cut into these tokens.")
        return
    terminal.write()
    terminal.table(("text", "value"), text.rows())
