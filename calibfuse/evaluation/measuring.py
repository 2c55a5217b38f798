"""From the continuations of one method to its measures: scores, likelihoods, counts, summed per prompt.

Memory holds a block of prompts and a few numbers per prompt, never all text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from calibfuse.errors import ScorerError
from calibfuse.evaluation.given_text.reading import score_ids, score_texts
from calibfuse.evaluation.journal import Journal, PromptRecord
from calibfuse.evaluation.metrics import (
    TOXIC_FROM,
    Sums,
    ThresholdSums,
    distinct_counts,
    is_refusal,
    repetition,
    threshold_sums,
    toxicity_sums,
)
from calibfuse.evaluation.prompts import Prompt
from calibfuse.generation.decoding import Decoding
from calibfuse.generation.language_model import LanguageModel
from calibfuse.scorers import ToxicityScorer, check_scores

_BLOCK = 64  # prompts in memory at once


@dataclass(frozen=True)
class Example:
    """A continuation for the report."""

    prompt_id: str  # of the prompt
    prompt: str  # its text
    continuation: str  # what was said
    toxicity: float  # its score, in [0, 1]


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of one method."""

    sums: dict[str, Sums]  # by metric (keys of METRICS), all [prompts]
    first: tuple[Example, ...]  # the first continuation of each of the first prompts, as examples
    worst: tuple[Example, ...]  # the most toxic continuations
    thresholds: tuple[ThresholdSums, ...]  # toxicity by every scorer, from several scores on


def measure(
    journal: Journal,
    prompts: Sequence[Prompt],
    scorer: ToxicityScorer,
    *,
    other_scorers: Sequence[ToxicityScorer] = (),
    target: LanguageModel | None = None,
    judge: LanguageModel | None = None,
    sampling: Decoding | None = None,
    toxic_from: float = TOXIC_FROM,
    batch_size: int = 32,
    example_count: int = 20,
    title: str = "scores",
    show_progress: bool = False,
) -> Measured:
    """Measure the continuations of one method.

    Args:
        journal: with a record of every prompt.
        prompts: which, in the order of the results.
        scorer: scores each continuation alone, without its prompt.
        other_scorers: second opinions, with other names.
        target: the model that the continuations come from, for their perplexity under it without any processor.
        judge: a separate language model.
        sampling: how the continuations were decoded: with or without a chat template; default Decoding().
        toxic_from: a continuation is toxic from this score on.
        batch_size: rows per forward pass.
        example_count: how many examples of each kind to keep.
        title: of the progress bar.
        show_progress: draw one on standard error.

    Raises:
        ScorerError: a text could not be scored.
        InputError: a text is longer than a model's positions.
    """
    blocks: list[dict[str, NDArray[np.float64]]] = []
    rated: dict[str, list[NDArray[np.float64]]] = {}  # scorer -> [prompts of a block, samples]
    first: list[Example] = []
    worst: list[Example] = []
    records = journal.records([prompt.id for prompt in prompts])
    with tqdm(total=len(prompts), desc=title, unit="prompt", disable=not show_progress) as progress:
        while block := list(islice(records, _BLOCK)):
            texts = [said.text for record in block for said in record.continuations]
            for each in (scorer, *other_scorers):
                rated.setdefault(each.name, []).append(_score(each, texts).reshape(len(block), -1))
            scores = rated[scorer.name][-1]
            columns = _columns(block)
            for name, sums in toxicity_sums(scores, toxic_from=toxic_from).items():
                columns[f"{name}/"], columns[f"/{name}"] = sums.numerator, sums.denominator
            if target is not None:
                _add_target_likelihood(columns, target, block, sampling or Decoding(), batch_size)
            if judge is not None:
                _add_judge_likelihood(columns, judge, block, batch_size)
            blocks.append(columns)
            for record, row in zip(block, scores, strict=True):
                for kept, place in ((first, 0), (worst, int(row.argmax()))):
                    text = record.continuations[place].text
                    kept.append(Example(record.prompt_id, record.prompt, text, float(row[place])))
            del first[example_count:]
            worst = sorted(worst, key=lambda each: -each.toxicity)[:example_count]
            progress.update(len(block))
    joined = {name: np.concatenate([columns[name] for columns in blocks]) for name in blocks[0]}
    sums_by_name = {name[:-1]: Sums(joined[name], joined[f"/{name[:-1]}"]) for name in joined if name.endswith("/")}
    thresholds = [each for name, parts in rated.items() for each in threshold_sums(name, np.concatenate(parts))]
    return Measured(sums_by_name, tuple(first), tuple(worst), tuple(thresholds))


def select(sums: Mapping[str, Sums], places: Sequence[int]) -> dict[str, Sums]:
    """The sums of some of the prompts."""
    chosen = np.asarray(places, dtype=np.int64)
    return {name: Sums(each.numerator[chosen], each.denominator[chosen]) for name, each in sums.items()}


def _score(scorer: ToxicityScorer, texts: list[str]) -> NDArray[np.float64]:
    try:
        values = scorer.score(texts)
    except ScorerError:
        raise
    except Exception as error:  # a user's scorer may raise any error; a failed score must never pass for a number
        raise ScorerError(f"Scorer {scorer.name!r} failed with {type(error).__name__}: {error}") from error
    return check_scores(values, len(texts), scorer.name)


def _columns(block: Sequence[PromptRecord]) -> dict[str, NDArray[np.float64]]:
    """Numerators ("name/") and denominators ("/name") of what is counted in the text, [prompts] each."""
    columns: dict[str, NDArray[np.float64]] = {}
    samples = np.asarray([float(len(record.continuations)) for record in block])

    def add(name: str, numerator: Sequence[float], denominator: NDArray[np.float64]) -> None:
        columns[f"{name}/"], columns[f"/{name}"] = np.asarray(numerator, dtype=np.float64), denominator

    texts = [[said.text for said in record.continuations] for record in block]
    tokens = [float(sum(len(said.token_ids) for said in record.continuations)) for record in block]
    distinct = [distinct_counts(each) for each in texts]
    for n in (1, 2, 3):
        add(f"distinct_{n}", [each[n - 1] for each in distinct], np.ones(len(block)))
    add("repetition", [sum(map(repetition, each)) for each in texts], samples)
    add("length", tokens, samples)
    add("words", [float(sum(len(text.split()) for text in each)) for each in texts], samples)
    add("finished_share", [float(sum(said.is_finished for said in record.continuations)) for record in block], samples)
    add("empty_share", [float(sum(not text.strip() for text in each)) for each in texts], samples)
    add("refusal_share", [float(sum(map(is_refusal, each))) for each in texts], samples)
    return columns


def _add_target_likelihood(
    columns: dict[str, NDArray[np.float64]],
    target: LanguageModel,
    block: Sequence[PromptRecord],
    sampling: Decoding,
    batch_size: int,
) -> None:
    """Perplexity under the target itself, without any processor, of the very tokens that it said."""
    ids = [sampling.encode(target.tokenizer, record.prompt) for record in block]
    before = [row for row, record in zip(ids, block, strict=True) for _ in record.continuations]
    said = [said.token_ids for record in block for said in record.continuations]
    found = score_ids(target.model, before, said, batch_size=batch_size)
    columns["target_perplexity/"] = found.nats.reshape(len(block), -1).sum(axis=1)
    columns["/target_perplexity"] = found.tokens.reshape(len(block), -1).sum(axis=1)


def _add_judge_likelihood(
    columns: dict[str, NDArray[np.float64]], judge: LanguageModel, block: Sequence[PromptRecord], batch_size: int
) -> None:
    """Perplexity in the judge's tokens, and bits per byte of text, which judges of any tokenizer share."""
    prompts = [record.prompt for record in block for _ in record.continuations]
    texts = [said.text for record in block for said in record.continuations]
    found = score_texts(judge, prompts, texts, batch_size=batch_size)
    lengths = np.asarray([float(len(text.encode("utf-8", "replace"))) if text.strip() else 0.0 for text in texts])
    nats = found.nats.reshape(len(block), -1).sum(axis=1)
    columns["perplexity/"], columns["bits_per_byte/"] = nats, nats / math.log(2)
    columns["/perplexity"] = found.tokens.reshape(len(block), -1).sum(axis=1)
    columns["/bits_per_byte"] = lengths.reshape(len(block), -1).sum(axis=1)
