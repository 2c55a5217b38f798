"""Prompts from the command line, a file or standard input; each bad file becomes one sentence."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from calibfuse.cli.options import add, add_texts, texts_of
from calibfuse.errors import CheckpointError, DataError, InputError
from calibfuse.textfiles import read_lines

_BUNDLED = "demo-prompts.json"
_STDIN = "-"


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add the prompts themselves, `--prompts` and `-`."""
    help_ = "text to continue; -: standard input, one a line"
    add_texts(parser, "prompt", metavar="PROMPT", help=help_, old="--prompt")
    add(parser, prompts={"old": ("--prompts-file",)})


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that the arguments name, at least one."""
    prompts = texts_of(args, "prompt")
    is_stdin = prompts == [_STDIN]
    if bool(prompts) == (args.prompts is not None):
        count = "several" if prompts else "none"
        raise InputError(
            f'Expected one source of prompts, got {count}: give "a prompt", --prompts FILE, or - for standard input.'
        )
    if args.prompts is not None:
        prompts = read_prompts_file(args.prompts)
    elif is_stdin:
        prompts = [line for _, line in read_lines(sys.stdin.buffer, "standard input")]
        if not prompts:
            raise DataError("Expected prompts, one a line, in standard input, but it is empty.")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise InputError(f"Prompt {number} is blank; give the model at least one word to continue.")
    return prompts


def read_prompts_file(path: str) -> list[str]:
    """The prompts of a file, as `calibfuse evaluate` reads them, but all of them and repeated ones too."""
    from calibfuse.evaluation import prompts as files

    prompts = [prompt.text for prompt in files.read_prompts(Path(path).expanduser())]
    if not prompts:
        raise DataError(f"Expected prompts, one a line, in {path!r}, but it has none.")
    return prompts


def bundled_prompts() -> list[str]:
    """The prompts of the demo."""
    from calibfuse.hub import read_config

    folder = Path(__file__).parent.parent / "pretrained"
    prompts = read_config(folder, _BUNDLED, format_name="calibfuse-demo-prompts", supported_version=1).get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise CheckpointError(f"The bundled {_BUNDLED} is damaged: expected a list of prompts.")
    return prompts
