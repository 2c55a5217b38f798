"""What a guided continuation was changed by, in a few figures and lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import exp

from calibfuse.account import TOUCHED_FROM
from calibfuse.inspection.trace import CandidateTrace, StepTrace

_NAMED = 5


def account(steps: Sequence[StepTrace], mask: Callable[[str], str]) -> str:
    """The account of a run, as Markdown.

    Args:
        steps: of the guided continuation.
        mask: what words look like on the screen.
    """
    if not steps:
        return ""
    touched = sum(step.moved_mass >= TOUCHED_FROM for step in steps)
    moved = sum(step.moved_mass for step in steps) / len(steps)
    lowered: Counter[str] = Counter()
    for step in steps:
        for each in step.candidates:
            lost = exp(each.plain) - exp(each.fused)
            if lost > 0.0:
                lowered[each.text.strip()] += lost  # type: ignore[assignment]
    named = [f"{mask(text)} (-{100 * lost:.1f} points)" for text, lost in lowered.most_common(_NAMED) if text]
    lines = [
        f"**{len(steps)} tokens**, {touched} of them touched (a hundredth of the probability moved, or more); "
        f"{100 * moved:.1f} % moved on average."
    ]
    if named:
        lines.append(f"Most lowered: {', '.join(named)}.")
    return "\n\n".join(lines)


def candidate_rows(step: StepTrace, mask: Callable[[str], str]) -> list[list[str]]:
    """Rows of a table: token, probability before and after, shift in nats."""
    return [_row(each, mask) for each in step.candidates]


def _row(each: CandidateTrace, mask: Callable[[str], str]) -> list[str]:
    plain, fused = (f"{100 * exp(value):.2f} %" for value in (each.plain, each.fused))
    return [mask(each.text), plain, fused, f"{each.shift:+.2f}" if each.is_movable else "-"]
