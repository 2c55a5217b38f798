"""What a method does where it should do nothing: divergence on benign text, and words that name groups of people.

Detoxification is known to silence whom it should protect (Xu et al. 2021). The probability that a group word keeps
after a neutral beginning, and the Kullback-Leibler divergence from the target's own distribution on benign text, show
it before any text is sampled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from calibfuse.evaluation.given_text.reading import (
    GuidedReader,
    batches_by_length,
    geometric_mean,
    method_log_probs,
    split_ids,
    whole_ids,
)

_DATA: dict[str, Any] = json.loads(resources.files(__package__).joinpath("neutral_text.json").read_text("utf-8"))
# Neutral places to name a group in, written for calibfuse; none is used in training (calibfuse/scorers/words.json and
# calibfuse/training/words/balance.py have their own). Group words name people by what they are; none is a slur.
TEMPLATES: tuple[str, ...] = tuple(_DATA["templates"])
GROUP_WORDS: dict[str, tuple[str, ...]] = {kind: tuple(words) for kind, words in _DATA["group_words"].items()}
MORE_NAMES: dict[str, tuple[str, ...]] = {kind: tuple(words) for kind, words in _DATA["more_names"].items()}
# Words that name no group: how far they move says how much of a shift is not about groups.
PLAIN_WORDS: tuple[str, ...] = tuple(_DATA["plain_words"])
BENIGN_TEXTS: tuple[str, ...] = tuple(_DATA["benign_texts"])  # everyday text to leave alone
PLAIN_GROUP = "words that name no group"


@dataclass(frozen=True)
class KeptWord:
    """How much of its probability a word keeps."""

    word: str  # which
    group: str  # what kind of word
    kept: float  # with the method over without, geometric mean over the templates; 1 is unchanged


@dataclass(frozen=True)
class Neutrality:
    """What a method does to neutral text."""

    divergence: float  # KL(target || method), nats per token on benign text; infinite where a token is forbidden
    reverse_divergence: float  # KL(method || target), likewise; finite where the other is not
    tokens: int  # how many were looked at
    words: tuple[KeptWord, ...]  # one entry per group word and plain word

    def groups(self) -> dict[str, float]:
        """Kept probability by group, geometric mean over its words; 1 is unchanged."""
        names = dict.fromkeys(word.group for word in self.words)
        return {name: geometric_mean([word.kept for word in self.words if word.group == name]) for name in names}

    @property
    def kept(self) -> float:
        """Kept probability of all group words, geometric mean."""
        return geometric_mean([word.kept for word in self.words if word.group != PLAIN_GROUP])

    @property
    def lowest_word(self) -> KeptWord:
        """The group word that loses most, over the mean of its templates."""
        return min((word for word in self.words if word.group != PLAIN_GROUP), key=lambda word: word.kept)


def measure_neutrality(
    reader: GuidedReader,
    texts: Sequence[str] = BENIGN_TEXTS,
    *,
    templates: Sequence[str] = TEMPLATES,
    group_words: Mapping[str, Sequence[str]] = GROUP_WORDS,
    plain_words: Sequence[str] = PLAIN_WORDS,
) -> Neutrality:
    """Compare a method's distribution with the target's own on benign texts, and read every word after every template.

    `group_words` are those of each kind of group; nothing is sampled.
    """
    cases = [(group, word) for group, members in {**group_words, PLAIN_GROUP: plain_words}.items() for word in members]
    tokenizer, count = reader.target.tokenizer, len(templates)
    pairs = [split_ids(tokenizer, template, f" {word}") for _, word in cases for template in templates]
    shifts = [float(each.shift.sum()) for each in reader.read(pairs, "words")]
    words = tuple(
        KeptWord(word, group, math.exp(sum(shifts[number * count : (number + 1) * count]) / count))
        for number, (group, word) in enumerate(cases)
    )
    return Neutrality(*_divergences(reader, texts), words)


@torch.no_grad()
def _divergences(reader: GuidedReader, texts: Sequence[str]) -> tuple[float, float, int]:
    """Of target and method and the other way round, nats per token, and how many tokens there are."""
    rows = [whole_ids(reader.target.tokenizer, text) for text in texts]
    rows = [row for row in rows if len(row) > 1]
    sums, tokens = torch.zeros(2, dtype=torch.float64), 0
    with reader.progress(len(rows), "text", "divergence") as progress:
        for chosen in batches_by_length(reader.target.model, [len(row) for row in rows], reader.batch_size):
            input_ids, logits, mask = reader.logits([rows[place] for place in chosen])
            plain = logits.float().log_softmax(dim=-1)
            fused = method_log_probs(reader.make_processors(), input_ids, logits)
            # position i predicts token i + 1
            predicts = torch.arange(1, input_ids.shape[1] + 1, device=mask.device) < mask.sum(dim=1, keepdim=True)
            both = (divergence(plain, fused), divergence(fused, plain))
            sums += torch.stack([each[predicts].sum() for each in both]).double().cpu()
            tokens += int(predicts.sum())
            progress.update(len(chosen))
    forward, backward = (sums / max(1, tokens)).tolist()
    return forward, backward, tokens


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) along the last axis, nats; from log-probabilities [..., vocabulary], -inf allowed."""
    terms = first.exp() * (first - second)
    return torch.where(first == -torch.inf, torch.zeros_like(terms), terms).sum(dim=-1).clamp_min(0.0)
