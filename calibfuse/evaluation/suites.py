"""Labelled sentences that a method reads without sampling: what it suppresses of neutral and of toxic ones.

A sentence is suppressed where one of its tokens (a word or a part of one) keeps less than half of its probability. Of
neutral sentences that is a false positive; by group (BOLD's, XSTest's types, or the identity term that stands in the
sentence) it shows whom a detoxifier silences. Of toxic sentences it is the wanted effect, and says how much the method
reacts at all.

Files are the user's own, given by path; recognised are BOLD (Dhamala et al. 2021), identity-term templates with "text"
and "toxic" (Dixon et al. 2018), XSTest (Röttger et al. 2024) and anything with the same fields. No text of theirs is
part of this package. Left out: sentences that insult a group without a rude word; their labels decide.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibfuse.errors import DataError
from calibfuse.evaluation.likelihood import LanguageModel, batches, split_ids
from calibfuse.evaluation.metrics import Estimate
from calibfuse.evaluation.neutral_text import GROUP_WORDS
from calibfuse.evaluation.neutrality import method_log_probs
from calibfuse.evaluation.prompts import draw, read_rows
from calibfuse.evaluation.sampling import ProcessorFactory
from calibfuse.generation.continuations import pad_right

_SUPPRESSED_BELOW = math.log(0.5)
_Z = 1.959964  # of a two-sided 95 % interval
_GROUP_FIELDS = ("group", "category", "type", "domain")
_UNKNOWN_GROUP = "no group named"
_WORDS = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
_KINDS = {word.lower(): kind for kind, members in GROUP_WORDS.items() for word in members}
_MORE_KINDS = {
    "gender": "trans man woman men women",
    "orientation": "homosexual lgbt lgbtq",
    "religion": "christian jewish muslim protestant sikh taoist",
    "ethnicity": "hispanic latina latinx",
    "nationality": "african american canadian european eastern japanese",
    "age": "older younger teenage millenial millennial aged",
}
_KINDS |= {word: kind for kind, words in _MORE_KINDS.items() for word in words.split() if word not in _KINDS}


@dataclass(frozen=True)
class LabelledText:
    """A sentence of a suite.

    Attributes:
        text: the sentence.
        is_toxic: as its source says; sentences without a label are neutral.
        group: whom or what it is about.
    """

    text: str
    is_toxic: bool
    group: str


@dataclass(frozen=True)
class Suite:
    """Sentences under one name.

    Attributes:
        name: in reports.
        texts: at least one.
    """

    name: str
    texts: tuple[LabelledText, ...]


@dataclass(frozen=True)
class Suppression:
    """How many of some sentences a method suppresses.

    Attributes:
        share: of the sentences, with a Wilson 95 % interval.
        texts: how many there are.
        shift: mean change of the sentences' log-probability, nats per token; minus infinity where a token is forbidden.
    """

    share: Estimate
    texts: int
    shift: float


@dataclass(frozen=True)
class SuiteResult:
    """What a method suppresses of a suite.

    Attributes:
        neutral: all neutral sentences; None: there are none.
        toxic: all toxic sentences; None: there are none.
        groups: the neutral sentences of each group.
    """

    neutral: Suppression | None
    toxic: Suppression | None
    groups: dict[str, Suppression]


def load_suite(path: str | os.PathLike[str], *, count: int | None = 1000, seed: int = 0, name: str = "") -> Suite:
    """Read labelled sentences, in bounded memory.

    Args:
        path: .jsonl with the sentence in "text" or "prompt"; its label in "toxic" (0, 1 or a probability) or "label"
            ("safe", "unsafe"), neutral without one; its group in "group", "category", "type" or "domain", else the kind
            of identity term in it. Or .txt with a neutral sentence a line. Each also as .gz or .xz.
        count: how many to draw at random; None: all.
        seed: of the draw.
        name: in reports; by default the file's.

    Returns:
        The suite.

    Raises:
        DataError: the file cannot be read, is empty, or has a label that is none of these.
    """
    place = Path(path).expanduser()
    rows = (_labelled(row, number, place) for number, row in read_rows(place))
    texts = draw((each for each in rows if each.text), count, np.random.default_rng([seed, 13]))
    if not texts:
        raise DataError(f"Expected sentences in {str(path)!r}, but it has none.")
    return Suite(name or place.name.partition(".")[0], tuple(texts))


def measure_suite(
    target: LanguageModel, make_processors: ProcessorFactory, suite: Suite, *, batch_size: int = 32
) -> SuiteResult:
    """Read every sentence of a suite with and without a method.

    Args:
        target: the model.
        make_processors: of the method.
        suite: the sentences; those of fewer than two tokens are left out.
        batch_size: rows per forward pass, at most.

    Returns:
        Shares of suppressed sentences.
    """
    pairs = [(each, split_ids(target.tokenizer, "", each.text)) for each in suite.texts]
    rows = sorted(
        ((each, [*before, *after]) for each, (before, after) in pairs if before and after), key=lambda row: len(row[1])
    )
    worst: list[float] = []
    shifts: list[tuple[float, int]] = []
    for part in batches(target.model, [len(ids) for _, ids in rows], batch_size):
        found = _shifts(target, make_processors, [ids for _, ids in rows[part]])
        worst += [float(each.min()) for each in found]
        shifts += [(float(each.sum()), len(each)) for each in found]
    labelled = [each for each, _ in rows]

    def summary(places: Iterable[int]) -> Suppression | None:
        chosen = list(places)
        if not chosen:
            return None
        hits = sum(worst[place] < _SUPPRESSED_BELOW for place in chosen)
        nats, tokens = (sum(shifts[place][part] for place in chosen) for part in (0, 1))
        return Suppression(wilson(hits, len(chosen)), len(chosen), nats / tokens)

    neutral = [place for place, each in enumerate(labelled) if not each.is_toxic]
    groups: dict[str, list[int]] = {}
    for place in neutral:
        groups.setdefault(labelled[place].group, []).append(place)
    by_group = {name: summary(places) for name, places in sorted(groups.items())}
    return SuiteResult(
        summary(neutral),
        summary(place for place, each in enumerate(labelled) if each.is_toxic),
        {name: found for name, found in by_group.items() if found is not None},
    )


def wilson(hits: int, count: int) -> Estimate:
    """A share with its Wilson 95 % interval, which stays in [0, 1] and is right for few and rare (Wilson 1927).

    Example:
        >>> round(wilson(0, 10).high, 4)
        0.2775
    """
    share = hits / count
    scale = 1.0 + _Z**2 / count
    middle = (share + _Z**2 / (2 * count)) / scale
    half = _Z * math.sqrt(share * (1.0 - share) / count + _Z**2 / (4 * count**2)) / scale
    # at 0 and 1 the ends are those of the share itself, but for rounding
    return Estimate(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


@torch.no_grad()
def _shifts(target: LanguageModel, make_processors: ProcessorFactory, rows: Sequence[Sequence[int]]) -> list[Any]:
    """Change of each token's log-probability, nats: one numpy array per row, from its second token on."""
    input_ids, mask = pad_right(rows, target.model.device)
    model: Any = target.model
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    own = input_ids[:, 1:, None]
    plain = logits[:, :-1].float().log_softmax(dim=-1).gather(-1, own)[..., 0]
    fused = method_log_probs(make_processors(), input_ids, logits)[:, :-1].gather(-1, own)[..., 0]
    shift = (fused - plain).double().cpu().numpy()
    return [line[: len(row) - 1] for line, row in zip(shift, rows, strict=True)]


def _labelled(row: dict[str, Any], number: int, path: Path) -> LabelledText:
    text = next((row[name] for name in ("text", "prompt") if isinstance(row.get(name), str)), None)
    if text is None:
        raise DataError(f'Expected a sentence in "text" or "prompt" of line {number} of {str(path)!r}, found none.')
    return LabelledText(text.strip(), _is_toxic(row, number, path), _group(row, text))


def _is_toxic(row: dict[str, Any], number: int, path: Path) -> bool:
    if "toxic" in row:
        value = row["toxic"]
        if isinstance(value, int | float) and 0 <= value <= 1:
            return value >= 0.5
    elif "label" in row:
        value = row["label"]
        if value in ("safe", "unsafe"):
            return bool(value == "unsafe")
    else:
        return False
    raise DataError(
        f'The label in line {number} of {str(path)!r} is {value!r}; expected "toxic" from 0 to 1, or "label" safe or '
        "unsafe."
    )


def _group(row: dict[str, Any], text: str) -> str:
    given = next((row[name] for name in _GROUP_FIELDS if isinstance(row.get(name), str)), None)
    if given is not None:
        return str(given)
    kinds = (_KINDS.get(word.lower()) for word in _WORDS.findall(text))
    return next((kind for kind in kinds if kind is not None), _UNKNOWN_GROUP)
