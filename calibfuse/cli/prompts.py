"""Prompts from the command line, a file or standard input; each bad file becomes one sentence."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from calibfuse.errors import CheckpointError, DataError, InputError
from calibfuse.textfiles import read_lines

_BUNDLED = "demo-prompts.json"


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that the arguments name, at least one; `-` is standard input."""
    prompts: list[str] = args.prompt
    if bool(prompts) == (args.prompts is not None):
        count = "several" if prompts else "none"
        raise InputError(
            f'Expected one source of prompts, got {count}: give "a prompt", --prompts FILE, or - for standard input.'
        )
    if args.prompts is not None:
        prompts = read_prompts_file(args.prompts)
    elif prompts == ["-"]:
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
