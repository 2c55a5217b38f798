"""How likely a language model finds continuations: nats and tokens, so that perplexities are ratios of sums.

The target itself scores the token ids that it said. A separate judge has another tokenizer: prompt and continuation are
encoded as one text, and the tokens that end inside the continuation are scored; one that spans both counts whole. As
each tokenizer cuts words in its own way, perplexities of different judges are not comparable, nor is a judge's with the
target's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calibfuse.generation.continuations import pad_right
from calibfuse.generation.decoding import check_lengths
from calibfuse.generation.language_model import LanguageModel

_SCORES_AT_ONCE = 16_000_000  # logits of a batch: 64 MB in float32


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Sums over the scored tokens of each text.

    Attributes:
        nats: negative log-likelihood, float64 [texts].
        tokens: how many tokens were scored, float64 [texts].
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.float64]


def score_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
) -> LogLikelihood:
    """Negative log-likelihood of continuations, given as token ids of the model, after their prompts.

    Args:
        model: causal language model in evaluation mode.
        prompts: token ids, at least one each.
        continuations: token ids; may be empty.
        batch_size: rows per forward pass, at most.

    Returns:
        Nats and tokens of each continuation.

    Raises:
        InputError: a text is longer than the model's positions.
    """
    nats = np.zeros(len(prompts))
    tokens = np.asarray([float(len(each)) for each in continuations])
    rows = [[*prompt, *said] for prompt, said in zip(prompts, continuations, strict=True)]
    check_lengths(model, rows, 0, "text")
    order = sorted((place for place in range(len(rows)) if continuations[place]), key=lambda place: len(rows[place]))
    for part in batches(model, [len(rows[place]) for place in order], batch_size):
        chosen = order[part]
        starts = [len(prompts[place]) for place in chosen]
        nats[chosen] = _batch_nats(model, [rows[place] for place in chosen], starts)
    return LogLikelihood(nats, tokens)


def batches(model: PreTrainedModel, lengths: Sequence[int], batch_size: int) -> Iterator[slice]:
    """Cut rows into batches whose scores over the whole vocabulary fit into memory.

    Args:
        model: that reads them.
        lengths: of the rows, in tokens, in their order; sorted ones make fuller batches.
        batch_size: rows per batch, at most; fewer where the vocabulary is large. A row alone always is a batch.

    Yields:
        One slice of the rows after the other.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    start = 0
    while start < len(lengths):
        stop, longest = start + 1, lengths[start]
        while stop < len(lengths) and stop - start < batch_size:
            longest = max(longest, lengths[stop])
            if (stop + 1 - start) * longest * vocabulary > _SCORES_AT_ONCE:
                break
            stop += 1
        yield slice(start, stop)
        start = stop


def check_texts(target: LanguageModel, texts: Sequence[str]) -> None:
    """Refuse texts that are longer than the target's positions.

    Raises:
        InputError: one is; tells which.
    """
    rows = [[each for part in split_ids(target.tokenizer, "", text) for each in part] for text in texts]
    check_lengths(target.model, rows, 0, "text")


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    continuations: Sequence[str],
    *,
    batch_size: int = 32,
) -> LogLikelihood:
    """Negative log-likelihood of continuations, given as text, under a model with a tokenizer of its own.

    Args:
        model: causal language model in evaluation mode.
        tokenizer: its tokenizer.
        prompts: texts.
        continuations: texts; without a word character or sign nothing is scored.
        batch_size: rows per forward pass, at most.

    Returns:
        Nats and the judge's tokens of each continuation.

    Raises:
        InputError: a text is longer than the model's positions.
    """
    first: list[list[int]] = []
    rest: list[list[int]] = []
    for prompt, said in zip(prompts, continuations, strict=True):
        before, after = split_ids(tokenizer, prompt, said)
        first.append(before)
        rest.append(after)
    return score_ids(model, first, rest, batch_size=batch_size)


def split_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encode a text as a whole and cut it where the continuation begins.

    Args:
        tokenizer: the judge's.
        prompt: text before.
        continuation: text after.

    Returns:
        Ids before (at least one where the tokenizer has a begin mark), and ids of tokens that end inside the
        continuation; the second is empty where the continuation is.
    """
    starts = _begin_ids(tokenizer)
    if not continuation.strip():
        return [*starts, *_plain_ids(tokenizer, prompt)], []
    whole = prompt + continuation
    if tokenizer.is_fast:
        encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(encoding["input_ids"])
        ends = [end for _, end in encoding["offset_mapping"]]
        cut = next((place for place, end in enumerate(ends) if end > len(prompt)), len(ids))
    else:
        ids = _plain_ids(tokenizer, whole)
        alone = _plain_ids(tokenizer, prompt)
        cut = next(
            (place for place, pair in enumerate(zip(ids, alone, strict=False)) if pair[0] != pair[1]),
            min(len(ids), len(alone)),
        )
    if not starts and cut == 0:  # nothing before the first token to predict it from
        cut = 1
    return [*starts, *ids[:cut]], ids[cut:]


def _begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before a text: the begin mark, or the end mark of the text before (GPT-2)."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return [int(token_id)]
    return []


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@torch.no_grad()
def _batch_nats(model: PreTrainedModel, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> NDArray[np.float64]:
    input_ids, mask = pad_right(rows, model.device)
    logits: Tensor = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    losses = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    ).view(len(rows), -1)
    # column i predicts token i + 1
    columns = torch.arange(1, input_ids.shape[1], device=input_ids.device)
    is_scored = (columns >= torch.tensor(list(starts), device=input_ids.device)[:, None]) & (mask[:, 1:] == 1)
    nats: NDArray[np.float64] = losses.masked_fill(~is_scored, 0.0).double().sum(dim=1).cpu().numpy()
    return nats
