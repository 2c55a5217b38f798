"""Traces and coverage reports as HTML pages, and the tables of a coverage report as rows for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from calibfuse.html.pages import Cell, Mask, Table, render, unchanged, visible
from calibfuse.inspection.coverage import TextReport, VocabularyReport
from calibfuse.inspection.spelling import mask_in_context, mask_pieces
from calibfuse.inspection.trace import StepTrace

_FULL_COLOUR = 2.0  # nats of change from which a token has the strongest colour


def trace_page(
    steps: Sequence[StepTrace], *, prompt: str, metadata: Mapping[str, str], mask: Mask | None = None
) -> str:
    """A trace as an HTML page, readable without JavaScript.

    Args:
        steps: of `trace_generation`.
        prompt: the text before the first step.
        metadata: names and values for the head of the page (target, calibrator, settings).
        mask: replaces the letters of offensive words, one character by one; None shows them.

    Returns:
        The page.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    mask = mask or unchanged
    pieces = [prompt, *(step.text for step in steps)]
    texts = ["".join(pieces[: number + 1]) for number in range(len(steps))]

    def shown(number: int, text: str) -> str:
        """A token of a step as it looks when the whole text is masked."""
        return visible(mask_in_context(texts[number], text, mask))

    return render(
        "inspection/trace.html.jinja",
        metadata=metadata,
        pieces=mask_pieces(pieces, mask),
        steps=steps,
        shown=shown,
        exp=math.exp,
        strength=lambda size: round(0.6 * min(1.0, size / _FULL_COLOUR), 2) if math.isfinite(size) else 0.6,
    )


def coverage_page(vocabulary: VocabularyReport, text: TextReport | None, *, metadata: Mapping[str, str]) -> str:
    """A coverage report as an HTML page.

    Args:
        vocabulary: of `report_vocabulary`.
        text: of `report_text`; None leaves that part out.
        metadata: names and values for the head of the page.

    Returns:
        The page.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    tiles = [(_percent(vocabulary.coverage), f"of {vocabulary.size:,} ids are covered")]
    sections = [
        (
            "Vocabulary",
            "Covered ids are those that fusion can move. Ids with equal bytes share the probability of these bytes.",
            _table(["ids", "count", "share"], vocabulary_rows(vocabulary)),
        )
    ]
    if text is not None:
        tiles.append((_percent(text.covered_mass), "of the text's tokens are covered"))
        tiles += [(f"{value:.3f}", f"bits per byte, head {head}") for head, value in text.bits_per_byte.items()]
        note = "Bits per byte of the text when it is cut into the target's tokens: lower is better, at any vocabulary."
        sections.append(("Text", note, _table(["measure", "value"], text_rows(text))))
    return render("inspection/coverage.html.jinja", metadata=metadata, tiles=tiles, sections=sections)


def vocabulary_rows(report: VocabularyReport) -> list[tuple[str, str, str]]:
    """The table of a vocabulary report: what, how many, share of all ids."""
    counts = [
        ("in the vocabulary", report.size),
        ("covered (have text)", report.covered),
        *([("text that the calibrator cannot spell", report.unspelled)] if report.unspelled else []),
        ("special or holes (never moved)", report.special),
        ("same bytes as another id", report.duplicates),
        ("parts of characters", report.partial),
    ]
    return [(name, f"{count:,}", _percent(count / report.size)) for name, count in counts]


def text_rows(report: TextReport) -> list[tuple[str, str]]:
    """The table of a text report: what, and its value."""
    return [
        ("passages", f"{report.passages:,}"),
        ("bytes", f"{report.bytes:,}"),
        ("tokens", f"{report.tokens + report.skipped:,} ({report.distinct:,} different)"),
        ("covered tokens of the text", _percent(report.covered_mass, 3)),
        *((f"bits per byte, head {head!r}", f"{value:.3f}") for head, value in report.bits_per_byte.items()),
    ]


def _table(headers: list[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(headers, [[Cell(each) for each in row] for row in rows])


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f} %"
