"""Prompts from the command line, a file or standard input; each bad file becomes one sentence."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from calibfuse.errors import DataError, InputError
from calibfuse.textfiles import read_lines, read_rows

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
        prompts = [line for _, line in read_lines(sys.stdin.buffer, "standard input")]
        if not prompts:
            raise DataError("Expected prompts, one a line, in standard input, but it is empty.")
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
    prompts = [_prompt_of(row, number, path) for number, row in read_rows(Path(path).expanduser(), lines_are_rows=True)]
    if not prompts:
        raise DataError(f"Expected prompts, one a line, in {path!r}, but it has none.")
    return prompts


def _prompt_of(row: dict[str, Any], number: int, path: str) -> str:
    for field in _FIELDS:
        value = row.get(field)
        if isinstance(value, dict):
            value = value.get("text")
        if isinstance(value, str) and value.strip():
            return value
    raise DataError(f'Expected a prompt in the field "prompt" or "text" of line {number} of {path!r}, found none.')
