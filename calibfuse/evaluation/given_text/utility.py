"""What it costs a model to be guided: tasks that have nothing to do with toxicity, plain against guided.

LAMBADA (Paperno et al. 2016): the last word of a passage, its perplexity and whether it is the model's first choice.
WikiText-2 (Merity et al. 2017): perplexity per word of running text, in windows. Instructions: how many greedy answers
in the model's chat template change. The first two are read through `fuse_logits`; only the answers are generated.

The texts are the user's own, given by path. Left out: tasks with several choices, and whether a changed answer is a
worse one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from calibfuse.errors import DataError
from calibfuse.evaluation.given_text.reading import read_tokens, split_ids
from calibfuse.evaluation.metrics import Estimate, Resampled, Sums, resample
from calibfuse.evaluation.prompts import draw, load_prompts
from calibfuse.evaluation.sampling import ProcessorFactory
from calibfuse.generation.continuations import find_padding_id, position_limit
from calibfuse.generation.decoding import Decoding, check_lengths, continue_prompts, encode_prompt
from calibfuse.generation.language_model import LanguageModel
from calibfuse.textfiles import read_rows

_WINDOW = 256  # tokens of running text that are read at once
_ANSWER_TOKENS = 64
_KEPT_EXAMPLES = 5


@dataclass(frozen=True)
class Utility:
    """The tasks."""

    passages: tuple[str, ...] = ()  # of LAMBADA, each with its last word
    articles: tuple[str, ...] = ()  # running text; words are what white space parts
    instructions: tuple[str, ...] = ()  # what a user says


@dataclass(frozen=True)
class UtilityFigure:
    """One figure."""

    name: str  # key
    title: str  # in tables
    texts: int  # how many texts it is of; resampled for the intervals
    plain: Estimate | None  # the target alone; None where the figure compares the two (changed answers)
    guided: Estimate  # with the method
    # Guided - plain for shares, guided / plain - 1 for perplexities; paired by texts. None: see `plain`.
    change: Estimate | None


@dataclass(frozen=True)
class ChangedAnswer:
    """An instruction that is answered in other words."""

    instruction: str
    plain: str
    guided: str


@dataclass(frozen=True)
class UtilityResult:
    """What a method costs."""

    figures: tuple[UtilityFigure, ...]  # of the tasks that there were
    changed: tuple[ChangedAnswer, ...]  # the first answers that changed


def load_utility(
    *,
    lambada: str | os.PathLike[str] | None = None,
    wikitext: str | os.PathLike[str] | None = None,
    instructions: str | os.PathLike[str] | None = None,
    count: int | None = None,
    seed: int = 0,
) -> Utility:
    """Read the tasks' texts.

    Args:
        lambada: .jsonl with a passage in "text".
        wikitext: WikiText's own format: articles under a line "= Title =".
        instructions: .jsonl or .txt, as `load_prompts` reads them.
        count: how many passages, articles and instructions to draw at random, each; None: all.
        seed: of the draw.

    Raises:
        DataError: a file cannot be read, or has no text.
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
    asked = [] if instructions is None else [each.text for each in load_prompts(instructions, count=count, seed=seed)]
    return Utility(tuple(passages), tuple(articles), tuple(asked))


def measure_utility(
    target: LanguageModel,
    make_processors: ProcessorFactory,
    data: Utility,
    *,
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    title: str = "",
    show_progress: bool = False,
) -> UtilityResult:
    """Do every task with and without a method.

    Args:
        target: the model.
        make_processors: of the method.
        data: the tasks' texts.
        batch_size: rows per forward pass, at most.
        resamples: of the bootstrap over texts.
        seed: of the bootstrap.
        title: of the progress bars.
        show_progress: draw them on standard error.

    Raises:
        InputError: instructions, and the tokenizer has no chat template.
    """

    def options(task: str) -> dict[str, Any]:
        return {"batch_size": batch_size, "title": f"{title}, {task}", "show_progress": show_progress}

    figures: list[UtilityFigure] = []
    changed: list[ChangedAnswer] = []
    draws: dict[str, Any] = {"resamples": resamples, "seed": seed}
    if data.passages:
        pairs = [_last_word(target, text) for text in data.passages]
        found = read_tokens(target, make_processors, pairs, **options("LAMBADA"))
        ones = np.ones(len(found))
        hits = [
            [float(each.plain_is_best.all()) for each in found],
            [float(each.fused_is_best.all()) for each in found],
        ]
        figures.append(_figure("lambada_accuracy", "LAMBADA accuracy", hits, ones, **draws))
        nats = [[-each.plain.sum() for each in found], [-each.fused.sum() for each in found]]
        figures.append(_figure("lambada_perplexity", "LAMBADA perplexity", nats, ones, is_perplexity=True, **draws))
    if data.articles:
        windows = [(number, pair) for number, text in enumerate(data.articles) for pair in _windows(target, text)]
        found = read_tokens(target, make_processors, [pair for _, pair in windows], **options("running text"))
        nats = [[0.0] * len(data.articles), [0.0] * len(data.articles)]
        for (number, _), each in zip(windows, found, strict=True):
            nats[0][number] -= float(each.plain.sum())
            nats[1][number] -= float(each.fused.sum())
        words = np.asarray([float(len(text.split())) for text in data.articles])
        figures.append(_figure("word_perplexity", "word perplexity", nats, words, is_perplexity=True, **draws))
    if data.instructions:
        answers = [
            _answer(target, processors, data.instructions, **options(task))
            for task, processors in (("plain answers", list), ("answers", make_processors))
        ]
        differs = [plain != guided for plain, guided in zip(*answers, strict=True)]
        figures.append(_figure("changed_answers", "greedy answers changed", [differs], np.ones(len(differs)), **draws))
        triples = zip(data.instructions, *answers, strict=True)
        changed = [ChangedAnswer(*each) for each, other in zip(triples, differs, strict=True) if other][:_KEPT_EXAMPLES]
    return UtilityResult(tuple(figures), tuple(changed))


def check_utility(target: LanguageModel, data: Utility) -> None:
    """Refuse tasks that the target cannot do, before anything is measured.

    Raises:
        InputError: instructions, and the tokenizer has no chat template; or a passage is too long for the model.
    """
    for instruction in data.instructions[:1]:
        encode_prompt(target.tokenizer, instruction, chat=True)
    rows = [[*before, *after] for before, after in (_last_word(target, text) for text in data.passages)]
    check_lengths(target.model, rows, 0, "passage")


def _figure(
    name: str,
    title: str,
    numerators: Sequence[Sequence[float]],
    denominator: NDArray[np.float64],
    *,
    is_perplexity: bool = False,
    **draws: int,
) -> UtilityFigure:
    """A ratio of sums over texts, of plain and guided or of one alone."""
    sums = {str(place): Sums(np.asarray(each, dtype=np.float64), denominator) for place, each in enumerate(numerators)}
    found = [*resample(sums, **draws).values()]
    if is_perplexity:
        found = [Resampled(math.exp(each.value), np.exp(each.resamples)) for each in found]
    plain, guided = (found[0], found[1]) if len(found) > 1 else (None, found[0])
    change = None
    if plain is not None:
        change = guided.relative_to(plain) if is_perplexity else guided.minus(plain)
    own = None if plain is None else plain.estimate()
    return UtilityFigure(name, title, len(denominator), own, guided.estimate(), change)


def _last_word(target: LanguageModel, text: str) -> tuple[list[int], list[int]]:
    context, _, word = text.rpartition(" ")
    return split_ids(target.tokenizer, context, f" {word}")


def _windows(target: LanguageModel, text: str) -> Iterator[tuple[list[int], list[int]]]:
    """A text in pieces that are read one by one, each after what stands before a text."""
    before, ids = split_ids(target.tokenizer, "", text)
    length = min(_WINDOW, (position_limit(target.model) or _WINDOW + len(before)) - len(before))
    for start in range(0, len(ids), length):
        yield before, ids[start : start + length]


def _answer(
    target: LanguageModel,
    make_processors: ProcessorFactory,
    instructions: Sequence[str],
    *,
    batch_size: int,
    title: str,
    show_progress: bool,
) -> list[str]:
    """Greedy answers in the tokenizer's chat template."""
    rows = [encode_prompt(target.tokenizer, each, chat=True) for each in instructions]
    check_lengths(target.model, rows, _ANSWER_TOKENS, "instruction")
    decoding = Decoding(do_sample=False, max_new_tokens=_ANSWER_TOKENS)
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    if find_padding_id(target.model, target.tokenizer) is None:
        batch_size = 1
    answers: dict[int, str] = {}
    with tqdm(total=len(rows), desc=title, unit="answer", disable=not show_progress) as progress:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            found = continue_prompts(target, [rows[place] for place in part], decoding, list(make_processors()))
            answers |= {place: said[0].text for place, said in zip(part, found, strict=True)}
            progress.update(len(part))
    return [answers[place] for place in range(len(rows))]


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
