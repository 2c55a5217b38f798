"""The runnable parts of a Markdown page: what `test_docs.py` runs and checks.

The convention for README.md and docs/:

* Every block fenced as ```python or ```bash is run, in the order of the page: Python in one namespace per page, bash
  with -euo pipefail; both in one empty folder per page, offline, with the bundled weights. Output is not compared.
* `<!-- skip: reason -->` on a line of its own before a block keeps it from being run. It must still compile, and its
  `calibfuse` commands must still be accepted by the command line.
* `<!-- hidden` ... `-->`, a comment of several lines, is Python that is run but not shown: it makes the files that
  the page talks about, or puts a tiny model in the place of a large one.
* Any other block (```text, ```json, ```console) is not run.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[\w+-]*)[^`]*$")
_SKIP = re.compile(r"^\s*<!--\s*skip(?::(?P<reason>.*?))?\s*-->\s*$")
RUNNABLE = ("python", "bash")


@dataclass(frozen=True)
class Block:
    """One block of a page."""

    page: Path
    line: int  # of its first line of code, from 1
    language: str
    code: str
    skip: str | None  # the reason; "" where a skip gives none
    hidden: bool = False

    def __str__(self):
        return f"{self.page.name}:{self.line}"


def read_blocks(page):
    """The runnable blocks of a page, skipped and hidden ones included, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks, skip, index = [], None, 0
    while index < len(lines):
        line = lines[index]
        index += 1
        if match := _SKIP.match(line):
            skip = (match["reason"] or "").strip()
        elif line.strip() == "<!-- hidden":
            code, start = [], index
            while lines[index].strip() != "-->":
                code.append(lines[index])
                index += 1
            index += 1
            blocks.append(Block(page, start + 1, "python", "\n".join(code) + "\n", None, hidden=True))
        elif match := _FENCE.match(line):
            code, start = [], index
            while lines[index].strip() != match["fence"]:
                code.append(lines[index][len(match["indent"]) :])
                index += 1
            index += 1
            if match["language"] in RUNNABLE:
                blocks.append(Block(page, start + 1, match["language"], "\n".join(code) + "\n", skip))
            skip = None
        elif line.strip():
            skip = None  # a skip stands directly before its block
    return blocks


def calibfuse_commands(code):
    """The argument lists of the `calibfuse` commands in a piece of bash."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for stop in ("|", ">", ">>", "2>", "&&", ";", "&"):
            if stop in words:
                words = words[: words.index(stop)]
        if words[:1] == ["calibfuse"]:
            commands.append(words[1:])
        elif "calibfuse" in words and words[words.index("calibfuse") - 1] == "-m":
            commands.append(words[words.index("calibfuse") + 1 :])
    return commands
