"""Traces as self-contained HTML pages: no external file, readable without JavaScript.

All text is escaped; nothing that a model or a tokenizer says can become markup.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from calibfuse.html.markup import escape, unchanged, visible
from calibfuse.inspection.spelling import Mask, mask_in_context, mask_pieces
from calibfuse.inspection.trace import CandidateTrace, StepTrace

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --down: 200, 40, 40; --up: 20, 130, 70; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; } dt { opacity: .7; } dd { margin: 0; }
.text { font-size: 1.1rem; padding: 1rem; border: 1px solid var(--line); border-radius: .5rem; white-space: pre-wrap; }
.text a { color: inherit; text-decoration: none; border-bottom: 1px dotted var(--line); }
.text a:hover, .text a:focus { outline: 2px solid currentColor; }
.prompt { opacity: .6; }
details { border-bottom: 1px solid var(--line); padding: .3rem 0; }
summary { cursor: pointer; } summary code { font-weight: 600; }
table { border-collapse: collapse; margin: .5rem 0 1rem; } th, td { padding: .15rem .7rem; text-align: right; }
th { border-bottom: 1px solid var(--line); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td { font-variant-numeric: tabular-nums; } tr.chosen { font-weight: 700; } code { white-space: pre-wrap; }
.still { opacity: .55; } .note { opacity: .75; font-size: .9rem; }
"""

# Opens the step that a link or the address points to; without JavaScript the reader opens it by hand.
_SCRIPT = """
function openStep() {
  const step = document.getElementById(location.hash.slice(1));
  if (step && step.tagName === "DETAILS") { step.open = true; step.scrollIntoView({block: "center"}); }
}
addEventListener("hashchange", openStep);
openStep();
"""

_FULL_COLOUR = 2.0  # nats of change from which a token has the strongest colour


def trace_page(steps: Sequence[StepTrace], *, prompt: str, facts: Mapping[str, str], mask: Mask | None = None) -> str:
    """A trace as an HTML page.

    Args:
        steps: of `trace_generation`.
        prompt: the text before the first step.
        facts: names and values for the head of the page (target, calibrator, settings).
        mask: replaces the letters of offensive words, one character by one; None shows them.

    Returns:
        The page.
    """
    mask = mask or unchanged
    plain_pieces = [prompt, *(step.text for step in steps)]
    pieces = mask_pieces(plain_pieces, mask)
    words = "".join(
        f'<a href="#step{number}" style="{_colour(step.divergence, down=True)}" '
        f'title="changed by {step.divergence:.3f} nats">{escape(piece)}</a>'
        for number, (step, piece) in enumerate(zip(steps, pieces[1:], strict=True), start=1)
    )
    parts = [
        f'<p class="text"><span class="prompt">{escape(pieces[0])}</span>{words}</p>',
        '<p class="note">The redder a token, the more the calibrator changed the distribution it was chosen from '
        "(Kullback-Leibler divergence from the plain one, in nats). Select a token to see the candidates of its step. "
        "Probabilities are those before temperature, top-k and top-p.</p>",
        "<h2>Steps</h2>",
    ]
    text = prompt
    for number, step in enumerate(steps, start=1):
        parts.append(_step(number, step, text, mask))
        text += step.text
    return _page("What the calibrator did", facts, parts, script=_SCRIPT)


def _step(number: int, step: StepTrace, before: str, mask: Mask) -> str:
    def shown(candidate: CandidateTrace) -> str:
        return escape(visible(mask_in_context(before, candidate.text, mask)))

    heads = list(next((each.heads for each in step.candidates if each.heads), {}))
    head_cells = "".join(f"<th>{escape(head)}</th>" for head in heads)
    rows = []
    for each in step.candidates:
        kind = " ".join(
            name for name, holds in (("chosen", each == step.chosen), ("still", not each.is_movable)) if holds
        )
        said = "".join(f"<td>{_number(each.heads.get(head))}</td>" for head in heads)
        rows.append(
            f'<tr class="{kind}"><td><code>{shown(each)}</code></td><td>{_percent(each.plain)}</td>'
            f"<td>{_number(each.plain)}</td>{said}"
            f'<td style="{_colour(abs(each.shift), down=each.shift < 0)}">{_signed(each.shift)}</td>'
            f"<td>{_number(each.fused)}</td><td>{_percent(each.fused)}</td>"
            f"<td>{each.plain_rank} → {each.fused_rank}</td></tr>"
        )
    return (
        f'<details id="step{number}"><summary>{number}. <code>{shown(step.chosen)}</code> '
        f"{_percent(step.chosen.plain)} → {_percent(step.chosen.fused)}, "
        f"changed by {step.divergence:.3f} nats, {100 * step.moved_mass:.1f} % of the probability moved</summary>"
        f"<table><tr><th>candidate</th><th>plain</th><th>log p</th>{head_cells}<th>shift</th><th>fused log p</th>"
        f"<th>fused</th><th>rank</th></tr>{''.join(rows)}</table></details>"
    )


def _page(title: str, facts: Mapping[str, str], parts: Sequence[str], script: str = "") -> str:
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    tail = f"<script>{script}</script>" if script else ""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{title} - calibfuse</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<dl>{listed}</dl>\n{body}\n{tail}</body>\n</html>\n"
    )


def _colour(size: float, *, down: bool) -> str:
    """A background: the more, the stronger."""
    strength = min(1.0, size / _FULL_COLOUR) if math.isfinite(size) else 1.0
    return f"background: rgba(var(--{'down' if down else 'up'}), {0.6 * strength:.2f})" if strength >= 0.01 else ""


def _percent(log_probability: float) -> str:
    return f"{100 * math.exp(log_probability):.2f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}"
