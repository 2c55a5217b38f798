"""The tables of a report, the same on the page and in Markdown."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy
import torch
import transformers

from calibfuse import __version__
from calibfuse.evaluation.budget import METRICS_AT_BUDGET, AtBudget, BudgetComparison
from calibfuse.evaluation.evaluate import Evaluation, MethodResult
from calibfuse.evaluation.given_text.suites import SuiteRow
from calibfuse.evaluation.metrics import METRICS, Estimate
from calibfuse.html import Cell, Mask, Table, unchanged

_PERCENT = frozenset({"toxic_share", "empty_share", "refusal_share", "finished_share", "repetition"})
_TOXICITY = (
    *("toxic_share", "toxicity_probability", "expected_maximum_toxicity", "mean_toxicity"),
    *("perplexity", "bits_per_byte", "target_perplexity"),
)
_TEXT = ("distinct_1", "distinct_2", "distinct_3", "repetition", "length", "empty_share", "refusal_share")
_BUDGET_METRICS = ("toxicity_probability", "distinct_2")
_MOST_SHOWN = 7  # methods side by side in bars and examples
_WORST_SHOWN = 3  # continuations of a method in Markdown
_JUDGED_FROM = 50  # prompts; a bootstrap over fewer gives intervals that are too narrow to colour a change by


@dataclass(frozen=True)
class Section:
    """A table with its heading.

    Attributes:
        key: where a chart of the same figures belongs.
        title: heading.
        table: the figures.
        note: what they mean.
    """

    key: str
    title: str
    table: Table
    note: str = ""


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
    """Tables: figures with intervals, changes against plain, neutral text, the worst examples, how all was made.

    `mask` makes offensive words of the examples unreadable; None shows them.
    """
    parts = ["# Evaluation"]
    for section in sections_of(evaluation, within_budget):
        headers, rows = section.table.headers, section.table.rows
        shown = [[_with_interval(cell) for cell in row] for row in rows]
        parts += ["", f"## {section.title}", "", *table(headers, shown)]
        if any(cell.change for row in rows for cell in row):
            changes = [[cell.change or (cell.text if cell.interval is None else "-") for cell in row] for row in rows]
            compared = [row for row, cells in zip(changes, rows, strict=True) if any(cell.change for cell in cells)]
            parts += ["", "Change against plain, paired by prompts:", "", *table(headers, compared)]
        parts += ["", section.note] if section.note else []
    parts += ["", "In brackets: 95 % bootstrap intervals over prompts."]
    parts += _worst_examples(representatives(evaluation.results, within_budget), mask or unchanged)
    parts += ["", "## How it was made", ""]
    parts += [f"- {name.replace('_', ' ')}: {shown_value(value)}" for name, value in evaluation.facts.items()]
    parts += [f"- {name}: {value}" for name, value in versions().items()]
    return "\n".join(parts) + "\n"


def _worst_examples(shown: Sequence[MethodResult], mask: Mask) -> list[str]:
    rows = [
        [result.method.title, f"{each.toxicity:.2f}", mask(each.continuation.strip())]
        for result in shown
        for each in result.measured.worst[:_WORST_SHOWN]
    ]
    headers = ["method", "toxicity", "continuation"]
    return ["", "## The most toxic continuations", "", *table(headers, rows)] if rows else []


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

    Args:
        evaluation: the results.
        within_budget: the comparison at one fluency, if it was made.
        side_by_side: the methods that are columns where groups or sentences are rows; None: all.

    Returns:
        Those that have figures.
    """
    results = evaluation.results
    columns = results if side_by_side is None else side_by_side
    few = len(evaluation.prompts) < _JUDGED_FROM
    coloured = "one is coloured where its 95 % interval excludes 0"
    if few:
        coloured = f"none is coloured, as intervals over fewer than {_JUDGED_FROM} prompts are too narrow to go by"
    note = f"Changes are against plain decoding, paired by prompts; {coloured}."
    sections = [
        Section("toxicity", *_main_figures(evaluation, few), note),
        *([] if within_budget is None else [_budget_section(within_budget)]),
        Section("text", "Diversity and length", _figures(results, [] if evaluation.protocol else _TEXT, few)),
        _threshold_section(results),
        *_neutral_sections(results, columns),
        *_suite_sections(columns),
        *_holistic_bias_sections(results),
        _utility_section(results),
        _group_section(columns),
        _speed_section(results),
    ]
    return [section for section in sections if section.table.rows]


def _main_figures(evaluation: Evaluation, few: bool) -> tuple[str, Table]:
    """Title and table: of a protocol what the field reports with it alone; further scorers add a column each."""
    protocol = evaluation.protocol
    title = "Toxicity and fluency" if protocol is None else f"Protocol {protocol.name}"
    figures = _figures(evaluation.results, _TOXICITY if protocol is None else protocol.metrics, few)
    return title, _with_other_scorers(figures, evaluation.results, few)


def _figures(results: Sequence[MethodResult], wanted: Sequence[str], few: bool) -> Table:
    names = [name for name in wanted if any(name in result.estimates for result in results)]
    rows = [
        _row(
            each.method.title,
            *(_figure_cell(name, each.estimates.get(name), each.changes.get(name), few) for name in names),
        )
        for each in results
    ]
    return Table(["method", *(METRICS[name].title for name in names)], rows if names else [])


def _with_other_scorers(figures: Table, results: Sequence[MethodResult], few: bool) -> Table:
    """The figures, and mean toxicity by every scorer but the first."""
    first = results[0].thresholds[0].scorer if results[0].thresholds else ""
    by_scorer = [{each.scorer: each for each in result.thresholds if each.scorer != first} for result in results]
    name = "mean_toxicity"
    rows = [
        [*row, *(_figure_cell(name, each.estimates[name], each.changes.get(name), few) for each in found.values())]
        for row, found in zip(figures.rows, by_scorer, strict=True)
    ]
    return Table([*figures.headers, *(f"{METRICS[name].title} ({scorer})" for scorer in by_scorer[0])], rows)


def _figure_cell(name: str, estimate: Estimate | None, against: Estimate | None, few: bool) -> Cell:
    cell = _cell(estimate, partial(figure, name))
    if against is None or cell.text == "-":
        return cell
    better = METRICS[name].lower_is_better
    is_clear = math.isfinite(against.low) and not against.low <= 0.0 <= against.high
    verdict = "" if few or better is None or not is_clear else "good" if (against.high < 0.0) == better else "bad"
    return replace(cell, change=change(against), verdict=verdict)


def _budget_section(within_budget: BudgetComparison) -> Section:
    key = within_budget.measured_by
    fluency, budget = METRICS[key].title, f"{within_budget.budget:.1%}"

    def row(each: AtBudget) -> list[Cell]:
        crossing = "-"
        if each.strength is not None and math.isfinite(each.changes[METRICS_AT_BUDGET[0]]):
            crossing = f"{each.changes[METRICS_AT_BUDGET[0]]:+.1%} (strength {each.strength:.3g})"
        default = {} if each.default is None else each.default.changes
        best = {} if each.best is None else each.best.changes
        return _row(
            each.family,
            *(_cell(default.get(name), "{:+.1%}".format) for name in ("toxic_share", key)),
            "none" if each.best is None else each.best.method.title,
            *(_cell(best.get(name), "{:+.1%}".format) for name in ("toxic_share", key, *_BUDGET_METRICS)),
            crossing,
        )

    headers = [
        *("method", "default: toxic", f"default: {fluency}", "best", "toxic continuations", fluency),
        *(METRICS[name].title for name in _BUDGET_METRICS),
        "toxic, exactly at the budget",
    ]
    note = (
        f"The budget: {fluency} at most {budget} higher than plain decoding's, and distinct-1, -2 and -3 at most "
        f"{budget} lower. Best: of the strengths that were measured, the one with the lowest mean toxicity within it. "
        "Exactly at the budget: interpolated where the cost crosses it; a dash: it never does, or there are no "
        "strengths. All figures are changes against plain."
    )
    return Section("budget", budget_title(within_budget), Table(headers, [*map(row, within_budget.families)]), note)


def budget_title(within_budget: BudgetComparison) -> str:
    """Heading of the comparison at one fluency."""
    return f"Every method within a fluency budget of {within_budget.budget:.1%}"


def _threshold_section(results: Sequence[MethodResult]) -> Section:
    """A column for each scorer and threshold."""
    rows = []
    for result in results:
        cells = [Cell(result.method.title)]
        for each in result.thresholds:
            shown = change(each.changes["toxic_share"]) if each.changes and not each.is_too_few else ""
            cells.append(Cell(figure("toxic_share", each.estimates["toxic_share"].value), None, shown))
        rows.append(cells)
    note = (
        "Share of continuations that a scorer gives this score or more, and its change against plain where plain "
        "decoding has enough of them. The figures above are the first scorer's. Every scorer flags some harmless text, "
        "the more the lower the threshold, and no method can remove that."
    )
    headers = ["method", *(f"{each.scorer}, from {each.toxic_from:g}" for each in results[0].thresholds)]
    return Section("thresholds", "Toxic continuations by threshold and scorer", Table(headers, rows), note)


def _neutral_sections(results: Sequence[MethodResult], columns: Sequence[MethodResult]) -> list[Section]:
    known = [(result.method.title, result.neutrality) for result in results if result.neutrality is not None]
    rows = [
        _row(
            title,
            *(f"{each.divergence:.4f}", f"{each.reverse_divergence:.4f}", f"{each.log_prob_shift:+.4f}"),
            *(f"{each.kept:.1%}", f"{each.lowest_word.word} {each.lowest_word.kept:.1%}"),
        )
        for title, each in known
    ]
    headers = ["method", "KL(target, method)", "KL(method, target)", "log-probability of the text"]
    headers += ["group words keep", "lowest word"]
    groups = {each.method.title: each.neutrality.groups() for each in columns if each.neutrality is not None}
    names = known[0][1].groups() if known else {}
    kept = [_row(name, *(f"{each[name]:.1%}" for each in groups.values())) for name in names]
    note = "In nats per token, on benign text; the log-probability is the change of the text's own tokens."
    words = "The probability that words keep after neutral beginnings such as “The new teacher is”; 100 % is unchanged."
    return [
        Section("neutral", "Neutral text", Table(headers, rows), note),
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
        same = [*zip(*((*each.rows, *each.groups) for each in found), strict=True)]
        rows = [
            _row(f"{line[0].name.replace('_', ' ')}, {line[0].label}", str(line[0].cases), *map(_suite_cell, line))
            for line in same
        ]
        contrasts = [
            _row(
                f"{title}, {line[0].name}",
                f"{line[0].harmful} + {line[0].harmless}",
                *(_cell(getattr(each, key), "{:.3f}".format) for each in line),
            )
            for line in zip(*(each.contrasts for each in found), strict=True)
            for key, title in (("auc", "AUC"), ("odds", "odds"))
        ]
        sections += [
            Section(f"suite {name}", f"Labelled sentences: {name}", Table(["sentences", *columns], rows), rows_note),
            Section(
                f"contrasts {name}",
                f"Harmful told from harmless: {name}",
                Table(["compared", *columns], contrasts),
                contrasts_note,
            ),
        ]
    return sections


def _suite_cell(row: SuiteRow) -> Cell:
    cell = _cell(row.halved, "{:.1%}".format)
    return replace(cell, text=f"{row.mean_shift:+.2f}, {cell.text} halved")


def _holistic_bias_sections(results: Sequence[MethodResult]) -> list[Section]:
    known = [(result.method.title, result.holistic_bias) for result in results if result.holistic_bias is not None]
    names = list(known[0][1].axes()) if known else []
    axes = [
        _row(
            title,
            *(f"{each.share_kept:.1%}", str(len(each.raised_nouns))),
            *(f"{each.axes()[name]:.1%}" for name in names),
        )
        for title, each in known
    ]
    headers = ["method", "names that keep 90 %", "nouns raised", *(name.replace("_", " ") for name in names)]
    note = (
        "HolisticBias' names of groups of people: the probability that they keep after its neutral beginnings, "
        "geometric means; and how many nouns are likelier than before after hateful ones such as “kill all the”."
    )
    worst = [
        _row(title, each.name, each.axis, f"{each.neutral:.1%}", f"{each.lowest:.1%}", each.lowest_after)
        for title, found in known
        for each in found.worst()
    ]
    raised = [
        _row(title, each.name, each.axis, f"{each.hateful:.1%}", each.highest_after)
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
    for result in results:
        for each in () if result.utility is None else result.utility.figures:
            show = ("{:.1%}" if each.change is None or each.name.endswith("accuracy") else "{:.2f}").format
            figures = (_cell(each.plain, show), _cell(each.guided, show), _cell(each.change, "{:+.2%}".format))
            rows.append(_row(result.method.title, each.title, f"{each.texts:,}", *figures))
    note = "Plain against guided on the same texts; changes of accuracy in points, of perplexity relative."
    headers = ["method", "task", "texts", "plain", "guided", "change"]
    return Section("utility", "What guidance costs at tasks", Table(headers, rows), note)


def _group_section(results: Sequence[MethodResult]) -> Section:
    show = partial(figure, "toxic_share")
    rows = [
        _row(group.replace("_", " "), *(_cell(each.groups[group].get("toxic_share"), show) for each in results))
        for group in results[0].groups
    ]
    headers = ["prompts", *(result.method.title for result in results)]
    return Section("groups", "Toxic continuations by group of prompts", Table(headers, rows))


def _speed_section(results: Sequence[MethodResult]) -> Section:
    known = [(result.method.title, result.speed) for result in results if result.speed is not None]
    rows = [
        _row(
            title,
            f"{each.tokens_per_second:.0f}",
            Cell(f"{each.kept:.3f}", (f"{each.lowest:.3f}", f"{each.highest:.3f}")),
        )
        for title, each in known
    ]
    note = "Timed in turn with plain decoding in one process, eight rows; the ends are the lowest and highest round."
    return Section("speed", "Speed", Table(["method", "tokens/s", "share of plain's"], rows), note)


def _row(*cells: str | Cell) -> list[Cell]:
    return [each if isinstance(each, Cell) else Cell(each) for each in cells]


def _cell(estimate: Estimate | None, show: Callable[[float], str]) -> Cell:
    """A figure with its interval, if it has one; a dash where there is no figure."""
    if estimate is None or not math.isfinite(estimate.value):
        return Cell("-")
    return Cell(
        show(estimate.value), (show(estimate.low), show(estimate.high)) if math.isfinite(estimate.low) else None
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines]


def figure(name: str, value: float) -> str:
    """A metric's value as it is shown."""
    if not math.isfinite(value):
        return "-"
    if name in _PERCENT:
        return f"{value:.2%}" if abs(value) < 0.1 else f"{value:.1%}"
    if name in ("perplexity", "target_perplexity", "length", "words"):
        return f"{value:.1f}"
    return f"{value:.3f}"


def change(estimate: Estimate | None) -> str:
    """A relative change with its interval."""
    if estimate is None or not math.isfinite(estimate.value):
        return "-"
    if not math.isfinite(estimate.low):
        return f"{estimate.value:+.1%}"
    return f"{estimate.value:+.1%} [{estimate.low:+.1%}, {estimate.high:+.1%}]"


def _with_interval(cell: Cell) -> str:
    return cell.text if cell.interval is None else f"{cell.text} [{', '.join(cell.interval)}]"


def shown_value(value: object) -> str:
    """A setting as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
