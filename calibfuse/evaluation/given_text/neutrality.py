"""What a method does where it should do nothing: divergence on benign text, and words that name groups of people.

Detoxification is known to silence whom it should protect (Xu et al. 2021). The probability that a group word keeps
after a neutral beginning, and the Kullback-Leibler divergence from the target's own distribution on benign text, show
it before any text is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from calibfuse.evaluation.given_text.neutral_text import BENIGN_TEXTS, GROUP_WORDS, PLAIN_WORDS, TEMPLATES
from calibfuse.evaluation.given_text.reading import (
    batches_by_length,
    geometric_mean,
    method_log_probs,
    read_tokens,
    split_ids,
    whole_ids,
)
from calibfuse.evaluation.sampling import ProcessorFactory
from calibfuse.generation.decoding import pad_right
from calibfuse.generation.language_model import LanguageModel

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
    target: LanguageModel,
    make_processors: ProcessorFactory,
    texts: Sequence[str] | None = None,
    *,
    templates: Sequence[str] = TEMPLATES,
    group_words: Mapping[str, Sequence[str]] = GROUP_WORDS,
    plain_words: Sequence[str] = PLAIN_WORDS,
    batch_size: int = 32,
    title: str = "",
    show_progress: bool = False,
) -> Neutrality:
    """Compare a method's distribution with the target's own on benign texts; None: the bundled ones.

    Nothing is sampled. Every word, of a kind of group or plain, is read after every template.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    tokens = 0
    rows = [whole_ids(target.tokenizer, text) for text in (BENIGN_TEXTS if texts is None else texts)]
    rows = [row for row in rows if len(row) > 1]
    parts = list(batches_by_length(target.model, [len(row) for row in rows], batch_size))
    for chosen in tqdm(parts, desc=f"{title}, divergence", unit="batch", disable=not show_progress):
        plain, fused, scored = _distributions(target, make_processors, [rows[place] for place in chosen])
        both = (divergence(plain, fused), divergence(fused, plain))
        sums += torch.stack([each[scored].sum() for each in both]).double().cpu()
        tokens += int(scored.sum())
    cases = [
        (group, word, template)
        for group, members in {**group_words, PLAIN_GROUP: plain_words}.items()
        for word in members
        for template in templates
    ]
    pairs = [split_ids(target.tokenizer, template, f" {word}") for _, word, template in cases]
    options: dict[str, Any] = {"batch_size": batch_size, "title": f"{title}, words", "show_progress": show_progress}
    shifts = [float(each.shift.sum()) for each in read_tokens(target, make_processors, pairs, **options)]
    count = len(templates)
    words = tuple(
        KeptWord(cases[number][1], cases[number][0], math.exp(sum(shifts[number : number + count]) / count))
        for number in range(0, len(cases), count)
    )
    forward, backward = (sums / max(1, tokens)).tolist()
    return Neutrality(forward, backward, tokens, words)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) along the last axis, nats; from log-probabilities [..., vocabulary], -inf allowed."""
    terms = first.exp() * (first - second)
    return torch.where(first == -torch.inf, torch.zeros_like(terms), terms).sum(dim=-1).clamp_min(0.0)


@torch.no_grad()
def _distributions(
    target: LanguageModel, make_processors: ProcessorFactory, rows: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities without and with the method, and which positions predict a token of the text."""
    input_ids, mask = pad_right(rows, target.model.device)
    logits: Tensor = target.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    fused = method_log_probs(make_processors(), input_ids, logits)
    columns = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)  # position i predicts token i + 1
    return logits.float().log_softmax(dim=-1), fused, columns < mask.sum(dim=1, keepdim=True)
