"""The report as data (JSON) and as a Markdown table."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy
import torch
import transformers

from calibfuse._version import __version__
from calibfuse.evaluation.budget import METRICS_AT_BUDGET, AtBudget, BudgetComparison
from calibfuse.evaluation.evaluate import Evaluation, MethodResult
from calibfuse.evaluation.metrics import METRICS, Estimate
from calibfuse.evaluation.neutrality import Neutrality
from calibfuse.evaluation.suites import SuiteRow

FORMAT = "calibfuse-evaluation"
FORMAT_VERSION = 1
_PERCENT = frozenset({"toxic_share", "empty_share", "refusal_share", "finished_share", "repetition"})
_COLUMNS = (
    "toxic_share",
    "toxicity_probability",
    "expected_maximum_toxicity",
    "perplexity",
    "target_perplexity",
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "repetition",
    "length",
    "tokens_per_second",
)


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


def to_data(
    evaluation: Evaluation, *, with_examples: bool = True, within_budget: BudgetComparison | None = None
) -> dict[str, Any]:
    """Everything as JSON values; numbers that JSON lacks (infinite, none) become null.

    Args:
        evaluation: the results.
        with_examples: also continuations, as they are.
        within_budget: the comparison at one fluency, if it was made.

    Returns:
        A dictionary that `json.dumps(..., allow_nan=False)` accepts.
    """
    data = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "facts": evaluation.facts,
        "versions": versions(),
        "methods": [_method_data(result, with_examples) for result in evaluation.results],
        "fluency_budget": None if within_budget is None else within_budget.to_dict(),
    }
    return cast("dict[str, Any]", _without_nan(data))


def _method_data(result: MethodResult, with_examples: bool) -> dict[str, Any]:
    method = result.method
    data: dict[str, Any] = {
        "key": method.key,
        "title": method.title,
        "family": method.family,
        "alpha": method.alpha,
        "settings": dict(method.settings),
        "is_default": method.is_default,
        "metrics": {name: asdict(each) for name, each in result.estimates.items()},
        "change_against_plain": {name: asdict(each) for name, each in result.changes.items()},
        "difference_to_plain": {name: asdict(each) for name, each in result.differences.items()},
        "groups": {
            group: {name: asdict(each) for name, each in figures.items()} for group, figures in result.groups.items()
        },
        "speed": None if result.speed is None else asdict(result.speed),
        "suites": {name: asdict(each) for name, each in result.suites.items()},
        "opinions": [{**asdict(opinion), **asdict(figures)} for opinion, figures in result.opinions.items()],
        "neutrality": None if result.neutrality is None else _neutrality_data(result.neutrality),
    }
    if with_examples:
        for name, examples in (("first", result.measured.first), ("worst", result.measured.worst)):
            data[f"{name}_examples"] = [asdict(each) for each in examples]
    return data


def _neutrality_data(neutrality: Neutrality) -> dict[str, Any]:
    return {**asdict(neutrality), "kept": neutrality.kept, "kept_by_group": neutrality.groups()}


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_markdown(evaluation: Evaluation, *, within_budget: BudgetComparison | None = None) -> str:
    """Tables: figures with intervals, changes against plain, neutral text, and how all of it was made."""
    results = evaluation.results
    columns = [name for name in _COLUMNS if any(name in result.estimates for result in results)]
    parts = ["# Evaluation", "", "## Figures", ""]
    rows = [
        [result.method.title, *(_with_interval(name, result.estimates.get(name)) for name in columns)]
        for result in results
    ]
    parts += table(["method", *(METRICS[name].title for name in columns)], rows)
    if len(results) > 1:
        parts += ["", "## Change against plain, paired by prompts", ""]
        rows = [
            [result.method.title, *(change(result.changes.get(name)) for name in columns)] for result in results[1:]
        ]
        parts += table(["method", *(METRICS[name].title for name in columns)], rows)
    if within_budget is not None:
        parts += [
            "",
            f"## {budget_title(within_budget)}",
            "",
            *table(*budget_table(within_budget)),
            "",
            budget_note(within_budget),
        ]
    parts += ["", f"## {OPINIONS_TITLE}", "", *table(*opinions_table(results)), "", OPINIONS_NOTE]
    parts += [*_neutral_part(results), *_suite_part(results), *_speed_part(results)]
    parts += ["", "In brackets: 95 % bootstrap intervals over prompts.", "", "## How it was made", ""]
    parts += [f"- {name.replace('_', ' ')}: {_show(value)}" for name, value in evaluation.facts.items()]
    parts += [f"- {name}: {value}" for name, value in versions().items()]
    return "\n".join(parts) + "\n"


def _neutral_part(results: Sequence[MethodResult]) -> list[str]:
    known = [(result, result.neutrality) for result in results if result.neutrality is not None]
    if not known:
        return []
    groups = list(known[0][1].groups())
    headers = [
        "method",
        "KL(target, method), nats per token",
        "KL(method, target)",
        "group words keep",
        "lowest word",
        *groups,
    ]
    rows = [
        [
            result.method.title,
            f"{neutrality.divergence:.4f}",
            f"{neutrality.reverse_divergence:.4f}",
            f"{neutrality.kept:.1%}",
            f"{neutrality.lowest_word.word} {neutrality.lowest_word.kept:.1%}",
            *(f"{value:.1%}" for value in neutrality.groups().values()),
        ]
        for result, neutrality in known
    ]
    return ["", "## Neutral text", "", *table(headers, rows)]


OPINIONS_TITLE = "Toxic continuations by threshold and scorer"
OPINIONS_NOTE = (
    "Share of continuations that a scorer gives this score or more, and its change against plain. The figures above "
    "are the first scorer's. Every scorer flags some harmless text, the more the lower the threshold, and no method "
    "can remove that."
)


def opinions_table(results: Sequence[MethodResult]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: a line for each scorer and threshold."""
    rows = []
    for opinion in results[0].opinions:
        cells = [opinion.scorer, f"{opinion.toxic_from:g}"]
        for result in results:
            figures = result.opinions[opinion]
            cell = figure("toxic_share", figures.estimates["toxic_share"].value)
            if figures.changes:
                cell += f" ({change(figures.changes['toxic_share'])})"
            cells.append(cell)
        rows.append(cells)
    return ["scorer", "toxic from", *(result.method.title for result in results)], rows


def _suite_part(results: Sequence[MethodResult]) -> list[str]:
    parts: list[str] = []
    for name, (headers, rows) in suite_tables(results).items():
        parts += ["", f"## Labelled sentences: {name}", "", *table(headers, rows)]
    return [*parts, "", SUITE_NOTE] if parts else []


SUITE_NOTE = (
    "Mean over the sentences of log p(method) - log p(target), nats; then the share of sentences in which a token (a "
    "word or a part of one) keeps less than half of its probability, with 95 % Wilson intervals. Of harmless sentences "
    "these are false positives. AUC: chance that a harmful sentence is lowered more than a harmless one (0.5: not told "
    "apart); odds: what harmful ones keep over what harmless ones keep. Nothing is sampled."
)


def suite_tables(results: Sequence[MethodResult]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Headers and rows by name of the suite: sentences by functionality and group, then AUC and odds."""
    tables = {}
    methods = [result for result in results if result.suites]
    for name, first in (methods[0].suites if methods else {}).items():
        found = [result.suites[name] for result in methods]
        rows = []
        for kind in ("rows", "groups"):
            for place, row in enumerate(getattr(first, kind)):
                same = [getattr(each, kind)[place] for each in found]
                rows.append([f"{row.name}, {row.label}", str(row.cases), *map(_suite_cell, same)])
        for place, contrast in enumerate(first.contrasts):
            count = f"{contrast.harmful} + {contrast.harmless}"
            same_pairs = [each.contrasts[place] for each in found]
            rows.append([f"AUC, {contrast.name}", count, *(_in_brackets(each.auc) for each in same_pairs)])
            rows.append([f"odds, {contrast.name}", count, *(_in_brackets(each.odds) for each in same_pairs)])
        tables[name] = (["sentences", "how many", *(result.method.title for result in methods)], rows)
    return tables


def _suite_cell(row: SuiteRow) -> str:
    return f"{row.mean_shift:+.2f}, {row.halved.value:.1%} [{row.halved.low:.1%}, {row.halved.high:.1%}]"


def _in_brackets(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def budget_title(within_budget: BudgetComparison) -> str:
    """Heading of the comparison at one fluency."""
    return f"Every method within a fluency budget of {within_budget.budget:.1%}"


def budget_note(within_budget: BudgetComparison) -> str:
    """What the columns of that table mean."""
    return (
        f"The budget: {METRICS[within_budget.measured_by].title} at most {within_budget.budget:.1%} higher than plain "
        f"decoding's, and distinct-1, -2 and -3 at most {within_budget.budget:.1%} lower. Best: of the strengths that "
        "were measured, the one with the lowest mean toxicity within it. Exactly at the budget: interpolated where the "
        "cost crosses it; a dash: it never does, or there are no strengths. Changes are against plain."
    )


def budget_table(within_budget: BudgetComparison) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the comparison at one fluency."""
    headers = [
        "method",
        "default: toxic",
        "default: perplexity",
        "best",
        "toxic continuations",
        METRICS[within_budget.measured_by].title,
        "toxicity probability",
        "distinct-2",
        "toxic, exactly at the budget",
    ]
    return headers, [_budget_row(each, within_budget.measured_by) for each in within_budget.families]


def _budget_row(each: AtBudget, name: str) -> list[str]:
    default = ["-", "-"]
    if each.default is not None:
        default = [change(each.default.changes.get("toxic_share")), change(each.default.changes.get(name))]
    best = ["none", "-", "-", "-", "-"]
    if each.best is not None:
        metrics = ("toxic_share", name, "toxicity_probability", "distinct_2")
        best = [each.best.method.title, *(change(each.best.changes.get(metric)) for metric in metrics)]
    crossing = "-"
    if each.strength is not None and math.isfinite(each.changes[METRICS_AT_BUDGET[0]]):
        crossing = f"{each.changes[METRICS_AT_BUDGET[0]]:+.1%} (strength {each.strength:.3g})"
    return [each.family, *default, *best, crossing]


def _speed_part(results: Sequence[MethodResult]) -> list[str]:
    known = [(result, result.speed) for result in results if result.speed is not None]
    if not known:
        return []
    rows = [
        [
            result.method.title,
            f"{speed.tokens_per_second:.0f}",
            f"{speed.kept:.3f} [{speed.lowest:.3f}, {speed.highest:.3f}]",
        ]
        for result, speed in known
    ]
    return ["", "## Speed, interleaved with plain", "", *table(["method", "tokens/s", "share of plain's"], rows)]


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
    return f"{value:.0f}" if name == "tokens_per_second" else f"{value:.3f}"


def change(estimate: Estimate | None) -> str:
    """A relative change with its interval."""
    if estimate is None or not math.isfinite(estimate.value):
        return "-"
    if not math.isfinite(estimate.low):
        return f"{estimate.value:+.1%}"
    return f"{estimate.value:+.1%} [{estimate.low:+.1%}, {estimate.high:+.1%}]"


def _with_interval(name: str, estimate: Estimate | None) -> str:
    if estimate is None or not math.isfinite(estimate.value):
        return "-"
    if not math.isfinite(estimate.low):
        return figure(name, estimate.value)
    return f"{figure(name, estimate.value)} [{figure(name, estimate.low)}, {figure(name, estimate.high)}]"


def _show(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
