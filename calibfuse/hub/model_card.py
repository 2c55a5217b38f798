"""The model card of a calibrator on the Hub, from the metadata of its training.

Plain string formatting, not jinja2: that comes with the extra `eval`, and a card is written by every installation.
Every entry is optional, and a card never states what it was not told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PLACEHOLDER = "your-name/your-calibrator"
"""Stands for the repository in a card that was written before one was known."""

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")

_TEMPLATE = Path(__file__).with_suffix(".md")


def calibrator_card(known: Mapping[str, Any]) -> str:
    """Write the model card of a calibrator.

    Args:
        known: what is known of it; unknown keys are listed under "Settings". Known ones are:
            "name": what it is called, and "repo_id": where it is published;
            "license": identifier of the licence, e.g. "apache-2.0"; "language": code or list of codes;
            "data": text, a list of texts, or a mapping from a set's name to what is known of it;
            "datasets": ids of data sets on the Hub;
            "base": the calibrator or model that the training began with: name, license, data and what was "inherited",
                and "base_model", its id on the Hub;
            "settings": mapping of training settings; "fusion": recommended fusion options;
            "bits_per_byte": mapping from a tokenizer style to bits per byte of held-out text, or to a mapping from
                head to bits per byte; "figures": mapping of other measurements to numbers;
            "limits": further limits, text or list of texts.

    Returns:
        Markdown with YAML metadata, ending with a newline. The numbers among the figures are metadata as well
        (`model-index`), which the Hub shows and searches.
    """
    rest = dict(known)
    name = str(rest.pop("name", None) or "calibrator")
    repo_id = str(rest.pop("repo_id", None) or PLACEHOLDER)
    data, base, limits, fusion = (rest.pop(key, None) for key in ("data", "base", "limits", "fusion"))
    bits_per_byte, figures = rest.pop("bits_per_byte", None) or {}, rest.pop("figures", None) or {}
    entries = {
        "license": str(rest.pop("license", None) or "").lower(),
        "language": rest.pop("language", "en"),
        "library_name": "calibfuse",
        "pipeline_tag": "text-generation",
        "tags": ["calibfuse", "detoxification", "controlled-decoding", "text-generation"],
        "datasets": rest.pop("datasets", None),
        "base_model": _base_model(rest.pop("base_model", None), base),
        "model-index": _results(name, bits_per_byte, figures),
    }
    sections = (
        ("Training data", _list(data)),
        ("Based on", _list(base)),
        ("Settings", _list({**(rest.pop("settings", None) or {}), **rest})),
        ("Recommended fusion", _list(fusion)),
        ("Figures", "\n".join(filter(None, (_table(bits_per_byte), _list(figures))))),
    )
    # Values are written as JSON, which is YAML, so that no entry can break it.
    front = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in entries.items() if value)
    filled = "".join(f"## {title}\n\n{text}\n" for title, text in sections if text)
    template = _TEMPLATE.read_text(encoding="utf-8")
    return template.format(front=front, name=name, repo_id=repo_id, sections=filled, limits=_list(limits))


def with_metadata(card: str, generated: str) -> str:
    """A card of the user's own, below the metadata of the generated one where it has none, so that the Hub finds it."""
    if re.match(r"\s*---\r?\n", card):
        return card
    return generated[: generated.index("\n---\n") + 5] + "\n" + card


def _base_model(named: object, base: object) -> object:
    """Id on the Hub of what the training began with; None where it has none there (the bundled calibrator)."""
    told = base if isinstance(base, Mapping) else {}
    candidates = [named, *(told.get(key) for key in ("base_model", "repo_id", "name"))]
    return next((each for each in candidates if isinstance(each, str) and _REPO_ID.fullmatch(each)), None)


def _results(name: str, bits_per_byte: Mapping[str, Any], figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    metrics: list[dict[str, Any]] = []
    for style, row in bits_per_byte.items():
        for head, value in row.items() if isinstance(row, Mapping) else [(None, row)]:
            label = f"Bits per byte ({style})" if head is None else f"Bits per byte ({style}, {_words(head)} head)"
            metrics.append({"type": "bits_per_byte", "name": label, "value": value})
    for key, value in figures.items():
        metrics.append({"type": re.sub(r"\W+", "_", str(key)).strip("_").lower(), "name": str(key), "value": value})
    numbers = [each for each in metrics if type(each["value"]) in (int, float)]
    if not numbers:
        return []
    task = {"type": "text-generation", "name": "Text generation"}
    dataset = {"type": "held-out-text", "name": "Held-out text, see the card"}
    return [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": numbers}]}]


def _list(value: object) -> str:
    if not value:
        return ""
    if isinstance(value, Mapping):
        entries = [f"{_words(key)}: {_value(entry)}" for key, entry in value.items()]
    else:
        entries = list(map(_value, [value] if isinstance(value, str) or not isinstance(value, Sequence) else value))
    return "".join(f"- {entry}\n" for entry in entries)


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def _value(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{_words(key)} {_value(entry)}" for key, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_value(entry) for entry in value)
    return re.sub(r"\s+", " ", str(value)).strip()


def _table(bits_per_byte: Mapping[str, Any]) -> str:
    if not bits_per_byte:
        return ""
    heads = list(dict.fromkeys(head for row in bits_per_byte.values() if isinstance(row, Mapping) for head in row))
    columns = [f"{_words(head)} head" for head in heads] or ["bits per byte"]
    lines = [
        "Bits per byte of held-out text (lower is better; comparable across tokenizers):\n",
        f"| tokenizer style | {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for style, row in bits_per_byte.items():
        values = [row.get(head) for head in heads] if isinstance(row, Mapping) else [row]
        lines.append(f"| {style} | {' | '.join('-' if value is None else f'{value:.3f}' for value in values)} |")
    return "\n".join(lines) + "\n"
