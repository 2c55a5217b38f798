"""Other decoding-time methods as logits processors, written from their papers' formulas, measured by the same kit.

The contrast of two experts (DExperts, Liu et al. 2021), the log-linear mixture with a non-toxic model and the fusion of
hidden states (Tian et al. 2025) are modes of CalibFusion, see methods.py. Left out: methods that need gradients (PPLM)
or a second large model of the target's vocabulary (GeDi, proxy tuning).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, NoBadWordsLogitsProcessor, PreTrainedTokenizerBase

from calibfuse.evaluation.given_text.neutrality import BENIGN_TEXTS
from calibfuse.evaluation.given_text.reading import batches_by_length, method_log_probs, whole_ids
from calibfuse.evaluation.sampling import ProcessorFactory
from calibfuse.generation.decoding import pad_right
from calibfuse.generation.language_model import LanguageModel
from calibfuse.scorers import ToxicityScorer, load_scorer
from calibfuse.scorers.words import strong_words

_REWARD_CANDIDATES = 20  # k of the paper
_DEBIAS_FLOOR = 0.01  # epsilon of the paper: no token is scaled below this
_DEBIAS_PREFIX = "The following text is rude, hateful, threatening and full of swear words:\n\n"  # ours
_MATCHING_STEPS = 24
_TEMPERATURES = (0.05, 20.0)


class RewardGuidance(LogitsProcessor):
    """Score of each candidate plus beta times the reward of the text with it (RAD, Deng and Raffel 2023, eq. 1).

    The reward is 1 - toxicity of the whole text; all but the best tokens (`candidates`) are excluded, as in the paper.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        scorer: ToxicityScorer,
        beta: float,
        candidates: int = _REWARD_CANDIDATES,
    ) -> None:
        self._tokenizer, self._scorer, self._beta, self._candidates = tokenizer, load_scorer(scorer), beta, candidates

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores float32 [rows, vocabulary]: -inf outside the candidates."""
        log_probs = scores.float().log_softmax(dim=-1)
        values, ids = log_probs.topk(min(self._candidates, scores.shape[-1]), dim=-1)
        rows = zip(input_ids.tolist(), ids.tolist(), strict=True)
        texts = [[*row, token_id] for row, best in rows for token_id in best]
        decode: Any = self._tokenizer.batch_decode
        said = decode(texts, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        reward = 1.0 - torch.from_numpy(self._scorer.score(said)).to(values).view(ids.shape)
        return torch.full_like(log_probs, -torch.inf).scatter(-1, ids, values + self._beta * reward)


class SelfDebiasing(LogitsProcessor):
    """Lowers what the target itself finds likelier in a text announced as toxic (Schick et al. 2021, eq. 2 to 4).

    With D = p(w | text) - p(w | announcement, text), a token with D < 0 is scaled by exp(decay D), at least 0.01. The
    announced text is read anew at every step: this baseline shows quality, not speed.
    """

    def __init__(self, target: LanguageModel, decay: float, announcement: str = _DEBIAS_PREFIX) -> None:
        self._target, self._decay = target, decay
        self._before = whole_ids(target.tokenizer, announcement)
        self._specials = set(target.tokenizer.all_special_ids)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities up to a constant, float32 [rows, vocabulary]."""
        probabilities = scores.float().softmax(dim=-1)
        rows = []
        for row in input_ids.tolist():  # without leading padding and begin mark
            start = next((place for place, token_id in enumerate(row) if token_id not in self._specials), len(row))
            rows.append([*self._before, *row[start:]])
        announced = torch.empty_like(probabilities)
        for part in batches_by_length(self._target.model, [len(row) for row in rows], len(rows)):
            announced[part] = self._last_logits([rows[place] for place in part]).softmax(dim=-1)
        difference = probabilities - announced
        scale = (self._decay * difference.clamp_max(0.0)).exp().clamp_min(_DEBIAS_FLOOR)
        debiased: Tensor = (probabilities * scale).log()
        return debiased

    def _last_logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        padded, mask = pad_right(rows, self._target.model.device)
        model: Any = self._target.model
        logits: Tensor = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
        last = mask.sum(dim=1) - 1
        return logits[torch.arange(len(rows), device=last.device), last].float()


def forbid_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str] | None = None) -> LogitsProcessor:
    """Excludes every token that would complete a listed word, also capitalised, in capitals and after a space.

    Without words: the bundled list of strong words.
    """
    spellings = {
        lead + form
        for word in (strong_words() if words is None else words)
        for form in (word, word.capitalize(), word.upper())
        for lead in ("", " ")
    }
    encoded = {tuple(tokenizer(each, add_special_tokens=False)["input_ids"]) for each in spellings}
    kept = sorted(ids for ids in encoded if ids and tokenizer.unk_token_id not in ids)
    return NoBadWordsLogitsProcessor([list(ids) for ids in kept])


def match_temperature(
    target: LanguageModel, make_processors: ProcessorFactory, texts: Sequence[str] = BENIGN_TEXTS
) -> float:
    """The temperature, between 0.05 and 20, at which the target alone has a method's mean entropy on some texts.

    How much toxicity and perplexity change by a flatter or sharper distribution alone.
    """
    wanted = 0.0
    logits: list[Tensor] = []
    for text in texts:  # one by one: no padding, and positions of different methods stay comparable
        input_ids = torch.tensor([whole_ids(target.tokenizer, text)], device=target.model.device)
        with torch.no_grad():
            scores = target.model(input_ids=input_ids, use_cache=False).logits.float()
        wanted += float(_entropy(method_log_probs(make_processors(), input_ids, scores)).sum())
        logits.append(scores)
    low, high = map(math.log, _TEMPERATURES)
    for _ in range(_MATCHING_STEPS):
        middle = (low + high) / 2.0
        found = sum(float(_entropy((each / math.exp(middle)).log_softmax(dim=-1)).sum()) for each in logits)
        low, high = (middle, high) if found < wanted else (low, middle)
    return math.exp((low + high) / 2.0)


def _entropy(log_probs: Tensor) -> Tensor:
    terms = log_probs.exp() * log_probs
    return -torch.where(log_probs == -torch.inf, torch.zeros_like(terms), terms).sum(dim=-1)
