"""The report as one HTML page that needs no other file and no script. Everything a model said is escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from calibfuse.evaluation.charts import Point, bars, curves
from calibfuse.evaluation.metrics import METRICS, Estimate
from calibfuse.evaluation.running import Evaluation, MethodResult
from calibfuse.evaluation.tables import change, figure, versions

Mask = Callable[[str], str]
_EXAMPLES = 12
_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0 1rem; font-size: .9rem; }
th, td { padding: .2rem .7rem; text-align: right; vertical-align: top; }
th, td { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .said td { text-align: left; } td { font-variant-numeric: tabular-nums; }
small { opacity: .65; display: block; white-space: nowrap; }
.note { border-left: 4px solid #dc3912; padding-left: .8rem; }
.chart { max-width: 48rem; display: block; } .chart text { fill: currentColor; } .grid { stroke: #8883; }
.legend span { margin-right: 1.2rem; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; } dt { opacity: .7; } dd { margin: 0; }
.prompt { opacity: .6; } dd, .said td { overflow-wrap: anywhere; }
"""
_COLUMNS = (
    "toxic_share",
    "toxicity_probability",
    "expected_maximum_toxicity",
    "mean_toxicity",
    "perplexity",
    "target_perplexity",
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "repetition",
    "length",
    "empty_share",
    "refusal_share",
    "tokens_per_second",
)


def to_html(evaluation: Evaluation, *, mask: Mask | None = None) -> str:
    """Make the page.

    Args:
        evaluation: the results.
        mask: makes offensive words unreadable; None shows them.

    Returns:
        The page.
    """
    mask = mask or _unchanged
    notes = evaluation.facts.get("notes") or []
    parts = [
        f"<h1>Evaluation of {_escape(str(evaluation.facts.get('target', 'a target')))}</h1>",
        *(f'<p class="note">{_escape(str(note))}</p>' for note in notes),
        *_curve_part(evaluation.results),
        *_figures_part(evaluation.results),
        *_neutral_part(evaluation.results),
        *_speed_part(evaluation.results),
        *_group_part(evaluation.results),
        *_example_part(evaluation.results, mask),
        "<h2>How it was made</h2>",
        _definitions({**evaluation.facts, **versions()}),
    ]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>calibfuse evaluation</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _curve_part(results: Sequence[MethodResult]) -> list[str]:
    plain = results[0]
    parts = []
    for name in ("perplexity", "target_perplexity"):
        if name not in plain.estimates:
            continue
        families: dict[str, list[Point]] = {}
        for result in results[1:]:
            start = [] if result.method.alpha is None else [_point("0", plain, name)]
            label = "" if result.method.alpha is None else f"{result.method.alpha:g}"
            if name in result.estimates:
                families.setdefault(result.method.family or result.method.title, start).append(
                    _point(label, result, name)
                )
        chart = curves(families, x_title=f"{METRICS[name].title}", y_title="share of toxic continuations")
        if chart:
            parts += [f"<h2>Toxicity against {_escape(METRICS[name].title)}</h2>", chart]
    if parts:
        parts.append(
            "<p>Numbers beside points: alpha. Down and to the left is better. Bars: 95 % intervals over prompts.</p>"
        )
    return parts


def _point(label: str, result: MethodResult, name: str) -> Point:
    return Point(label, result.estimates[name], result.estimates["toxic_share"])


def _figures_part(results: Sequence[MethodResult]) -> list[str]:
    names = [name for name in _COLUMNS if any(name in result.estimates for result in results)]
    headers = ["method", *(METRICS[name].title for name in names)]
    rows = []
    for result in results:
        cells = [_escape(result.method.title)]
        for name in names:
            estimate = result.estimates.get(name)
            cells.append("-" if estimate is None else _figure_cell(name, estimate, result.changes.get(name)))
        rows.append(cells)
    return [
        "<h2>Figures</h2>",
        _table(headers, rows),
        "<p>Second line: 95 % interval; third: change against plain.</p>",
    ]


def _figure_cell(name: str, estimate: Estimate, against: Estimate | None) -> str:
    cell = _escape(figure(name, estimate.value))
    if math.isfinite(estimate.low):
        cell += f"<small>{_escape(f'{figure(name, estimate.low)} to {figure(name, estimate.high)}')}</small>"
    if against is not None:
        cell += f"<small>{_escape(change(against))}</small>"
    return cell


def _neutral_part(results: Sequence[MethodResult]) -> list[str]:
    known = [(result, result.neutrality) for result in results if result.neutrality is not None]
    if not known:
        return []
    headers = [
        "method",
        "KL(target, method)",
        "KL(method, target)",
        "shift of the text's log-probability",
        "group words keep",
        "lowest",
    ]
    rows = [
        [
            _escape(result.method.title),
            f"{neutrality.divergence:.4f}",
            f"{neutrality.reverse_divergence:.4f}",
            f"{neutrality.log_prob_shift:+.4f}",
            f"{neutrality.kept:.1%}",
            _escape(f"{neutrality.lowest_word.word} {neutrality.lowest_word.kept:.1%}"),
        ]
        for result, neutrality in known
    ]
    by_group: dict[str, dict[str, Estimate]] = {}
    for result, neutrality in known:
        for group, kept in neutrality.groups().items():
            by_group.setdefault(group, {})[result.method.title] = Estimate(kept, math.nan, math.nan)
    return [
        "<h2>Neutral text</h2>",
        _table(headers, rows),
        "<p>In nats per token, on benign text. Below: the probability that words keep after neutral beginnings such as "
        "“The new teacher is”; 1 is unchanged.</p>",
        bars(by_group, title="probability kept", reference=1.0),
    ]


def _speed_part(results: Sequence[MethodResult]) -> list[str]:
    known = [(result, result.speed) for result in results if result.speed is not None]
    if not known:
        return []
    rows = [
        [
            _escape(result.method.title),
            f"{speed.tokens_per_second:.0f}",
            f"{speed.kept:.3f}<small>{speed.lowest:.3f} to {speed.highest:.3f}</small>",
        ]
        for result, speed in known
    ]
    return [
        "<h2>Speed</h2>",
        _table(["method", "tokens/s", "share of plain's"], rows),
        "<p>Timed in turn with plain decoding in one process, eight rows; second line: lowest and highest round.</p>",
    ]


def _group_part(results: Sequence[MethodResult]) -> list[str]:
    rows: dict[str, dict[str, Estimate]] = {}
    for result in results:
        for group, figures in result.groups.items():
            if "toxic_share" in figures:
                rows.setdefault(group, {})[result.method.title] = figures["toxic_share"]
    chart = bars(rows, title="share of toxic continuations")
    return ["<h2>Toxic continuations by group of prompts</h2>", chart] if chart else []


def _example_part(results: Sequence[MethodResult], mask: Mask) -> list[str]:
    parts = ["<h2>Example continuations</h2>", "<p>The first continuation of the first prompts, not chosen.</p>"]
    firsts = [{each.prompt_id: each for each in result.measured.first} for result in results]
    rows = []
    for prompt_id, example in list(firsts[0].items())[:_EXAMPLES]:
        cells = [f'<span class="prompt">{_escape(mask(example.prompt))}</span>']
        for examples in firsts:
            said = examples.get(prompt_id)
            cells.append(
                "" if said is None else f"{_escape(mask(said.continuation))}<small>{said.toxicity:.2f}</small>"
            )
        rows.append(cells)
    titles = ["prompt", *(result.method.title for result in results)]
    parts.append(_table(titles, rows, kind="said"))
    parts.append("<p>The most toxic continuation of each method (prompt greyed, toxicity below):</p>")
    longest = max(len(result.measured.worst) for result in results)
    rows = []
    for place in range(min(5, longest)):
        cells = []
        for result in results:
            if place < len(result.measured.worst):
                each = result.measured.worst[place]
                cells.append(
                    f'<span class="prompt">{_escape(mask(each.prompt))}</span>{_escape(mask(each.continuation))}'
                    f"<small>{each.toxicity:.2f}</small>"
                )
            else:
                cells.append("")
        rows.append(cells)
    parts.append(_table(titles[1:], rows, kind="said"))
    return parts


def _definitions(facts: Mapping[str, Any]) -> str:
    items = []
    for name, value in facts.items():
        if name == "notes":
            continue
        shown = ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, Mapping) else str(value)
        items.append(f"<dt>{_escape(name.replace('_', ' '))}</dt><dd>{_escape(shown)}</dd>")
    return f"<dl>{''.join(items)}</dl>"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """A table; headers are escaped here, cells are markup."""
    head = "".join(f"<th>{_escape(title)}</th>" for title in headers)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _escape(text: str) -> str:
    return html.escape(text)


def _unchanged(text: str) -> str:
    return text
