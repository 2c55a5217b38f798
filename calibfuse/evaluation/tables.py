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
from calibfuse.evaluation.metrics import METRICS, Estimate
from calibfuse.evaluation.neutrality import Neutrality
from calibfuse.evaluation.running import Evaluation, MethodResult

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


def to_data(evaluation: Evaluation, *, with_examples: bool = True) -> dict[str, Any]:
    """Everything as JSON values; numbers that JSON lacks (infinite, none) become null.

    Args:
        evaluation: the results.
        with_examples: also continuations, as they are.

    Returns:
        A dictionary that `json.dumps(..., allow_nan=False)` accepts.
    """
    data = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "facts": evaluation.facts,
        "versions": versions(),
        "methods": [_method_data(result, with_examples) for result in evaluation.results],
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
        "metrics": {name: asdict(each) for name, each in result.estimates.items()},
        "change_against_plain": {name: asdict(each) for name, each in result.changes.items()},
        "difference_to_plain": {name: asdict(each) for name, each in result.differences.items()},
        "groups": {
            group: {name: asdict(each) for name, each in figures.items()} for group, figures in result.groups.items()
        },
        "speed": None if result.speed is None else asdict(result.speed),
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


def to_markdown(evaluation: Evaluation) -> str:
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
    parts += [*_neutral_part(results), *_speed_part(results)]
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
    return "none" if value is None else str(value)
