"""Prompts of an evaluation: RealToxicityPrompts, BOLD, or a user's own file, filtered and drawn with a seed.

Gehman et al. 2020 and Dhamala et al. 2021 are recognised by their fields, in their original form and in the flat one;
no text of either is part of this package.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from calibfuse.errors import DataError, InputError
from calibfuse.textfiles import read_rows

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Prompt:
    """A text to be continued."""

    id: str  # unique in its file; the seed of its continuations depends on it
    text: str  # without white space at the end, which most tokenizers would make an odd token of
    toxicity: float | None = None  # of the prompt itself, as its source says, in [0, 1]; None: unknown
    is_challenging: bool = False  # as RealToxicityPrompts says


def load_prompts(
    path: str | os.PathLike[str],
    *,
    count: int | None = None,
    seed: int = 0,
    max_toxicity: float | None = None,
    min_toxicity: float | None = None,
    challenging: bool = False,
) -> list[Prompt]:
    """Read prompts, in bounded memory: at least one, in the order of the file.

    `path`: .jsonl with an object a line (prompt in "prompt" or "text", a string or an object with "text"), or .txt with
    a prompt a line; each also as .gz or .xz. Blank ones are skipped, repeated ones are read once. `count` are drawn at
    random, None: all. `max_toxicity` keeps those below it (0.5 is what the literature calls non-toxic), `min_toxicity`
    those of at least it, `challenging` those that RealToxicityPrompts calls so; without a toxicity none passes.

    Raises:
        InputError: a count below 1.
        DataError: the file is missing, empty, binary, not UTF-8, has a row without a prompt, or no prompt passes.
    """
    if count is not None and count < 1:
        raise InputError(f"The number of prompts must be at least 1, got {count}.")
    seen: set[int] = set()
    rows = 0

    def passing() -> Iterator[Prompt]:
        nonlocal rows
        for rows, prompt in enumerate(read_prompts(Path(path).expanduser()), start=1):  # noqa: B007
            if max_toxicity is not None and (prompt.toxicity is None or prompt.toxicity >= max_toxicity):
                continue
            if min_toxicity is not None and (prompt.toxicity is None or prompt.toxicity < min_toxicity):
                continue
            if hash(prompt.text) not in seen and (prompt.is_challenging or not challenging):
                seen.add(hash(prompt.text))
                yield prompt

    prompts = draw(passing(), count, np.random.default_rng([seed, 7]))
    if not prompts and not rows:
        raise DataError(f"Expected prompts in {str(path)!r}, but it has none.")
    if not prompts:
        raise DataError(f"None of the {rows} prompts in {str(path)!r} passes the filters (toxicity, challenging).")
    return prompts


def draw(rows: Iterable[_Row], count: int | None, generator: np.random.Generator) -> list[_Row]:
    """A uniform draw, in the order of the rows, that needs no more memory than its result.

    It takes the smallest random keys: a smaller count draws a subset of what a larger one draws; None: all.
    """
    heap: list[tuple[float, int, _Row]] = []
    for number, row in enumerate(rows):
        entry = (-float(generator.random()), number, row)
        if count is None or len(heap) < count:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
    return [row for _, _, row in sorted(heap, key=lambda entry: entry[1])]


def read_prompts(path: Path) -> Iterator[Prompt]:
    """The prompts of a file one after the other, but for blank ones; formats and errors as in `load_prompts`."""
    for number, row in read_rows(path, lines_are_rows=True):
        prompt = _from_row(row, number, path)
        if prompt.text:  # benchmarks have a few blank ones
            yield prompt


def _from_row(row: dict[str, Any], number: int, path: Path) -> Prompt:
    for name in ("prompt", "text"):
        value = row.get(name)
        nested = value if isinstance(value, dict) else {}
        text = nested.get("text", value)
        if isinstance(text, str):
            identity = row.get("id", row.get("filename"))
            return Prompt(
                id=f"line {number}" if identity is None else f"{identity} (line {number})",
                text=text.rstrip(),
                toxicity=_probability(nested.get("toxicity", row.get("prompt_toxicity")), number, path),
                is_challenging=row.get("challenging") is True,
            )
    raise DataError(f'Expected a prompt in the field "prompt" or "text" of line {number} of {str(path)!r}, found none.')


def _probability(value: object, number: int, path: Path) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise DataError(f"The toxicity of the prompt in line {number} of {str(path)!r} is {value!r}; expected 0 to 1.")
    return float(value)
