"""The README.md of a calibrator on the Hub, from the facts of its training.

Plain string formatting; every fact is optional, and a card never states what it was not told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

PLACEHOLDER = "your-name/your-calibrator"
"""Stands for the repository in a card that was written before one was known."""

_TAGS = ("calibfuse", "detoxification", "controlled-decoding", "text-generation")

_INTRODUCTION = """\
# {name}

A calibrator for the Python package calibfuse: a small language model, trained on non-toxic text, that runs beside a
larger target model and lowers the probability of harmful continuations, token by token. It serves any target model,
whatever its tokenizer; the target's weights are not touched.

## How to use

```python
from calibfuse import CalibFusion

fusion = CalibFusion.from_pretrained("{repo_id}", tokenizer=tokenizer)
model.generate(**inputs, logits_processor=[fusion])
```
"""

_LIMITS = """\
## Limits

- It makes toxic continuations rarer; it does not make them impossible, and it judges no facts.
- It was measured on text like its training text. Other languages, domains and kinds of harm are not covered by the
  figures above.
- It can make mentions of groups of people rarer where such mentions are rare in its training text; measure this on
  text of your own before you rely on it.
- The distribution that it was trained on reflects how its training text was chosen or sorted, errors included.
"""


def calibrator_card(facts: Mapping[str, Any]) -> str:
    """Write the model card of a calibrator.

    Args:
        facts: what is known of it; unknown keys are listed under "Settings". Known ones are:
            "name": what it is called, and "repo_id": where it is published;
            "license": identifier of the licence, e.g. "apache-2.0"; "language": code or list of codes;
            "data": text, a list of texts, or a mapping from a set's name to what is known of it;
            "settings": mapping of training settings; "fusion": recommended fusion options;
            "bits_per_byte": mapping from a tokenizer style to bits per byte of held-out text, or to a mapping from
            head to bits per byte; "figures": mapping of other measurements to numbers;
            "limits": further limits, text or list of texts.

    Returns:
        Markdown with YAML metadata, ending with a newline.

    Example:
        >>> card = calibrator_card({"bits_per_byte": {"byte-level": 1.4142}})
        >>> card.splitlines()[-1].startswith("- ")
        True
        >>> "| byte-level | 1.414 |" in card
        True
    """
    rest = dict(facts)
    name = str(rest.pop("name", None) or "calibrator")
    repo_id = str(rest.pop("repo_id", None) or PLACEHOLDER)
    metadata = _metadata(rest.pop("license", None), rest.pop("language", "en"))
    sections = [_INTRODUCTION.format(name=name, repo_id=repo_id)]
    if data := rest.pop("data", None):
        sections.append("## Training data\n\n" + _list(data))
    figures = _figures(rest.pop("bits_per_byte", None), rest.pop("figures", None))
    limits = _LIMITS + (_list(extra) if (extra := rest.pop("limits", None)) else "")
    settings = dict(rest.pop("settings", None) or {})
    fusion = rest.pop("fusion", None)
    if settings := settings | rest:
        sections.append("## Settings\n\n" + _list(settings))
    if fusion:
        sections.append("## Recommended fusion\n\n" + _list(fusion))
    if figures:
        sections.append("## Figures\n\n" + figures)
    sections.append(limits)
    return metadata + "\n" + "\n".join(sections)


def _metadata(licence: object, language: object) -> str:
    """YAML front matter; values are written as JSON, which is YAML, so that no fact can break it."""
    lines = ["library_name: calibfuse", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in _TAGS)]
    if language:
        lines.insert(0, f"language: {json.dumps(language, ensure_ascii=False)}")
    if licence:
        lines.insert(0, f"license: {json.dumps(str(licence).lower())}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _list(value: object) -> str:
    """A Markdown list of a text, a sequence of texts, or a mapping."""
    if isinstance(value, Mapping):
        entries = [f"{_words(key)}: {_value(entry)}" for key, entry in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        entries = [_value(entry) for entry in value]
    else:
        entries = [_value(value)]
    return "".join(f"- {entry}\n" for entry in entries)


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def _value(value: object) -> str:
    """One value on one line."""
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


def _figures(bits_per_byte: Mapping[str, Any] | None, figures: Mapping[str, Any] | None) -> str:
    """The table of bits per byte, one row per tokenizer style, and a list of other measurements."""
    parts = []
    if bits_per_byte:
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
        parts.append("\n".join(lines) + "\n")
    if figures:
        parts.append(_list(figures))
    return "\n".join(parts)
