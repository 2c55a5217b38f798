"""The report as one HTML page that needs no other file and no script. Everything a model said is escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from calibfuse.evaluation.budget import BudgetComparison, perplexity_metric
from calibfuse.evaluation.evaluate import Evaluation, MethodResult
from calibfuse.evaluation.methods import PLAIN
from calibfuse.evaluation.metrics import METRICS, Estimate
from calibfuse.evaluation.tables import (
    OPINIONS_NOTE,
    OPINIONS_TITLE,
    SUITE_NOTE,
    budget_note,
    budget_table,
    budget_title,
    change,
    figure,
    opinions_table,
    suite_tables,
    versions,
)
from calibfuse.html.charts import CHART_STYLE, Curve, Point, bars, curves
from calibfuse.html.style import PAGE_STYLE

Mask = Callable[[str], str]
Colours = Mapping[str, int | None]
_EXAMPLES = 12
_MOST_SHOWN = 7  # methods side by side in bars and examples
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


def to_html(evaluation: Evaluation, *, mask: Mask | None = None, within_budget: BudgetComparison | None = None) -> str:
    """Make the page.

    Args:
        evaluation: the results.
        mask: makes offensive words unreadable; None shows them.
        within_budget: the comparison at one fluency, if it was made.

    Returns:
        The page.
    """
    mask = mask or _unchanged
    notes = evaluation.facts.get("notes") or []
    facts = evaluation.facts
    shown = _representatives(evaluation.results, within_budget)
    colours = _colours(shown, evaluation.results)
    sampling = evaluation.sampling
    lead = (
        f"{len(evaluation.prompts):,} prompts × {sampling.samples} continuations of up to {sampling.max_new_tokens} "
        f"tokens, top-p {sampling.top_p:g}, temperature {sampling.temperature:g}, seed {sampling.seed}. "
        f"Toxicity: {facts.get('scorer', 'unknown')}. Fluency: {facts.get('judge') or 'the target itself'}."
    )
    sections = [
        *_curve_part(evaluation.results),
        _budget_part(within_budget),
        _figures_part(evaluation.results),
        _opinions_part(evaluation.results),
        _neutral_part(evaluation.results, shown, colours),
        *_suite_part(evaluation.results, shown, colours),
        _group_part(shown, colours),
        _speed_part(evaluation.results),
        _example_part(shown, mask),
        ["<h2>How it was made</h2>", _definitions({**facts, **versions()})],
    ]
    body = "\n".join(
        [
            f"<h1>Evaluation of {_escape(str(facts.get('target', 'a target')))}</h1>",
            f'<p class="lead">{_escape(lead)}</p>',
            *(f'<p class="note">{_escape(str(note))}</p>' for note in notes),
            *(f"<section>{''.join(parts)}</section>" for parts in sections if parts),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>calibfuse evaluation</title><style>{CHART_STYLE}{PAGE_STYLE}</style></head>"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _representatives(results: Sequence[MethodResult], within_budget: BudgetComparison | None) -> Sequence[MethodResult]:
    """What bars and examples show: everything, or of many methods plain and one of each family.

    That one is the best within the budget, else the family's default, else its last.
    """
    if len(results) <= _MOST_SHOWN:
        return results
    chosen = {_family(result): result for result in results[1:]}
    chosen |= {_family(result): result for result in results[1:] if result.method.is_default}
    if within_budget is not None:
        chosen |= {each.family: each.best for each in within_budget.families if each.best is not None}
    return [results[0], *chosen.values()]


def curve_file(evaluation: Evaluation) -> str:
    """The curve of toxicity against perplexity as an SVG file of its own, with its style; empty where there is none."""
    return _curve(evaluation.results, perplexity_metric(evaluation), standalone=True)


def _curve_part(results: Sequence[MethodResult]) -> list[list[str]]:
    sections = []
    for name in ("perplexity", "target_perplexity"):
        chart = _curve(results, name)
        if chart:
            note = (
                "Down and to the left is better. Beside the points: the strength, where there is room. Thin lines: "
                "95 % intervals over prompts."
            )
            sections.append([f"<h2>Toxicity against {_escape(METRICS[name].title)}</h2>", chart, f"<p>{note}</p>"])
    return sections


def _curve(results: Sequence[MethodResult], name: str, *, standalone: bool = False) -> str:
    """Toxic continuations against a perplexity; empty where nothing has that perplexity."""
    plain = results[0]
    if name not in plain.estimates:
        return ""
    families: dict[str, list[MethodResult]] = {}
    for result in results[1:]:
        if name in result.estimates:
            families.setdefault(_family(result), []).append(result)
    return curves(
        {
            family: Curve(
                [_point("" if each.method.alpha is None else f"{each.method.alpha:.3g}", each, name) for each in found],
                from_origin=all(each.method.alpha is not None and each.method.starts_at_plain for each in found),
            )
            for family, found in families.items()
        },
        origin=_point("plain", plain, name),
        x_title=METRICS[name].title,
        y_title="toxic continuations",
        y_is_share=True,
        standalone=standalone,
    )


def _family(result: MethodResult) -> str:
    return result.method.family or result.method.title


def _colours(shown: Sequence[MethodResult], results: Sequence[MethodResult]) -> dict[str, int | None]:
    """Colours of bars by title: a family's as in the curve where every family is there once, else by order."""
    order = list(dict.fromkeys(map(_family, results[1:])))
    families = [_family(result) for result in shown if result.method.key != PLAIN.key]
    colours: dict[str, int | None] = {}
    for result in shown:
        if result.method.key == PLAIN.key:
            colours[result.method.title] = None
        else:
            place = len([each for each in colours.values() if each is not None])
            is_once = len(set(families)) == len(families)
            colours[result.method.title] = order.index(_family(result)) if is_once else place
    return colours


def _point(label: str, result: MethodResult, name: str) -> Point:
    return Point(label, result.estimates[name], result.estimates["toxic_share"])


def _budget_part(within_budget: BudgetComparison | None) -> list[str]:
    if within_budget is None:
        return []
    headers, rows = budget_table(within_budget)
    cells = [[_escape(row[0]), *map(_in_two_lines, row[1:])] for row in rows]
    return [
        f"<h2>{_escape(budget_title(within_budget))}</h2>",
        _table(headers, cells),
        f"<p>{_escape(budget_note(within_budget))}</p>",
    ]


def _in_two_lines(cell: str) -> str:
    """`value [low, high]`, or `value (remark)`, in two lines."""
    value, bracket, interval = cell.partition(" [")
    if bracket:
        return f"{_escape(value)}<small>{_escape(interval.rstrip(']').replace(', ', ' to '))}</small>"
    value, bracket, remark = cell.partition(" (")
    return _escape(value) + (f"<small>{_escape(remark.rstrip(')'))}</small>" if bracket else "")


def _suite_part(results: Sequence[MethodResult], shown: Sequence[MethodResult], colours: Colours) -> list[list[str]]:
    sections = []
    for name, (headers, rows) in suite_tables(results).items():
        by_group: dict[str, dict[str, Estimate]] = {}
        for result in shown:
            for row in result.suites[name].groups if result.suites else ():
                by_group.setdefault(row.name, {})[result.method.title] = row.halved
        sections.append(
            [
                f"<h2>Labelled sentences: {_escape(name)}</h2>",
                f"<p>{_escape(SUITE_NOTE)}</p>",
                bars(by_group, title="harmless sentences with a token halved", is_share=True, colours=colours),
                _table(headers, [[_escape(row[0]), *map(_in_two_lines, row[1:])] for row in rows]),
            ]
        )
    return sections


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
        "<p>Second line: 95 % interval; third: change against plain, coloured where its interval leaves no doubt.</p>",
    ]


def _figure_cell(name: str, estimate: Estimate, against: Estimate | None) -> str:
    cell = _escape(figure(name, estimate.value))
    if math.isfinite(estimate.low):
        cell += f"<small>{_escape(f'{figure(name, estimate.low)} to {figure(name, estimate.high)}')}</small>"
    if against is not None:
        cell += f"<small{_verdict(name, against)}>{_escape(change(against))}</small>"
    return cell


def _verdict(name: str, against: Estimate) -> str:
    """Colour of a change whose interval leaves no doubt of its direction, where one direction is better."""
    better = METRICS[name].lower_is_better
    if better is None or not math.isfinite(against.low) or against.low <= 0.0 <= against.high:
        return ""
    return ' class="good"' if (against.high < 0.0) == better else ' class="bad"'


def _opinions_part(results: Sequence[MethodResult]) -> list[str]:
    headers, rows = opinions_table(results)
    cells = [[*map(_escape, row[:2]), *map(_in_two_lines, row[2:])] for row in rows]
    return [f"<h2>{OPINIONS_TITLE}</h2>", _table(headers, cells), f"<p>{_escape(OPINIONS_NOTE)}</p>"]


def _neutral_part(results: Sequence[MethodResult], shown: Sequence[MethodResult], colours: Colours) -> list[str]:
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
    for result in shown:
        for group, kept in ({} if result.neutrality is None else result.neutrality.groups()).items():
            by_group.setdefault(group, {})[result.method.title] = Estimate(kept, math.nan, math.nan)
    return [
        "<h2>Neutral text</h2>",
        _table(headers, rows),
        "<p>In nats per token, on benign text. Below: the probability that words keep after neutral beginnings such as "
        "“The new teacher is”; 100 % is unchanged.</p>",
        bars(by_group, title="probability kept", reference=1.0, is_share=True, colours=colours),
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


def _group_part(results: Sequence[MethodResult], colours: Colours) -> list[str]:
    rows: dict[str, dict[str, Estimate]] = {}
    for result in results:
        for group, figures in result.groups.items():
            if "toxic_share" in figures:
                rows.setdefault(group, {})[result.method.title] = figures["toxic_share"]
    chart = bars(rows, title="toxic continuations", is_share=True, colours=colours)
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


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "figures") -> str:
    """A table; headers are escaped here, cells are markup."""
    head = "".join(f'<th scope="col">{_escape(title)}</th>' for title in headers)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide" tabindex="0"><table class="{kind}">{inner}</table></div>'


def _escape(text: str) -> str:
    return html.escape(text)


def _unchanged(text: str) -> str:
    return text
