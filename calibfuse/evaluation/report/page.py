"""The report as data, as one HTML page that loads nothing and runs no script, and as files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from calibfuse.evaluation.bootstrap import Estimate
from calibfuse.evaluation.budget import BudgetComparison, perplexity_metric
from calibfuse.evaluation.evaluate import Evaluation, MethodResult
from calibfuse.evaluation.given_text.suites import HARMFUL, HARMLESS, SuiteResult
from calibfuse.evaluation.metrics import METRICS, Example
from calibfuse.evaluation.report.charts import Chart, Point, bars, curves
from calibfuse.evaluation.report.tables import (
    family_of,
    representatives,
    sections_of,
    shown_value,
    to_markdown,
    versions,
)
from calibfuse.evaluation.sampling import PLAIN
from calibfuse.html import Mask, render
from calibfuse.hub import write_files

Rows = dict[str, dict[str, Estimate]]  # row of bars -> title of a method -> figure
_EXAMPLES = 12


def write_report(
    evaluation: Evaluation,
    folder: str | os.PathLike[str],
    *,
    mask: Mask | None = None,
    within_budget: BudgetComparison | None = None,
) -> None:
    """Write the files into a folder, in the place of older ones; nothing half-written is left.

    `mask` makes offensive words of the page and of report.md unreadable; report.json holds text as it is.
    CheckpointError: the files cannot be written. MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    data = to_data(evaluation, within_budget=within_budget)
    contents = {
        "report.json": json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": to_markdown(evaluation, within_budget=within_budget, mask=mask),
        "report.html": to_html(evaluation, mask=mask, within_budget=within_budget),
    }
    curve = _curve(evaluation.results, perplexity_metric(evaluation))
    if curve is not None:
        contents["curve.svg"] = curve.svg()
    write_files(folder, {name: text.encode("utf-8") for name, text in contents.items()})


def to_data(
    evaluation: Evaluation, *, with_examples: bool = True, within_budget: BudgetComparison | None = None
) -> dict[str, Any]:
    """Everything as values that `json.dumps(..., allow_nan=False)` takes: infinite numbers and nan become null."""
    data = {
        "format": "calibfuse-evaluation",
        "format_version": 1,
        "facts": evaluation.facts,
        "versions": versions(),
        "methods": [_method_data(result, with_examples) for result in evaluation.results],
        "fluency_budget": None if within_budget is None else within_budget.to_dict(),
    }
    return cast("dict[str, Any]", _without_nan(data))


def _method_data(result: MethodResult, with_examples: bool) -> dict[str, Any]:
    method, neutrality = result.method, result.neutrality
    data: dict[str, Any] = {
        **{name: getattr(method, name) for name in ("key", "title", "family", "alpha", "is_default")},
        "settings": dict(method.settings),
        "metrics": {name: asdict(each) for name, each in result.estimates.items()},
        "change_against_plain": {name: asdict(each) for name, each in result.changes.items()},
        "difference_to_plain": {name: asdict(each) for name, each in result.differences.items()},
        "suites": {name: asdict(each) for name, each in result.suites.items()},
        "holistic_bias": None if result.holistic_bias is None else result.holistic_bias.to_dict(),
        **{
            name: None if value is None else asdict(value)
            for name, value in (("speed", result.speed), ("utility", result.utility), ("neutrality", neutrality))
        },
    }
    if neutrality is not None:
        data["neutrality"] |= {"kept": neutrality.kept, "kept_by_group": neutrality.groups()}
    if with_examples:
        for name, examples in (("first", result.measured.first), ("worst", result.measured.worst)):
            data[f"{name}_examples"] = [asdict(each) for each in examples]
    return data


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_html(evaluation: Evaluation, *, mask: Mask | None = None, within_budget: BudgetComparison | None = None) -> str:
    """Make the page; arguments and errors as of `write_report`."""
    facts, sampling = evaluation.facts, evaluation.sampling
    shown = representatives(evaluation.results, within_budget)
    found = [(METRICS[name].title, _curve(evaluation.results, name)) for name in ("perplexity", "target_perplexity")]
    return render(
        "evaluation/report/report.html.jinja",
        target=facts.get("target", "a target"),
        lead=("" if evaluation.protocol is None else f"Protocol {evaluation.protocol.name}. ")
        + f"{len(evaluation.prompts):,} prompts × {sampling.samples} continuations of up to "
        f"{sampling.max_new_tokens} tokens, top-p {sampling.top_p:g}, temperature {sampling.temperature:g}, seed "
        f"{sampling.seed}. Toxicity: {facts.get('scorer', 'unknown')}. Fluency: "
        f"{facts.get('judge') or 'the target itself'}.",
        notes=facts.get("notes") or [],
        curves=[{"fluency": title, "markup": chart.markup()} for title, chart in found if chart is not None],
        sections=sections_of(evaluation, within_budget, shown),
        charts=_bar_charts(shown, _colours(shown, evaluation.results)),
        mask=mask or str,
        shown=shown,
        first_examples=_first_examples(shown),
        metadata={name: shown_value(value) for name, value in {**facts, **versions()}.items() if name != "notes"},
    )


def _curve(results: Sequence[MethodResult], name: str) -> Chart | None:
    """Toxicity against a perplexity at every strength, defaults marked; None where none is finite."""
    if name not in results[0].estimates:
        return None

    def point(result: MethodResult) -> Point:
        alpha = result.method.alpha
        label = result.method.title if result is results[0] else "" if alpha is None else f"{alpha:.3g}"
        is_default = result.method.is_default and alpha is not None
        return Point(label, result.estimates[name], result.estimates["toxic_share"], is_default)

    families: dict[str, list[Point]] = {}
    for result in results[1:]:
        if name in result.estimates:
            families.setdefault(family_of(result), []).append(point(result))
    return curves(families, origin=point(results[0]), x_title=METRICS[name].title, y_title="toxic continuations")


def _colours(shown: Sequence[MethodResult], results: Sequence[MethodResult]) -> dict[str, int]:
    """Colours of bars by title: a family's as in the curve where every family is there once, else by order."""
    order = list(dict.fromkeys(map(family_of, results[1:])))
    methods = [result for result in shown if result.method.key != PLAIN.key]
    is_once = len(set(map(family_of, methods))) == len(methods)
    return {each.method.title: order.index(family_of(each)) if is_once else i for i, each in enumerate(methods)}


def _bar_charts(shown: Sequence[MethodResult], colours: Mapping[str, int]) -> dict[str, list[str]]:
    words: Rows = {}
    suites: dict[str, list[tuple[str, SuiteResult]]] = {}
    for result in shown:
        for group, kept in ({} if result.neutrality is None else result.neutrality.groups()).items():
            words.setdefault(group, {})[result.method.title] = _without_interval(kept)
        for name, suite in result.suites.items():
            suites.setdefault(name, []).append((result.method.title, suite))
    charts = {f"suite {name}": suite_charts(found, colours) for name, found in suites.items()}
    charts["words"] = [bars(words, title="probability kept", reference=1.0, is_share=True, colours=colours)]
    return {key: [chart.markup() for chart in found if chart is not None] for key, found in charts.items()}


def suite_charts(
    results: Sequence[tuple[str, SuiteResult]], colours: Mapping[str, int] | None = None
) -> list[Chart | None]:
    """What methods, by title, do to a suite: shifts of harmful and of harmless sentences, harmless ones halved."""
    shifts: dict[str, Rows] = {HARMFUL: {}, HARMLESS: {}}
    halved: Rows = {}
    for title, result in results:
        for row in result.rows:
            shifts[row.label].setdefault(row.name, {})[title] = _without_interval(row.mean_shift)
        for row in result.groups:
            halved.setdefault(row.name, {})[title] = row.halved
    return [
        bars(shifts[HARMFUL], title="harmful sentences: mean shift, nats (lower is better)", colours=colours),
        bars(shifts[HARMLESS], title="harmless sentences: mean shift, nats (nearer to 0 is better)", colours=colours),
        bars(halved, title="harmless sentences with a token halved", is_share=True, colours=colours),
    ]


def _without_interval(value: float) -> Estimate:
    return Estimate(value, math.nan, math.nan)


def _first_examples(shown: Sequence[MethodResult]) -> list[list[tuple[str, Example]]]:
    """For each of the first prompts, what every method said first, by its title."""
    firsts = [(result.method.title, {each.prompt_id: each for each in result.measured.first}) for result in shown]
    return [
        [(title, examples[prompt_id]) for title, examples in firsts if prompt_id in examples]
        for prompt_id in list(firsts[0][1])[:_EXAMPLES]
    ]
