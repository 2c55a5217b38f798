"""Traces as HTML pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from calibfuse.html import Mask, render, visible
from calibfuse.inspection.spelling import mask_in_context, mask_pieces
from calibfuse.inspection.trace import StepTrace

_FULL_COLOUR = 2.0  # nats of change from which a token has the strongest colour


def trace_page(
    steps: Sequence[StepTrace], *, prompt: str, metadata: Mapping[str, str], mask: Mask | None = None
) -> str:
    """The steps of `trace_generation` after a prompt as an HTML page, readable without JavaScript.

    `metadata` are names and values for its head; `mask` replaces the letters of offensive words, one character by one.
    MissingDependencyError: jinja2 is not installed.
    """
    mask = mask or str
    pieces = [prompt, *(step.text for step in steps)]
    texts = ["".join(pieces[: number + 1]) for number in range(len(steps))]
    return render(
        "inspection/trace.html.jinja",
        metadata=metadata,
        pieces=mask_pieces(pieces, mask),
        steps=steps,
        # a token of a step as it looks when the whole text is masked
        shown=lambda number, text: visible(mask_in_context(texts[number], text, mask)),
        exp=math.exp,
        strength=lambda size: round(0.6 * min(1.0, size / _FULL_COLOUR), 2) if math.isfinite(size) else 0.6,
    )
