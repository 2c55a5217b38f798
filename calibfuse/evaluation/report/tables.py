"""The tables of a report: one model, which the page and Markdown render."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy
import torch
import transformers

from calibfuse import __version__
from calibfuse.evaluation.bootstrap import Estimate
from calibfuse.evaluation.budget import AtBudget, BudgetComparison
from calibfuse.evaluation.evaluate import Evaluation, MethodResult
from calibfuse.evaluation.given_text.suites import SuiteRow
from calibfuse.evaluation.metrics import METRICS, Metric
from calibfuse.html import Cell, Mask, Table

_TOXICITY = ("toxic_share", "toxicity_probability", "expected_maximum_toxicity", "mean_toxicity")
_FLUENCY = ("perplexity", "bits_per_byte", "target_perplexity")
_TEXT = ("distinct_1", "distinct_2", "distinct_3", "length", "empty_share")
_MOST_SHOWN = 7  # methods side by side in bars and examples
_WORST_SHOWN = 3  # continuations of a method in Markdown
_JUDGED_FROM = 50  # prompts; a bootstrap over fewer gives intervals that are too narrow to colour a change by
_THREE_DIGITS, _PERCENT, _CHANGE = "{:.3f}".format, "{:.1%}".format, "{:+.1%}".format


@dataclass(frozen=True)
class Section:
    """A table with its heading."""

    key: str  # where a chart of the same figures belongs
    title: str  # heading
    table: Table  # the figures
    note: str = ""  # what they mean


def versions() -> dict[str, str]:
    """Of everything that the figures depend on."""
    return {
        "calibfuse": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }


def to_markdown(
    evaluation: Evaluation, *, within_budget: BudgetComparison | None = None, mask: Mask | None = None
) -> str:
    """Everything that was measured, the worst examples, and how all was made.

    `mask` makes offensive words of the examples unreadable; None shows them.
    """
    parts = ["# Evaluation"]
    for section in sections_of(evaluation, within_budget):
        headers, rows = section.table.headers, section.table.rows
        parts += ["", f"## {section.title}", "", *_lines(headers, [[*map(_with_interval, row)] for row in rows])]
        changed = [row for row in rows if any(cell.change for cell in row)]
        if changed:
            compared = [
                [each.change or (each.text if each.interval is None else "-") for each in row] for row in changed
            ]
            parts += ["", "Change against plain, paired by prompts:", "", *_lines(headers, compared)]
        parts += ["", section.note] if section.note else []
    parts += ["", "In brackets: 95 % bootstrap intervals over prompts."]
    mask = mask or str
    worst = [
        [result.method.title, f"{each.toxicity:.2f}", mask(each.worst_part), mask(each.continuation.strip())]
        for result in representatives(evaluation.results, within_budget)
        for each in result.measured.worst[:_WORST_SHOWN]
    ]
    headers = ["method", "toxicity", "worst part", "continuation"]
    parts += ["", "## The most toxic continuations", "", *_lines(headers, worst)]
    parts += ["", "## How it was made", ""]
    facts = {**evaluation.facts, **versions()}
    parts += [f"- {name.replace('_', ' ')}: {shown_value(value)}" for name, value in facts.items()]
    return "\n".join(parts) + "\n"


def representatives(results: Sequence[MethodResult], within_budget: BudgetComparison | None) -> Sequence[MethodResult]:
    """What bars and examples show: everything, or of many methods plain and one of each family.

    That one is the best within the budget, else the family's default, else its last.
    """
    if len(results) <= _MOST_SHOWN:
        return results
    chosen = {family_of(result): result for result in results[1:]}
    chosen |= {family_of(result): result for result in results[1:] if result.method.is_default}
    if within_budget is not None:
        chosen |= {each.family: each.best for each in within_budget.families if each.best is not None}
    return [results[0], *chosen.values()]


def family_of(result: MethodResult) -> str:
    """The family of a method; one that has none is its own."""
    return result.method.family or result.method.title


def sections_of(
    evaluation: Evaluation,
    within_budget: BudgetComparison | None = None,
    side_by_side: Sequence[MethodResult] | None = None,
) -> list[Section]:
    """Everything that was measured, in the order of a report.

    `side_by_side` are the methods that are columns where groups or sentences are rows; None: all.
    """
    results, protocol = evaluation.results, evaluation.protocol
    few = len(evaluation.prompts) < _JUDGED_FROM
    coloured = "one is coloured where its 95 % interval excludes 0"
    if few:
        coloured = f"none is coloured, as intervals over fewer than {_JUDGED_FROM} prompts are too narrow to go by"
    note = f"Changes are against plain decoding, paired by prompts; {coloured}."
    wanted = [*(protocol.metrics if protocol else (*_TOXICITY, *_FLUENCY))]  # of a protocol what the field reports
    wanted += [name for name in results[0].estimates if name.startswith("mean_toxicity (")]  # of further scorers
    title = f"Protocol {protocol.name}" if protocol else "Toxicity and fluency"
    columns = results if side_by_side is None else side_by_side
    sections = [
        Section("toxicity", title, _figures(results, wanted, few), note),
        *([] if within_budget is None else [_budget_section(within_budget)]),
        Section("text", "Diversity and length", _figures(results, () if protocol else _TEXT, few)),
        *_neutral_sections(results, columns),
        *_suite_sections(columns),
        *_holistic_bias_sections(results),
        _utility_section(results),
        _speed_section(results),
    ]
    return [section for section in sections if section.table.rows]


def _figures(results: Sequence[MethodResult], wanted: Sequence[str], few: bool) -> Table:
    names = [name for name in wanted if any(name in result.estimates for result in results)]
    titles = [_metric(name).title + "".join(name.partition(" (")[1:]) for name in names]
    rows = [
        _row(
            each.method.title,
            *(_figure_cell(name, each.estimates.get(name), each.changes.get(name), few) for name in names),
        )
        for each in results
    ]
    return Table(["method", *titles], rows if names else [])


def _figure_cell(name: str, estimate: Estimate | None, against: Estimate | None, few: bool) -> Cell:
    cell = _cell(estimate, partial(figure, name))
    if against is None or cell.text == "-":
        return cell
    better = _metric(name).lower_is_better
    is_clear = math.isfinite(against.low) and not against.low <= 0.0 <= against.high
    verdict = "" if few or better is None or not is_clear else "good" if (against.high < 0.0) == better else "bad"
    return replace(cell, change=change(against), verdict=verdict)


def _budget_section(within_budget: BudgetComparison) -> Section:
    key = within_budget.measured_by
    fluency, budget = METRICS[key].title, f"{within_budget.budget:.1%}"
    shown = ("toxic_share", key, "toxicity_probability", "distinct_2")

    def row(each: AtBudget) -> list[Cell]:
        default = {} if each.default is None else each.default.changes
        best = {} if each.best is None else each.best.changes
        return _row(
            each.family,
            *(_cell(default.get(name), _CHANGE) for name in shown[:2]),
            "none" if each.best is None else each.best.method.title,
            *(_cell(best.get(name), _CHANGE) for name in shown),
        )

    headers = ["method", "default: toxic", f"default: {fluency}", "best", *(METRICS[name].title for name in shown)]
    note = (
        f"The budget: {fluency} at most {budget} higher than plain decoding's, and distinct-1, -2 and -3 at most "
        f"{budget} lower. Best: of the strengths that were measured, the one with the lowest mean toxicity within it. "
        "All figures are changes against plain."
    )
    title = f"Every method within a fluency budget of {budget}"
    return Section("budget", title, Table(headers, [*map(row, within_budget.families)]), note)


def _neutral_sections(results: Sequence[MethodResult], columns: Sequence[MethodResult]) -> list[Section]:
    known = _known(results, "neutrality")
    rows = [
        _row(
            title,
            *(f"{value:.4f}" for value in (each.divergence, each.reverse_divergence)),
            *(_PERCENT(each.kept), f"{each.lowest_word.word} {_PERCENT(each.lowest_word.kept)}"),
        )
        for title, each in known
    ]
    headers = ["method", "KL(target, method)", "KL(method, target)", "group words keep", "lowest word"]
    groups = {title: each.groups() for title, each in _known(columns, "neutrality")}
    names = known[0][1].groups() if known else {}
    kept = [_row(name, *(_PERCENT(each[name]) for each in groups.values())) for name in names]
    words = "The probability that words keep after neutral beginnings such as “The new teacher is”; 100 % is unchanged."
    return [
        Section("neutral", "Neutral text", Table(headers, rows), "In nats per token, on benign text."),
        Section("words", "Words that name groups", Table(["words", *groups], kept), words),
    ]


def _suite_sections(results: Sequence[MethodResult]) -> list[Section]:
    """Two per suite: its sentences by functionality and by group, and how well harmful ones are told from others."""
    methods = [result for result in results if result.suites]
    columns = ["how many", *(result.method.title for result in methods)]
    rows_note = (
        "Mean over the sentences of log p(method) - log p(target), nats, and the share of sentences in which a token "
        "(a word or a part of one) keeps less than half of its probability, with a 95 % Wilson interval. Of harmless "
        "sentences these are false positives. Nothing is sampled."
    )
    contrasts_note = (
        "AUC: chance that a harmful sentence is lowered more than a harmless one (0.5: not told apart). Odds: what "
        "harmful ones keep of their probability over what harmless ones keep."
    )
    sections = []
    for name in methods[0].suites if methods else ():
        found = [result.suites[name] for result in methods]
        rows = [
            _row(f"{line[0].name.replace('_', ' ')}, {line[0].label}", str(line[0].cases), *map(_suite_cell, line))
            for line in zip(*((*each.rows, *each.groups) for each in found), strict=True)
        ]
        contrasts = [
            _row(
                f"{title}, {line[0].name}",
                f"{line[0].harmful} + {line[0].harmless}",
                *(_cell(getattr(each, key), _THREE_DIGITS) for each in line),
            )
            for line in zip(*(each.contrasts for each in found), strict=True)
            for key, title in (("auc", "AUC"), ("odds", "odds"))
        ]
        tables = (Table(["sentences", *columns], rows), Table(["compared", *columns], contrasts))
        sections += [
            Section(f"suite {name}", f"Labelled sentences: {name}", tables[0], rows_note),
            Section(f"contrasts {name}", f"Harmful told from harmless: {name}", tables[1], contrasts_note),
        ]
    return sections


def _suite_cell(row: SuiteRow) -> Cell:
    cell = _cell(row.halved, _PERCENT)
    return replace(cell, text=f"{row.mean_shift:+.2f}, {cell.text} halved")


def _holistic_bias_sections(results: Sequence[MethodResult]) -> list[Section]:
    known = _known(results, "holistic_bias")
    names = list(known[0][1].axes()) if known else []
    axes = [
        _row(title, _PERCENT(each.share_kept), str(len(each.raised_nouns)), *map(_PERCENT, each.axes().values()))
        for title, each in known
    ]
    headers = ["method", "names that keep 90 %", "nouns raised", *(name.replace("_", " ") for name in names)]
    note = (
        "HolisticBias' names of groups of people: the probability that they keep after its neutral beginnings, "
        "geometric means; and how many nouns are likelier than before after hateful ones such as “kill all the”."
    )
    worst = [
        _row(title, each.name, each.axis, _PERCENT(each.neutral), _PERCENT(each.lowest), each.lowest_after)
        for title, found in known
        for each in found.worst()
    ]
    raised = [
        _row(title, each.name, each.axis, _PERCENT(each.hateful), each.highest_after)
        for title, found in known
        for each in found.raised_nouns[:10]
    ]
    columns = ["method", "name", "axis", "keeps"]
    return [
        Section("names", "Names of groups", Table(headers, axes), note),
        Section("worst names", "The names that lose most", Table([*columns, "lowest", "after"], worst)),
        Section("raised names", "Nouns that hateful beginnings raise", Table([*columns, "after"], raised)),
    ]


def _utility_section(results: Sequence[MethodResult]) -> Section:
    """A row for each method and task: they have different units."""
    rows = []
    for title, found in _known(results, "utility"):
        for each in found.figures:
            show = "{:.2f}".format if each.name.endswith("perplexity") else _PERCENT
            figures = (_cell(each.plain, show), _cell(each.guided, show), _cell(each.change, "{:+.2%}".format))
            rows.append(_row(title, each.title, f"{each.texts:,}", *figures))
    note = "Plain against guided on the same texts; changes of perplexity relative, of shares in points."
    headers = ["method", "task", "texts", "plain", "guided", "change"]
    return Section("utility", "What guidance costs at tasks", Table(headers, rows), note)


def _speed_section(results: Sequence[MethodResult]) -> Section:
    rows = []
    for title, speed in _known(results, "speed"):
        kept = Cell(f"{speed.kept:.3f}", (f"{speed.lowest:.3f}", f"{speed.highest:.3f}"))
        rows.append(_row(title, f"{speed.tokens_per_second:.0f}", kept))
    note = "Timed in turn with plain decoding in one process, eight rows; the ends are the lowest and highest round."
    return Section("speed", "Speed", Table(["method", "tokens/s", "share of plain's"], rows), note)


def _known(results: Sequence[MethodResult], what: str) -> list[tuple[str, Any]]:
    """One attribute of the methods that have it, with their titles."""
    return [(each.method.title, found) for each in results if (found := getattr(each, what)) is not None]


def _row(*cells: str | Cell) -> list[Cell]:
    return [each if isinstance(each, Cell) else Cell(each) for each in cells]


def _cell(estimate: Estimate | None, show: Callable[[float], str]) -> Cell:
    if estimate is None or not math.isfinite(estimate.value):
        return Cell("-")
    ends = (show(estimate.low), show(estimate.high)) if math.isfinite(estimate.low) else None
    return Cell(show(estimate.value), ends)


def _with_interval(cell: Cell) -> str:
    return cell.text if cell.interval is None else f"{cell.text} [{', '.join(cell.interval)}]"


def _lines(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _metric(name: str) -> Metric:
    """Of a name that may end with " (NAME)" of a second scorer."""
    return METRICS[name.partition(" (")[0]]


def figure(name: str, value: float) -> str:
    """A metric's value as it is shown."""
    base = name.partition(" (")[0]
    if not math.isfinite(value):
        return "-"
    if base in ("toxic_share", "empty_share"):
        return f"{value:.2%}" if abs(value) < 0.1 else f"{value:.1%}"
    return f"{value:.1f}" if base in ("perplexity", "target_perplexity", "length") else f"{value:.3f}"


def change(estimate: Estimate | None) -> str:
    """A relative change with its interval."""
    return _with_interval(_cell(estimate, _CHANGE))


def shown_value(value: object) -> str:
    """A setting as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
