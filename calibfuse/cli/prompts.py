"""Prompts from the command line, a file or standard input; each bad file becomes one sentence."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from calibfuse.errors import DataError, InputError

_FIELDS = ("prompt", "text")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--prompt`, `--prompts-file` and `-`."""
    group = parser.add_argument_group("prompts (exactly one of these)")
    group.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="one or more prompts")
    group.add_argument(
        "--prompts-file", metavar="FILE", help='.txt with a prompt a line, or .jsonl with a field "prompt" or "text"'
    )
    group.add_argument(
        "stdin", nargs="?", choices=("-",), metavar="-", help="read prompts from standard input, one a line"
    )


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that the arguments name, at least one.

    Raises:
        InputError: none or several sources, or a blank prompt.
        DataError: the file is missing, empty, binary, not UTF-8, or has a row without a prompt.
    """
    given = [args.prompt is not None, args.prompts_file is not None, args.stdin is not None]
    if sum(given) != 1:
        count = "none" if not any(given) else "several"
        raise InputError(f"Expected one source of prompts, got {count}: give --prompt TEXT, --prompts-file FILE or -.")
    if args.prompt is not None:
        prompts: list[str] = args.prompt
    elif args.prompts_file is not None:
        prompts = read_prompts_file(args.prompts_file)
    else:
        prompts = _lines(sys.stdin.buffer.read(), "standard input")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise InputError(f"Prompt {number} is blank; give the model at least one word to continue.")
    return prompts


def read_prompts_file(path: str) -> list[str]:
    """The prompts of a file.

    Args:
        path: .jsonl with an object a line, its prompt in the field "prompt" or "text" (a string, or an object with a
            field "text" as in RealToxicityPrompts); any other name: plain text with one prompt a line. Blank lines are
            skipped.

    Returns:
        At least one prompt.

    Raises:
        DataError: missing, empty, binary, not UTF-8, or a row without a prompt; names the file and the line.
    """
    place = Path(path).expanduser()
    try:
        data = place.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read the prompts in {path!r}: {error.strerror or error}.") from error
    lines = _lines(data, repr(path))
    if place.suffix.lower() not in (".jsonl", ".ndjson"):
        return lines
    return [_prompt_of(line, number, path) for number, line in enumerate(lines, start=1)]


def _lines(data: bytes, name: str) -> list[str]:
    if b"\0" in data:
        raise DataError(f"Expected text in {name}, but it holds binary data.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"Expected UTF-8 text in {name}, but line {line} is not (byte {error.start}).") from error
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"Expected prompts, one a line, in {name}, but it is empty.")
    return lines


def _prompt_of(line: str, number: int, path: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"Expected a JSON object a line in {path!r}, but row {number} is none: {error}.") from error
    if isinstance(row, dict):
        for field in _FIELDS:
            value = row.get(field)
            if isinstance(value, dict):
                value = value.get("text")
            if isinstance(value, str) and value.strip():
                return value
    raise DataError(f'Expected a prompt in the field "prompt" or "text" of row {number} of {path!r}, found none.')
