"""Other decoding-time methods as logits processors, written from their papers' formulas, measured by the same kit.

| name | source | strength |
|---|---|---|
| temperature | control: the target at another temperature | the temperature |
| top-k | control: truncation to the k best tokens alone, as in reward | k |
| nucleus | control: truncation to a nucleus before the draw's own, as in experts | p |
| bad-words | a list of strong words that are never completed | none |
| reward | RAD, Deng and Raffel 2023: reward of each of the 20 best tokens | beta |
| self-debias | Schick et al. 2021: against the target prompted to be toxic | lambda |

The contrast of two experts (DExperts, Liu et al. 2021), the log-linear mixture with a non-toxic model and the fusion of
hidden states (Tian et al. 2025) are modes of CalibFusion; who composes the comparison adds them.
Left out: methods that need gradients (PPLM) or a second large model of the target's vocabulary (GeDi, proxy tuning).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from calibfuse.errors import InputError
from calibfuse.evaluation.given_text.neutral_text import BENIGN_TEXTS
from calibfuse.evaluation.given_text.reading import batches_by_length, method_log_probs, whole_ids
from calibfuse.evaluation.methods import Method, ProcessorFactory
from calibfuse.generation.continuations import pad_right
from calibfuse.generation.language_model import LanguageModel
from calibfuse.scorers import ToxicityScorer, check_scores
from calibfuse.scorers.words import strong_words

_REWARD_CANDIDATES = 20  # k of the paper
_DEBIAS_FLOOR = 0.01  # epsilon of the paper: no token is scaled below this
_DEBIAS_PREFIX = "The following text is rude, hateful, threatening and full of swear words:\n\n"  # ours
_MATCHING_STEPS = 24
_TEMPERATURES = (0.05, 20.0)


class Temperature(LogitsProcessor):
    """Divides the scores by a temperature above 0."""

    supports_continuous_batching = True

    def __init__(self, temperature: float) -> None:
        if not 0.0 < temperature < math.inf:
            raise InputError(f"A temperature must be above 0, got {temperature}.")
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary] over the temperature; not modified in place."""
        return scores / self.temperature

    def fuse_logits(self, input_ids: Tensor, logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The same for whole sequences: log-probabilities [batch, length, vocabulary]."""
        return (logits.float() / self.temperature).log_softmax(dim=-1)


class RewardGuidance(LogitsProcessor):
    """Reward-guided decoding: score of each candidate plus beta times the reward of the text with it (RAD, eq. 1).

    Args:
        tokenizer: the target's.
        scorer: of toxicity; the reward is 1 - toxicity of the whole text so far with the candidate.
        beta: strength; 0 leaves only the truncation.
        candidates: best tokens that are tried; all others are excluded, as in the paper.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        scorer: ToxicityScorer,
        beta: float,
        candidates: int = _REWARD_CANDIDATES,
    ) -> None:
        if not 0.0 <= beta < math.inf or candidates < 1:
            raise InputError(f"Reward guidance needs beta of at least 0 and 1 candidate, got {beta} and {candidates}.")
        self._tokenizer = tokenizer
        self._scorer = scorer
        self._beta = beta
        self._candidates = candidates

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores float32 [rows, vocabulary]: -inf outside the candidates; not modified in place."""
        log_probs = scores.float().log_softmax(dim=-1)
        values, ids = log_probs.topk(min(self._candidates, scores.shape[-1]), dim=-1)
        rows, count = ids.shape
        texts = [
            [*row, token_id] for row, best in zip(input_ids.tolist(), ids.tolist(), strict=True) for token_id in best
        ]
        decode: Any = self._tokenizer.batch_decode
        said = decode(texts, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        toxicity = check_scores(self._scorer.score(said), len(said), self._scorer.name)
        reward = 1.0 - torch.from_numpy(toxicity).to(values).view(rows, count)
        return torch.full_like(log_probs, -torch.inf).scatter(-1, ids, values + self._beta * reward)


class SelfDebiasing(LogitsProcessor):
    """Lowers what the target itself finds likelier in a text announced as toxic (Schick et al. 2021, eq. 2 to 4).

    With D = p(w | text) - p(w | announcement, text), a token with D < 0 is scaled by exp(lambda D), at least 0.01. The
    announced text is read anew at every step: this baseline shows quality, not speed.

    Args:
        target: the model.
        decay: lambda of the paper.
        announcement: text put before.
    """

    supports_continuous_batching = False

    def __init__(self, target: LanguageModel, decay: float, announcement: str = _DEBIAS_PREFIX) -> None:
        if not 0.0 <= decay < math.inf:
            raise InputError(f"Self-debiasing needs lambda of at least 0, got {decay}.")
        self._target = target
        self._decay = decay
        self._before = whole_ids(target.tokenizer, announcement)
        self._specials = set(target.tokenizer.all_special_ids)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities up to a constant, float32 [rows, vocabulary]; not modified in place."""
        probabilities = scores.float().softmax(dim=-1)
        rows = [[*self._before, *self._without_specials(row)] for row in input_ids.tolist()]
        announced = torch.empty_like(probabilities)
        for part in batches_by_length(self._target.model, [len(row) for row in rows], len(rows)):
            announced[part] = self._last_logits([rows[place] for place in part]).softmax(dim=-1)
        difference = probabilities - announced
        scale = (self._decay * difference.clamp_max(0.0)).exp().clamp_min(_DEBIAS_FLOOR)
        debiased: Tensor = (probabilities * scale).log()
        return debiased

    def _last_logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """What the target says after each row, float32 [rows, vocabulary]."""
        padded, mask = pad_right(rows, self._target.model.device)
        model: Any = self._target.model
        logits: Tensor = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
        last = mask.sum(dim=1) - 1
        return logits[torch.arange(len(rows), device=last.device), last].float()

    def _without_specials(self, row: Sequence[int]) -> list[int]:
        """A row without its leading padding and begin mark."""
        start = next((place for place, token_id in enumerate(row) if token_id not in self._specials), len(row))
        return list(row[start:])


class BadWords(LogitsProcessor):
    """Excludes every token that would complete a listed word.

    Args:
        tokenizer: the target's.
        words: None: the bundled list of strong words. Each is also excluded capitalised, in capitals and after a space.
    """

    supports_continuous_batching = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: Sequence[str] | None = None) -> None:
        spellings = {
            lead + form
            for word in (strong_words() if words is None else words)
            for form in (word, word.capitalize(), word.upper())
            for lead in ("", " ")
        }
        encoded = {tuple(tokenizer(each, add_special_tokens=False)["input_ids"]) for each in spellings}
        kept = [ids for ids in encoded if ids and tokenizer.unk_token_id not in ids]
        # by length: the tokens before the last, and the last
        self._words = [
            torch.tensor(sorted(ids for ids in kept if len(ids) == length)) for length in sorted({*map(len, kept)})
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary] with -inf for excluded tokens; not modified in place."""
        excluded = torch.zeros_like(scores, dtype=torch.bool)
        for words in self._words:
            before, last = words[:, :-1].to(input_ids.device), words[:, -1].to(input_ids.device)
            count = before.shape[1]
            if count > input_ids.shape[1]:
                continue
            is_here = (input_ids[:, None, input_ids.shape[1] - count :] == before).all(dim=-1)  # (rows, words)
            rows, which = is_here.nonzero(as_tuple=True)
            excluded[rows, last[which]] = True
        return scores.masked_fill(excluded, -torch.inf)


def match_temperature(
    target: LanguageModel, make_processors: ProcessorFactory, texts: Sequence[str] = BENIGN_TEXTS
) -> float:
    """The temperature at which the target alone has a method's mean entropy.

    A method that flattens or sharpens the distribution changes toxicity and perplexity by that alone; this control
    shows how much.

    Args:
        target: the model.
        make_processors: of the method.
        texts: to measure on.

    Returns:
        The temperature, between 0.05 and 20.
    """
    rows = [whole_ids(target.tokenizer, text) for text in texts]
    entropies: list[float] = []
    logits: list[Tensor] = []
    for row in rows:  # one by one: no padding, and positions of different methods stay comparable
        input_ids = torch.tensor([row], device=target.model.device)
        with torch.no_grad():
            scores = target.model(input_ids=input_ids, use_cache=False).logits.float()
        fused = method_log_probs(make_processors(), input_ids, scores)
        entropies.append(float(_entropy(fused).sum()))
        logits.append(scores)
    wanted = sum(entropies)
    low, high = map(math.log, _TEMPERATURES)
    for _ in range(_MATCHING_STEPS):
        middle = (low + high) / 2.0
        found = sum(float(_entropy((each / math.exp(middle)).log_softmax(dim=-1)).sum()) for each in logits)
        low, high = (middle, high) if found < wanted else (low, middle)
    return math.exp((low + high) / 2.0)


def _entropy(log_probs: Tensor) -> Tensor:
    terms = log_probs.exp() * log_probs
    return -torch.where(log_probs == -torch.inf, torch.zeros_like(terms), terms).sum(dim=-1)


@dataclass(frozen=True, eq=False)
class Ingredients:
    """What baselines are made of."""

    target: LanguageModel  # the model
    # Rewards of reward guidance; not the scorer of the evaluation, if that can be helped. None: there is none.
    guide_scorer: ToxicityScorer | None = None
    matched: Method | None = None  # the method whose entropy the temperature control matches; None: there is none


@dataclass(frozen=True)
class Baseline:
    """A family of methods."""

    help: str  # one line
    strengths: tuple[float, ...]  # defaults, the first is the paper's; empty: it has none
    make: Callable[[Ingredients, float], ProcessorFactory]  # ingredients and strength -> factory of processors
    # Strengths to search the best one among, with the defaults; empty: there is nothing to search.
    scan: tuple[float, ...] = ()
    starts_at_plain: bool = True  # strength 0 would be plain decoding


def _always(processor: LogitsProcessor) -> ProcessorFactory:
    return lambda: [processor]


def _top_k(_: Ingredients, strength: float) -> ProcessorFactory:
    if strength < 1 or strength != int(strength):
        raise InputError(f"top-k needs a whole number of tokens, at least 1, got {strength:g}.")
    make: Any = TopKLogitsWarper
    return _always(make(top_k=int(strength)))


def _nucleus(_: Ingredients, strength: float) -> ProcessorFactory:
    if strength > 1.0:
        raise InputError(f"nucleus needs a probability of at most 1, got {strength:g}.")
    make: Any = TopPLogitsWarper
    return _always(make(top_p=strength))


def _reward(parts: Ingredients, strength: float) -> ProcessorFactory:
    if parts.guide_scorer is None:
        raise InputError("Reward guidance needs a scorer for its rewards.")
    return _always(RewardGuidance(parts.target.tokenizer, parts.guide_scorer, strength))


BASELINES: dict[str, Baseline] = {
    "temperature": Baseline(
        "the target at another temperature; without a strength: with the entropy of the strongest method",
        (),
        lambda _, strength: _always(Temperature(strength)),
        starts_at_plain=False,
    ),
    "top-k": Baseline(
        "truncation alone, as in reward",
        (float(_REWARD_CANDIDATES),),
        _top_k,
        scan=(2.0, 5.0, 10.0, 50.0, 100.0),
        starts_at_plain=False,
    ),
    "nucleus": Baseline(
        "truncation alone, as in experts", (0.9,), _nucleus, scan=(0.3, 0.5, 0.7, 0.8), starts_at_plain=False
    ),
    "bad-words": Baseline("a list of strong words", (), lambda parts, _: _always(BadWords(parts.target.tokenizer))),
    "reward": Baseline(
        "RAD: reward of each of the 20 best tokens",
        (10.0, 50.0),
        _reward,
        scan=(2.0, 5.0, 20.0, 100.0),
        starts_at_plain=False,  # at 0 it is top-k
    ),
    "self-debias": Baseline(
        "the target against itself, told to be toxic",
        (10.0, 50.0, 100.0),
        lambda parts, strength: _always(SelfDebiasing(parts.target, strength)),
        scan=(2.0, 5.0, 20.0),
    ),
}


def make_baselines(spec: str, parts: Ingredients, *, scan: bool = False) -> list[Method]:
    """Methods of a specification.

    Args:
        spec: "name" or "name:strength,strength", see BASELINES.
        parts: what they are made of.
        scan: without strengths in the specification, also those among which the best one is searched.

    Returns:
        One method per strength.

    Raises:
        InputError: unknown name, or bad strengths.
    """
    name, strengths = parse_baseline(spec)
    baseline = BASELINES[name]
    if scan and ":" not in spec:
        strengths = tuple(sorted({*strengths, *baseline.scan}))
    if name == "temperature" and not strengths:
        if parts.matched is None:
            raise InputError("The temperature control needs a number (temperature:1.1) or a method to match.")
        # rounded, so that a run that goes on with another number of threads finds the same one
        value = round(match_temperature(parts.target, parts.matched.make_processors), 4)
        title = f"temperature {value:.3f} (entropy of {parts.matched.title})"
        settings = {"baseline": name, "strength": value}
        return [Method("temperature-matched", title, baseline.make(parts, value), "temperature", None, settings)]
    if not strengths:
        return [Method(name, name, baseline.make(parts, 0.0), name, None, {"baseline": name})]
    return [
        Method(
            f"{name}-{value:g}",
            f"{name} {value:g}",
            baseline.make(parts, value),
            name,
            value,
            {
                "baseline": name,
                "strength": value,
                "guide": parts.guide_scorer.name if name == "reward" and parts.guide_scorer else None,
            },
            starts_at_plain=baseline.starts_at_plain,
            is_default=value in baseline.strengths[:1],
        )
        for value in strengths
    ]


def parse_baseline(spec: str) -> tuple[str, tuple[float, ...]]:
    """Name and strengths of a specification; the baseline's own where none are given.

    Raises:
        InputError: unknown name, or strengths that are no positive numbers or that it does not have.
    """
    name, colon, rest = spec.partition(":")
    if name not in BASELINES:
        raise InputError(f"Unknown baseline {name!r}; choose among {', '.join(BASELINES)}.")
    if not colon:
        return name, BASELINES[name].strengths
    if not BASELINES[name].strengths and name != "temperature":
        raise InputError(f"The baseline {name!r} has no strength, got {spec!r}.")
    try:
        strengths = tuple(float(part) for part in rest.split(","))
    except ValueError as error:
        raise InputError(f"Expected numbers after {name + ':'!r}, separated by commas, got {rest!r}.") from error
    if not all(0.0 < value < math.inf for value in strengths):
        raise InputError(f"The strengths of the baseline {name!r} must be above 0, got {rest!r}.")
    return name, strengths
