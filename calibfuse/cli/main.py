"""Entry point of `calibfuse`: choose the command, run it, turn expected failures into one sentence and an exit code.

Only the module of the chosen command is imported, so `calibfuse --help` loads none of them.

Exit codes: 0 success, 2 bad input or an error that calibfuse foresaw, 130 interrupted, 141 the reader of a pipe went
away. Anything else that fails is a defect and keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from calibfuse import __version__
from calibfuse.errors import CalibfuseError

# Command and its line in `calibfuse --help`; the module is the name with underscores.
COMMANDS: tuple[tuple[str, str], ...] = (
    ("demo", "continue a few prompts with and without the calibrator, side by side"),
    ("generate", "continue your own prompts with any local or Hub model, fused with a calibrator"),
    ("train-calibrator", "train a calibrator on non-toxic text and, for the reference head, unfiltered text"),
    ("train-scorer", "train the small linear toxicity scorer that demo and tests use"),
    ("evaluate", "measure toxicity, fluency and speed with and without the calibrator"),
    ("align", "bind a calibrator to a tokenizer ahead of time, and report how much of it is covered"),
    ("align-embedding", "fit the alignment with a target model that mode embedding needs"),
    ("inspect", "show what a calibrator holds, or what it did to a text, token by token"),
    ("train-guide", "train a value guide: a sequence-level constraint of your own, decoded with mode value"),
    ("finetune", "put the guidance into the weights: fine-tune a model under a sequence-level constraint"),
    ("playground", "try a calibrator in the browser: plain and guided text side by side"),
    ("serve", "run vLLM's OpenAI-compatible server with a calibrator inside"),
    ("push", "publish a trained calibrator on the Hugging Face Hub"),
)

_EXAMPLES = """\
examples:
  calibfuse demo
  calibfuse generate "The new neighbour is" --model org/any-llm --compare
  calibfuse inspect "My neighbour is such a" --model org/any-llm
  calibfuse evaluate --model org/any-llm
  calibfuse train-calibrator my-texts/ --output my-calibrator

`calibfuse COMMAND --help` tells more about each command.
"""

EXIT_OK = 0
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class _Parser(argparse.ArgumentParser):
    """An argument parser whose help begins with the obvious first call, and whose complaint is one sentence."""

    first_call: str | None = None

    def format_help(self) -> str:
        start = f"first call:  {self.first_call}\n\n" if self.first_call else ""
        return start + super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the parser of `calibfuse`."""
    parser = _Parser(
        prog="calibfuse",
        description="Make a language model say fewer harmful things, at decoding time, with one small calibrator.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"calibfuse {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    for name, summary in COMMANDS:
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == command:
            module = importlib.import_module(f"calibfuse.cli.commands.{name.replace('-', '_')}")
            subparser.epilog = module.EXAMPLES
            first = re.search(r"^  (calibfuse (?:.*\\\n)*[^#\n]*)", module.EXAMPLES, re.MULTILINE)
            subparser.first_call = " ".join(first[1].replace("\\\n", "").split()) if first else None
            module.add_arguments(subparser)
            # What the library calls an option in its messages, and its flag.
            flags = {a.field: a.option_strings[0] for a in subparser._actions if hasattr(a, "field")}
            subparser.set_defaults(run=module.run, parser=subparser, flags=flags)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(arguments[0] if arguments else None)
    if not arguments:
        parser.print_help()
        return EXIT_OK
    args, rest = parser.parse_known_args(arguments)
    args.rest = rest  # serve hands on what it does not know
    if rest and not getattr(args, "takes_rest", False):
        getattr(args, "parser", parser).error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command is None:
        parser.error("no command was given")
    try:
        code = int(args.run(args))
        sys.stdout.flush()  # here, so that a closed pipe is noticed inside this try
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except (CalibfuseError, OSError) as error:
        return _fail(f"error: {_with_flags(_one_line(error), getattr(args, 'flags', {}))}", EXIT_ERROR)
    return code


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _with_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message of the library as the command line's user knows its arguments: `max_new_tokens` is --max-new-tokens."""
    for name, flag in flags.items():
        place = rf"\b{name}\b(?![=(.])" if "_" in name else rf"^{name}(?= must)"
        message = re.sub(place, flag, message)
    return re.sub(r"\b(with|without) resume\b", r"\1 --resume", message) if "resume" in flags else message


def _fail(message: str, code: int) -> int:
    print(f"calibfuse: {message}", file=sys.stderr)
    return code
