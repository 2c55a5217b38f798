"""The tables of a report, the same on the page and in Markdown."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
import transformers

from calibfuse._version import __version__
from calibfuse.evaluation.budget import METRICS_AT_BUDGET, AtBudget, BudgetComparison
from calibfuse.evaluation.evaluate import Evaluation, MethodResult
from calibfuse.evaluation.given_text.suites import SuiteRow
from calibfuse.evaluation.metrics import METRICS, Estimate
from calibfuse.html.pages import Cell, Table

_PERCENT = frozenset({"toxic_share", "empty_share", "refusal_share", "finished_share", "repetition"})
_TOXICITY = (
    *("toxic_share", "toxicity_probability", "expected_maximum_toxicity", "mean_toxicity"),
    *("perplexity", "bits_per_byte", "target_perplexity"),
)
_TEXT = ("distinct_1", "distinct_2", "distinct_3", "repetition", "length", "empty_share", "refusal_share")
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


def to_markdown(evaluation: Evaluation, *, within_budget: BudgetComparison | None = None) -> str:
    """Tables: figures with intervals, changes against plain, neutral text, and how all of it was made."""
    parts = ["# Evaluation"]
    for section in sections_of(evaluation, within_budget):
        headers, rows = section.table.headers, section.table.rows
        parts += [
            "",
            f"## {section.title}",
            "",
            *table(headers, [[_with_interval(cell) for cell in row] for row in rows]),
        ]
        if any(cell.change for row in rows for cell in row):
            changes = [[cell.change or (cell.text if cell.interval is None else "-") for cell in row] for row in rows]
            compared = [row for row, cells in zip(changes, rows, strict=True) if any(cell.change for cell in cells)]
            parts += ["", "Change against plain, paired by prompts:", "", *table(headers, compared)]
        parts += ["", section.note] if section.note else []
    parts += ["", "In brackets: 95 % bootstrap intervals over prompts.", "", "## How it was made", ""]
    parts += [f"- {name.replace('_', ' ')}: {shown_value(value)}" for name, value in evaluation.facts.items()]
    parts += [f"- {name}: {value}" for name, value in versions().items()]
    return "\n".join(parts) + "\n"


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
    note = "Changes are against plain decoding, paired by prompts; on the page, " + (
        f"changes are coloured from {_JUDGED_FROM} prompts on: intervals over fewer are too narrow to go by."
        if few
        else "one is coloured where its 95 % interval excludes 0."
    )
    sections = [
        Section("toxicity", *_main_figures(evaluation, few), note),
        *([] if within_budget is None else [_budget_section(within_budget)]),
        Section("text", "Diversity and length", _figures(results, [] if evaluation.protocol else _TEXT, few)),
        _threshold_section(results),
        *_neutral_sections(results, columns),
        *_suite_sections(columns),
        *_holistic_bias_sections(results),
        *_utility_sections(results),
        *_group_sections(columns),
        *_speed_sections(results),
    ]
    return [section for section in sections if section.table.rows]


def _main_figures(evaluation: Evaluation, few: bool) -> tuple[str, Table]:
    """Title and table: of a protocol the figures that the field reports with it, and those alone."""
    protocol = evaluation.protocol
    if protocol is None:
        return "Toxicity and fluency", _figures(evaluation.results, _TOXICITY, few)
    return f"Protocol {protocol.name}", _figures(evaluation.results, protocol.metrics, few)


def _figures(results: Sequence[MethodResult], wanted: Sequence[str], few: bool) -> Table:
    names = [name for name in wanted if any(name in result.estimates for result in results)]
    rows = (
        []
        if not names
        else [
            [
                Cell(result.method.title),
                *(_figure_cell(name, result.estimates.get(name), result.changes.get(name), few) for name in names),
            ]
            for result in results
        ]
    )
    return Table(["method", *(METRICS[name].title for name in names)], rows)


def _figure_cell(name: str, estimate: Estimate | None, against: Estimate | None = None, few: bool = True) -> Cell:
    if estimate is None or not math.isfinite(estimate.value):
        return Cell("-")
    interval = (figure(name, estimate.low), figure(name, estimate.high)) if math.isfinite(estimate.low) else None
    if against is None:
        return Cell(figure(name, estimate.value), interval)
    better = METRICS[name].lower_is_better
    is_clear = math.isfinite(against.low) and not against.low <= 0.0 <= against.high
    verdict = "" if few or better is None or not is_clear else "good" if (against.high < 0.0) == better else "bad"
    return Cell(figure(name, estimate.value), interval, change(against), verdict)


def _budget_section(within_budget: BudgetComparison) -> Section:
    fluency = METRICS[within_budget.measured_by].title
    headers = [
        *("method", "default: toxic", f"default: {fluency}", "best", "toxic continuations", fluency),
        *("toxicity probability", "distinct-2", "toxic, exactly at the budget"),
    ]
    rows = [_budget_row(each, within_budget.measured_by) for each in within_budget.families]
    note = (
        f"The budget: {fluency} at most {within_budget.budget:.1%} higher than plain decoding's, and distinct-1, -2 "
        f"and -3 at most {within_budget.budget:.1%} lower. Best: of the strengths that were measured, the one with the "
        "lowest mean toxicity within it. Exactly at the budget: interpolated where the cost crosses it; a dash: it "
        "never does, or there are no strengths. All figures are changes against plain."
    )
    return Section("budget", budget_title(within_budget), Table(headers, rows), note)


def budget_title(within_budget: BudgetComparison) -> str:
    """Heading of the comparison at one fluency."""
    return f"Every method within a fluency budget of {within_budget.budget:.1%}"


def _budget_row(each: AtBudget, fluency: str) -> list[Cell]:
    def changed(result: MethodResult | None, name: str) -> Cell:
        estimate = None if result is None else result.changes.get(name)
        if estimate is None or not math.isfinite(estimate.value):
            return Cell("-")
        ends = (f"{estimate.low:+.1%}", f"{estimate.high:+.1%}") if math.isfinite(estimate.low) else None
        return Cell(f"{estimate.value:+.1%}", ends)

    crossing = "-"
    if each.strength is not None and math.isfinite(each.changes[METRICS_AT_BUDGET[0]]):
        crossing = f"{each.changes[METRICS_AT_BUDGET[0]]:+.1%} (strength {each.strength:.3g})"
    return [
        Cell(each.family),
        *(changed(each.default, name) for name in ("toxic_share", fluency)),
        Cell("none" if each.best is None else each.best.method.title),
        *(changed(each.best, name) for name in ("toxic_share", fluency, "toxicity_probability", "distinct_2")),
        Cell(crossing),
    ]


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
    if not known:
        return []
    rows = [
        [
            Cell(title),
            Cell(f"{each.divergence:.4f}"),
            Cell(f"{each.reverse_divergence:.4f}"),
            Cell(f"{each.log_prob_shift:+.4f}"),
            Cell(f"{each.kept:.1%}"),
            Cell(f"{each.lowest_word.word} {each.lowest_word.kept:.1%}"),
        ]
        for title, each in known
    ]
    headers = ["method", "KL(target, method)", "KL(method, target)", "log-probability of the text"]
    headers += ["group words keep", "lowest word"]
    groups = {each.method.title: each.neutrality.groups() for each in columns if each.neutrality is not None}
    kept = [[Cell(name), *(Cell(f"{each[name]:.1%}") for each in groups.values())] for name in known[0][1].groups()]
    note = "In nats per token, on benign text; the log-probability is the change of the text's own tokens."
    words = "The probability that words keep after neutral beginnings such as “The new teacher is”; 100 % is unchanged."
    return [
        Section("neutral", "Neutral text", Table(headers, rows), note),
        Section("words", "Words that name groups", Table(["words", *groups], kept), words),
    ]


def _suite_sections(results: Sequence[MethodResult]) -> list[Section]:
    """Two per suite: its sentences by functionality and by group, and how well harmful ones are told from others."""
    methods = [result for result in results if result.suites]
    titles = [result.method.title for result in methods]
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
    for name, first in (methods[0].suites if methods else {}).items():
        found = [result.suites[name] for result in methods]
        rows = []
        for kind in ("rows", "groups"):
            for place, row in enumerate(getattr(first, kind)):
                cells = [_suite_cell(getattr(each, kind)[place]) for each in found]
                rows.append([Cell(f"{row.name.replace('_', ' ')}, {row.label}"), Cell(str(row.cases)), *cells])
        table_ = Table(["sentences", "how many", *titles], rows)
        sections.append(Section(f"suite {name}", f"Labelled sentences: {name}", table_, rows_note))
        told = []
        for place, contrast in enumerate(first.contrasts):
            count = Cell(f"{contrast.harmful} + {contrast.harmless}")
            for figure_ in ("auc", "odds"):
                ends = [_three_digits(getattr(each.contrasts[place], figure_)) for each in found]
                told.append([Cell(f"{figure_.replace('auc', 'AUC')}, {contrast.name}"), count, *ends])
        table_ = Table(["harmful against harmless", "how many", *titles], told)
        sections.append(Section(f"contrasts {name}", f"Harmful told from harmless: {name}", table_, contrasts_note))
    return sections


def _suite_cell(row: SuiteRow) -> Cell:
    ends = (f"{row.halved.low:.1%}", f"{row.halved.high:.1%}")
    return Cell(f"{row.mean_shift:+.2f}, {row.halved.value:.1%} halved", ends)


def _three_digits(estimate: Estimate) -> Cell:
    return Cell(f"{estimate.value:.3f}", (f"{estimate.low:.3f}", f"{estimate.high:.3f}"))


def _holistic_bias_sections(results: Sequence[MethodResult]) -> list[Section]:
    known = [(result.method.title, result.holistic_bias) for result in results if result.holistic_bias is not None]
    if not known:
        return []
    axes = [[Cell(title), Cell(f"{each.share_kept:.1%}"), Cell(str(len(each.raised_nouns)))] for title, each in known]
    for cells, (_, each) in zip(axes, known, strict=True):
        cells += [Cell(f"{value:.1%}") for value in each.axes().values()]
    headers = ["method", "names that keep 90 %", "nouns raised", *known[0][1].axes()]
    note = (
        "HolisticBias' names of groups of people: the probability that they keep after its neutral beginnings, "
        "geometric means; and how many nouns are likelier than before after hateful ones such as “kill all the”."
    )
    worst = [
        [*map(Cell, (title, each.name, each.axis, f"{each.neutral:.1%}", f"{each.lowest:.1%}", each.lowest_after))]
        for title, found in known
        for each in found.worst()
    ]
    raised = [
        [*map(Cell, (title, each.name, each.axis, f"{each.hateful:.1%}", each.highest_after))]
        for title, found in known
        for each in found.raised_nouns[:10]
    ]
    columns = ["method", "name", "axis", "keeps"]
    return [
        Section("names", "Names of groups", Table([each.replace("_", " ") for each in headers], axes), note),
        Section("worst names", "The names that lose most", Table([*columns, "lowest", "after"], worst)),
        Section("raised names", "Nouns that hateful beginnings raise", Table([*columns, "after"], raised)),
    ]


def _utility_sections(results: Sequence[MethodResult]) -> list[Section]:
    """A row for each method and task: they have different units."""
    rows = []
    for result in results:
        for each in () if result.utility is None else result.utility.figures:
            cells = [Cell(result.method.title), Cell(each.title), Cell(f"{each.texts:,}")]
            is_share = each.change is None or each.name.endswith("accuracy")
            for value in (each.plain, each.guided):
                cells.append(_utility_cell(value, is_share))
            cells.append(Cell("-") if each.change is None else _percent_cell(each.change))
            rows.append(cells)
    note = "Plain against guided on the same texts; changes of accuracy in points, of perplexity relative."
    headers = ["method", "task", "texts", "plain", "guided", "change"]
    return [Section("utility", "What guidance costs at tasks", Table(headers, rows), note)]


def _utility_cell(value: Estimate | None, is_share: bool) -> Cell:
    if value is None:
        return Cell("-")
    low, middle, high = (f"{each:.1%}" if is_share else f"{each:.2f}" for each in (value.low, value.value, value.high))
    return Cell(middle, (low, high))


def _percent_cell(value: Estimate) -> Cell:
    return Cell(f"{value.value:+.2%}", (f"{value.low:+.2%}", f"{value.high:+.2%}"))


def _group_sections(results: Sequence[MethodResult]) -> list[Section]:
    rows = [
        [
            Cell(group.replace("_", " ")),
            *(_figure_cell("toxic_share", result.groups[group].get("toxic_share")) for result in results),
        ]
        for group in results[0].groups
    ]
    headers = ["prompts", *(result.method.title for result in results)]
    return [Section("groups", "Toxic continuations by group of prompts", Table(headers, rows))]


def _speed_sections(results: Sequence[MethodResult]) -> list[Section]:
    rows = [
        [
            Cell(result.method.title),
            Cell(f"{result.speed.tokens_per_second:.0f}"),
            Cell(f"{result.speed.kept:.3f}", (f"{result.speed.lowest:.3f}", f"{result.speed.highest:.3f}")),
        ]
        for result in results
        if result.speed is not None
    ]
    note = "Timed in turn with plain decoding in one process, eight rows; the ends are the lowest and highest round."
    return [Section("speed", "Speed", Table(["method", "tokens/s", "share of plain's"], rows), note)]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


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
