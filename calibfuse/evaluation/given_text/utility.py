"""What it costs a model to be guided: tasks that have nothing to do with toxicity, plain against guided.

LAMBADA (Paperno et al. 2016): the last word of a passage, its perplexity and whether it is the model's first choice.
WikiText-2 (Merity et al. 2017): perplexity per word of running text, in windows. The texts are the user's own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibfuse.errors import DataError
from calibfuse.evaluation.bootstrap import Estimate, Sums, resample
from calibfuse.evaluation.given_text.reading import GuidedReader, split_ids
from calibfuse.evaluation.prompts import draw
from calibfuse.generation.decoding import position_limit
from calibfuse.generation.language_model import LanguageModel
from calibfuse.textfiles import read_rows

_WINDOW = 256  # tokens of running text that are read at once


@dataclass(frozen=True)
class Utility:
    """The tasks."""

    passages: tuple[str, ...] = ()  # of LAMBADA, each with its last word
    articles: tuple[str, ...] = ()  # running text; words are what white space parts


@dataclass(frozen=True)
class UtilityFigure:
    """One figure."""

    name: str  # key
    title: str  # in tables
    texts: int  # how many texts it is of; resampled for the intervals
    plain: Estimate  # the target alone
    guided: Estimate  # with the method
    change: Estimate  # guided - plain for shares, guided / plain - 1 for perplexities; paired by texts


@dataclass(frozen=True)
class UtilityResult:
    """What a method costs."""

    figures: tuple[UtilityFigure, ...]  # of the tasks that there were


def load_utility(
    *,
    lambada: str | os.PathLike[str] | None = None,
    wikitext: str | os.PathLike[str] | None = None,
    count: int | None = None,
    seed: int = 0,
) -> Utility:
    """Read at most `count` texts of each task, drawn at random; DataError where a file cannot be read, or has no text.

    LAMBADA is .jsonl with a passage in "text", WikiText its own format: articles under a line "= Title =".
    """
    passages: list[str] = []
    if lambada is not None:
        rows = (str(row.get("text", "")).strip() for _, row in read_rows(lambada))
        passages = draw((text for text in rows if " " in text), count, np.random.default_rng([seed, 19]))
        if not passages:
            raise DataError(f'Expected passages of several words in the field "text" of {str(lambada)!r}, found none.')
    articles: list[str] = []
    if wikitext is not None:
        articles = draw(_articles(Path(wikitext).expanduser()), count, np.random.default_rng([seed, 23]))
        if not articles:
            raise DataError(f"Expected running text in {str(wikitext)!r}, found none.")
    return Utility(tuple(passages), tuple(articles))


def measure_utility(reader: GuidedReader, data: Utility, *, resamples: int = 1000, seed: int = 0) -> UtilityResult:
    """Do every task with and without a method; the bootstrap is over texts."""
    target = reader.target
    figures: list[UtilityFigure] = []
    draws: dict[str, Any] = {"resamples": resamples, "seed": seed}
    if data.passages:
        found = reader.read([_last_word(target, text) for text in data.passages], "LAMBADA")
        ones = np.ones(len(found))
        hits = [[all(each.plain_is_best) for each in found], [all(each.fused_is_best) for each in found]]
        figures.append(_figure("lambada_accuracy", "LAMBADA accuracy", hits, ones, **draws))
        nats = [[-each.plain.sum() for each in found], [-each.fused.sum() for each in found]]
        figures.append(_figure("lambada_perplexity", "LAMBADA perplexity", nats, ones, is_perplexity=True, **draws))
    if data.articles:
        windows = [(number, pair) for number, text in enumerate(data.articles) for pair in _windows(target, text)]
        nats = [[0.0] * len(data.articles), [0.0] * len(data.articles)]
        for (number, _), each in zip(windows, reader.read([pair for _, pair in windows], "running text"), strict=True):
            nats[0][number] -= float(each.plain.sum())
            nats[1][number] -= float(each.fused.sum())
        words = np.asarray([float(len(text.split())) for text in data.articles])
        figures.append(_figure("word_perplexity", "word perplexity", nats, words, is_perplexity=True, **draws))
    return UtilityResult(tuple(figures))


def _figure(
    name: str,
    title: str,
    numerators: Sequence[Sequence[float]],
    denominator: NDArray[np.float64],
    *,
    is_perplexity: bool = False,
    **draws: int,
) -> UtilityFigure:
    arrays = [np.asarray(each, dtype=np.float64) for each in numerators]
    sums = {str(place): Sums(each, denominator, is_perplexity) for place, each in enumerate(arrays)}
    plain, guided = resample(sums, **draws).values()
    change = guided.relative_to(plain) if is_perplexity else guided.minus(plain)
    return UtilityFigure(name, title, len(denominator), plain.estimate(), guided.estimate(), change)


def _last_word(target: LanguageModel, text: str) -> tuple[list[int], list[int]]:
    context, _, word = text.rpartition(" ")
    return split_ids(target.tokenizer, context, f" {word}")


def _windows(target: LanguageModel, text: str) -> Iterator[tuple[list[int], list[int]]]:
    """A text in pieces that are read one by one, each after what stands before a text."""
    before, ids = split_ids(target.tokenizer, "", text)
    length = min(_WINDOW, (position_limit(target.model) or _WINDOW + len(before)) - len(before))
    for start in range(0, len(ids), length):
        yield before, ids[start : start + length]


def _articles(path: Path) -> Iterator[str]:
    """The articles of WikiText's format, which begin with a line "= Title ="; text without such lines is one."""
    lines: list[str] = []
    for _, row in read_rows(path, lines_are_rows=True):
        line = row["text"].strip()
        if re.fullmatch(r"= [^=].*[^=] =", line) and lines:
            yield "\n".join(lines)
            lines = []
        lines.append(line)
    if lines:
        yield "\n".join(lines)
