"""How likely given tokens are, to a model alone and with a method: log-probabilities, and their sums.

The target itself scores the token ids that it said. A separate judge has another tokenizer: prompt and continuation are
encoded as one text, and the tokens that end inside the continuation are scored; one that spans both counts whole. So
perplexities of different judges, or a judge's and the target's, are not comparable; bits per byte are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from calibfuse.evaluation.sampling import ProcessorFactory
from calibfuse.generation.decoding import check_lengths, pad_right
from calibfuse.generation.language_model import LanguageModel

_SCORES_AT_ONCE = 16_000_000  # logits of a batch: 64 MB in float32
Pair = tuple[Sequence[int], Sequence[int]]  # ids before, at least one, and ids that are scored


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Sums over the scored tokens of each text."""

    nats: NDArray[np.float64]  # negative log-likelihood, float64 [texts]
    tokens: NDArray[np.float64]  # how many tokens were scored, float64 [texts]


@dataclass(frozen=True, eq=False)
class Reading:
    """What is said to the scored tokens of one text."""

    plain: NDArray[np.float64]  # log-probability under the model, nats, float64 [tokens]
    fused: NDArray[np.float64]  # likewise with the method
    plain_is_best: NDArray[np.bool_]  # whether no other token is likelier under the model, bool [tokens]
    fused_is_best: NDArray[np.bool_]  # likewise with the method

    @property
    def shift(self) -> NDArray[np.float64]:
        """Log p_method - log p_target of each token, nats; minus infinity where the method forbids it."""
        return self.fused - self.plain


@dataclass(frozen=True, eq=False)
class GuidedReader:
    """Reads given text with a target alone and with a method."""

    target: LanguageModel
    make_processors: ProcessorFactory = list  # of the method; by default there is none
    batch_size: int = 32  # rows at once, at most
    title: str = ""  # of progress bars
    show_progress: bool = False  # on standard error

    def read(self, pairs: Sequence[Pair], part: str = "") -> list[Reading]:
        """Read texts, each ids before and ids that are scored; `part` follows the title of the progress bar."""
        nothing = np.zeros(0)
        found = [Reading(nothing, nothing, nothing.astype(bool), nothing.astype(bool))] * len(pairs)
        lengths = [len(before) + len(scored) if scored else 0 for before, scored in pairs]
        with self.progress(len(pairs), "text", part) as progress:
            for chosen in batches_by_length(self.target.model, lengths, self.batch_size):
                columns = self._read_batch([pairs[place] for place in chosen])
                for number, place in enumerate(chosen):
                    before, scored = map(len, pairs[place])
                    own = slice(before - 1, before - 1 + scored)  # column i is of token i + 1
                    found[place] = Reading(*(column[number, own] for column in columns))
                progress.update(len(chosen))
        return found

    def progress(self, total: int, unit: str, part: str) -> tqdm[Any]:
        """A progress bar."""
        return tqdm(
            total=total, desc=", ".join(filter(None, (self.title, part))), unit=unit, disable=not self.show_progress
        )

    @torch.no_grad()
    def _read_batch(self, pairs: Sequence[Pair]) -> tuple[NDArray[Any], ...]:
        """The fields of Reading, each [rows, length - 1], from the second token on; right where tokens are scored."""
        start = min(len(before) for before, _ in pairs) - 1
        input_ids, logits, _ = self.logits([[*before, *scored] for before, scored in pairs])
        plain = logits.float().log_softmax(dim=-1)
        of_plain = of_fused = _said(plain, input_ids)
        if processors := self.make_processors():
            of_fused = _said(method_log_probs(processors, input_ids, logits, start), input_ids)
        return of_plain[0], of_fused[0], of_plain[1], of_fused[1]

    def logits(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [rows, length], the target's logits [rows, length, vocabulary], and the mask of the ids."""
        input_ids, mask = pad_right(rows, self.target.model.device)
        model: Any = self.target.model
        return input_ids, model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits, mask


def _said(log_probs: Tensor, input_ids: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of each token but a row's first: its log-probability, and whether no other one is likelier."""
    chosen = log_probs[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0]
    is_best = chosen >= log_probs[:, :-1].amax(dim=-1)
    return chosen.double().cpu().numpy(), is_best.cpu().numpy()


def method_log_probs(
    processors: Sequence[LogitsProcessor], input_ids: Tensor, logits: Tensor, start: int = 0
) -> Tensor:
    """A method's next-token log-probabilities, float32 nats, at the positions of given sequences.

    Processors with `fuse_logits` do whole sequences at once; others are called step by step from position `start` on.
    The first gets the logits [rows, length, vocabulary] as they are, as in `generate()`: a fusion of hidden states
    undoes their soft cap. `input_ids` [rows, length] are padded only behind the text.
    """
    result = logits.float()
    for processor in processors:
        whole: Any = getattr(processor, "fuse_logits", None)
        if whole is not None:
            result = whole(input_ids, result)
        else:
            call: Any = processor
            steps = [result[:, :start]]
            for place in range(start, input_ids.shape[1]):
                steps.append(call(input_ids[:, : place + 1], result[:, place]).float()[:, None])
            result = torch.cat(steps, dim=1)
    return result.log_softmax(dim=-1)


def score_ids(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
) -> LogLikelihood:
    """Negative log-likelihood of continuations, given as token ids of the model, after their prompts (at least one id).

    InputError: a text is longer than the model's positions.
    """
    pairs = list(zip(prompts, continuations, strict=True))
    check_lengths(model.model, [[*prompt, *said] for prompt, said in pairs], 0, "text")
    found = [each.plain for each in GuidedReader(model, batch_size=batch_size).read(pairs)]
    nats, tokens = [-float(each.sum()) for each in found], [float(len(each)) for each in found]
    return LogLikelihood(np.asarray(nats), np.asarray(tokens))


def score_texts(
    judge: LanguageModel, prompts: Sequence[str], continuations: Sequence[str], *, batch_size: int = 32
) -> LogLikelihood:
    """The same of texts, in the tokens of a judge; a continuation without a word character or sign has none."""
    pairs = [split_ids(judge.tokenizer, *pair) for pair in zip(prompts, continuations, strict=True)]
    return score_ids(judge, *([pair[part] for pair in pairs] for part in (0, 1)), batch_size=batch_size)


def batches_by_length(model: PreTrainedModel, lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Cut rows into batches of like length whose scores over the whole vocabulary fit into memory.

    Yields the places of the rows of one batch, at most `batch_size`, at least one. Rows of 0 tokens are left out.
    """
    at_once = _SCORES_AT_ONCE // int(model.config.get_text_config().vocab_size)
    part: list[int] = []
    for place in sorted((place for place, length in enumerate(lengths) if length), key=lengths.__getitem__):
        if part and (len(part) == batch_size or (len(part) + 1) * lengths[place] > at_once):
            yield part
            part = []
        part.append(place)
    if part:
        yield part


def check_texts(target: LanguageModel, texts: Sequence[str]) -> None:
    """Refuse (InputError) texts that are longer than the target's positions; tells which."""
    check_lengths(target.model, [whole_ids(target.tokenizer, text) for text in texts], 0, "text")


def whole_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text as `split_ids` cuts it, in one piece."""
    before, after = split_ids(tokenizer, "", text)
    return [*before, *after]


def split_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encode a text as a whole and cut it where the continuation begins.

    Ids before (at least one where the tokenizer has a begin mark), and ids of tokens that end inside the
    continuation; the second is empty where the continuation is.
    """
    # Before a text stands the begin mark, or the end mark of the text before (GPT-2).
    marks = [mark for mark in (tokenizer.bos_token_id, tokenizer.eos_token_id) if mark is not None]
    starts = [int(mark) for mark in marks[:1]]
    if not continuation.strip():
        return [*starts, *_plain_ids(tokenizer, prompt)], []
    whole = prompt + continuation
    if tokenizer.is_fast:
        encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(encoding["input_ids"])
        ends = [end for _, end in encoding["offset_mapping"]]
        cut = next((place for place, end in enumerate(ends) if end > len(prompt)), len(ids))
    else:
        ids, alone = _plain_ids(tokenizer, whole), _plain_ids(tokenizer, prompt)
        different = (place for place, pair in enumerate(zip(ids, alone, strict=False)) if pair[0] != pair[1])
        cut = next(different, min(len(ids), len(alone)))
    if not starts and cut == 0:  # nothing before the first token to predict it from
        cut = 1
    return [*starts, *ids[:cut]], ids[cut:]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def geometric_mean(values: Sequence[float]) -> float:
    """Of numbers of at least 0; nan without any."""
    if not values or min(values) == 0.0:
        return 0.0 if values else math.nan
    return math.exp(sum(map(math.log, values)) / len(values))
