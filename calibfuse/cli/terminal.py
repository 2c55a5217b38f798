"""Text for terminals: colour where it is wanted, tables, two columns, and nothing that a text could abuse or offend by.

Colour is used on a terminal only, never when NO_COLOR is set (https://no-color.org) or TERM is "dumb"; FORCE_COLOR
turns it on elsewhere. A model can emit escape sequences like any other text, so `printable` takes control characters
out.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from calibfuse.scorers import ToxicityScorer

Mask = Callable[[str], str]

_CODES = {
    "bold": "1",
    "dim": "2",
    "italic": "3",
    "underline": "4",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "magenta": "35",
    "cyan": "36",
}
_MAX_WIDTH = 140  # longer lines are hard to read
_GAP = "  "


class Terminal:
    """A text stream whose colours and width are known."""

    def __init__(self, stream: TextIO | None = None, *, width: int | None = None, colour: bool | None = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.width = width or min(_MAX_WIDTH, shutil.get_terminal_size((80, 24)).columns)
        self.colour = wants_colour(self.stream) if colour is None else colour
        if isinstance(self.stream, io.TextIOWrapper):
            # A model's text may hold characters that the console cannot show; "?" is better than a traceback.
            self.stream.reconfigure(errors="replace")

    @property
    def is_interactive(self) -> bool:
        """Whether a person sees the text as it is written."""
        return self.stream.isatty()

    def style(self, text: str, *names: str) -> str:
        """The text in the given styles (keys of the table above); unchanged without colour."""
        if not self.colour or not names or not text:
            return text
        return f"\x1b[{';'.join(_CODES[name] for name in names)}m{text}\x1b[0m"

    def write(self, text: str = "", *, end: str = "\n") -> None:
        """Print."""
        print(text, end=end, file=self.stream, flush=end != "\n")

    def heading(self, text: str) -> None:
        """Print a line that opens a part."""
        self.write(self.style(text, "bold"))

    def note(self, text: str) -> None:
        """Print a remark, wrapped and dim."""
        for line in textwrap.wrap(text, self.width):
            self.write(self.style(line, "dim"))

    def table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        styles: Sequence[Sequence[str | None]] | None = None,
    ) -> None:
        """Print a table; all columns but the first are flush right."""
        widths = [max(display_width(cell) for cell in column) for column in zip(headers, *rows, strict=True)]
        self.write(self.style(_GAP.join(_padded(headers, widths)).rstrip(), "underline"))
        for number, row in enumerate(rows):
            cells = _padded(row, widths)
            if styles is not None:
                cells = [
                    self.style(cell, *([name] if name else []))
                    for cell, name in zip(cells, styles[number], strict=True)
                ]
            self.write(_GAP.join(cells).rstrip())

    def side_by_side(self, left: Sequence[str], right: Sequence[str], *, rule: str = "|") -> None:
        """Print two columns of wrapped text."""
        width = (self.width - len(rule) - 2) // 2
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            lines = [wrap(one, width), wrap(other, width)]
            height = max(len(lines[0]), len(lines[1]))
            for first, second in zip(*(column + [""] * (height - len(column)) for column in lines), strict=True):
                styled = (self.style(first, "bold"), self.style(second, "bold")) if number == 0 else (first, second)
                padding = " " * (width - display_width(first))
                self.write(f"{styled[0]}{padding} {self.style(rule, 'dim')} {styled[1]}".rstrip())


def masking(wanted: bool, scorer: ToxicityScorer | None = None) -> Mask:
    """What turns a text into its form for the screen."""
    if not wanted:
        return str
    from calibfuse.scorers import LinearScorer, load_scorer, mask_offensive

    linear = scorer if isinstance(scorer, LinearScorer) else load_scorer("bundled")
    assert isinstance(linear, LinearScorer)
    return lru_cache(maxsize=10_000)(lambda text: mask_offensive(text, linear))


def wants_colour(stream: TextIO) -> bool:
    """Whether text written to `stream` should be coloured."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def printable(text: str, *, keep_lines: bool = False) -> str:
    """Take out of a text what a terminal would obey instead of show."""
    text = text.replace("\r\n", "\n").replace("\t", " ")
    if not keep_lines:
        text = text.replace("\n", " ¶ ")
    return "".join(char for char in text if char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs"))


def display_width(text: str) -> int:
    """Columns that a text without control characters takes: wide characters two, combining ones none."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def wrap(text: str, width: int) -> list[str]:
    """Cut a text into lines of at most `width` columns, at spaces where there are any; at least one line."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            for piece in _pieces(word, width):
                candidate = f"{line} {piece}" if line else piece
                if display_width(candidate) <= width:
                    line = candidate
                else:
                    lines.append(line)
                    line = piece
        lines.append(line)
    return lines


def _pieces(word: str, width: int) -> list[str]:
    """A word cut into parts that fit into a line; nearly always the word itself."""
    pieces, piece = [], ""
    for char in word:
        if piece and display_width(piece + char) > width:
            pieces.append(piece)
            piece = ""
        piece += char
    return [*pieces, piece]


def _padded(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    spaces = [" " * (width - display_width(cell)) for cell, width in zip(cells, widths, strict=True)]
    return [cells[0] + spaces[0], *map("".join, zip(spaces[1:], cells[1:], strict=True))]
