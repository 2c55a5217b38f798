"""`calibfuse align`: bind a calibrator to a tokenizer ahead of time, and report how much of it is covered.

With a target model it also fits the alignment that mode "embedding" needs (align_target.py).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibfuse.cli.align_target import add_target_arguments, align_target
from calibfuse.cli.terminal import Terminal
from calibfuse.errors import InputError

if TYPE_CHECKING:
    from calibfuse.guide import Guide
    from calibfuse.inspection import TextReport, VocabularyReport

EXAMPLES = """\
examples:
  calibfuse align --tokenizer org/any-llm                  # the bundled calibrator, bound and cached
  calibfuse align --calibrator ./my-calibrator --tokenizer ./my-model --report
  calibfuse align --tokenizer ./tokenizer.json --text held-out.jsonl.xz --html coverage.html
  calibfuse align --calibrator org/small-lm --tokenizer org/any-llm --report     # a projected language model
  calibfuse align --calibrator ./my-calibrator --target ./my-model      # for mode embedding

The bound vectors go to the cache folder (CALIBFUSE_CACHE, else ~/.cache/calibfuse), so that loading takes a moment
where the vocabulary would be composed anew. With --text the report also tells how well the calibrator predicts that
text, in bits per byte. With --target it also fits the matrix that mode "embedding" needs
for that model, and saves it beside the calibrator.
"""

_PASSAGE_BYTES = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; imports nothing heavy."""
    parser.add_argument("--calibrator", metavar="PATH_OR_HUB", help="folder or Hub id (default: the bundled one)")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH_OR_HUB",
        help="tokenizer of the target: folder, file or Hub id (default: that of --target)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the bound vectors")
    parser.add_argument("--device", help="where the report on a text is computed (default: cpu)")
    parser.add_argument("--local-files-only", action="store_true", help="never touch the network")
    add_target_arguments(parser)
    report = parser.add_argument_group("report")
    report.add_argument("--report", action="store_true", help="print what is covered (implied by the options below)")
    report.add_argument("--text", metavar="FILE", help="measure on this text: .txt, .jsonl or .csv, also .gz and .xz")
    report.add_argument("--text-field", help="key or column of the text (default: found by name)")
    report.add_argument(
        "--max-bytes", type=int, default=65_536, metavar="N", help="read so much of the text (default: %(default)s)"
    )
    report.add_argument("--html", metavar="FILE", help="write the report as a page that needs no other file")
    report.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Bind, then report."""
    if not (args.tokenizer or args.target):
        raise InputError("calibfuse align needs the target's vocabulary: give --tokenizer, or --target for a model.")
    if args.max_bytes < 1:
        raise InputError(f"--max-bytes must be at least 1, got {args.max_bytes}.")
    page = Path(args.html).expanduser() if args.html else None
    if page is not None and page.is_dir():
        raise InputError(f"--html expects a file, but {args.html!r} is a folder.")
    if page is not None:
        from calibfuse.html import require

        require("jinja2")
    # The text is read first: it is the quickest to be found wanting.
    passages = _read_passages(args.text, args.text_field, args.max_bytes) if args.text else []
    alignment = align_target(args) if args.target else None
    args.tokenizer = args.tokenizer or args.target
    is_report = bool(args.report or args.text or page or args.json)
    bound, seconds = _bind(args, for_report=is_report)
    terminal = Terminal()
    if not is_report:
        terminal.write(_summary(args, bound, seconds))
        return 0
    from calibfuse.inspection import report_text, report_vocabulary

    vocabulary = report_vocabulary(bound.vocabulary, bound)
    text = report_text(bound, _encode(args, passages)) if args.text else None
    if page is not None:
        _write_page(page, args, bound, vocabulary, text)
    if args.json:
        record: dict[str, Any] = {"vocabulary": vocabulary.to_dict(), "bind_seconds": seconds}
        record["text"] = text.to_dict() if text is not None else None
        record["alignment"] = alignment
        terminal.write(json.dumps(record, ensure_ascii=False))
        return 0
    terminal.write(_summary(args, bound, seconds))
    _show_report(terminal, vocabulary, text)
    if page is not None:
        terminal.write(f"written to {page}")
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


def _write_page(
    page: Path,
    args: argparse.Namespace,
    bound: Guide,
    vocabulary: VocabularyReport,
    text: TextReport | None,
) -> None:
    from calibfuse.hub import write_files
    from calibfuse.inspection import coverage_page

    metadata = {
        "calibrator": f"{args.calibrator or 'bundled'} ({bound.calibrator.fingerprint[:12]})",
        "tokenizer": f"{args.tokenizer} ({vocabulary.fingerprint[:12]})",
    }
    if args.text:
        metadata["text"] = f"{args.text}, first {args.max_bytes:,} bytes"
    content = coverage_page(vocabulary, text, metadata=metadata)
    write_files(page.parent, {page.name: content.encode("utf-8")})


def _show_report(terminal: Terminal, vocabulary: VocabularyReport, text: TextReport | None) -> None:
    from calibfuse.inspection import text_rows, vocabulary_rows

    terminal.write()
    terminal.table(("ids", "count", "share"), vocabulary_rows(vocabulary))
    if text is None:
        terminal.note("Give --text FILE to see how well the calibrator predicts text that is cut into these tokens.")
        return
    terminal.write()
    terminal.table(("text", "value"), text_rows(text))
