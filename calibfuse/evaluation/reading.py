"""What a target and a method say to given tokens, without sampling: the common ground of suites, names and utility."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor

from calibfuse.evaluation.likelihood import batches
from calibfuse.evaluation.sampling import ProcessorFactory
from calibfuse.generation.continuations import pad_right
from calibfuse.generation.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class Reading:
    """What is said to the tokens of one text, one entry per token that was looked at.

    Attributes:
        plain: log-probability under the target, nats, float64 [tokens].
        fused: likewise with the method.
        plain_is_best: whether no other token is likelier under the target, bool [tokens].
        fused_is_best: likewise with the method.
    """

    plain: NDArray[np.float64]
    fused: NDArray[np.float64]
    plain_is_best: NDArray[np.bool_]
    fused_is_best: NDArray[np.bool_]

    @property
    def shift(self) -> NDArray[np.float64]:
        """Log p_method - log p_target of each token, nats; minus infinity where the method forbids it."""
        return self.fused - self.plain


def read_tokens(
    target: LanguageModel,
    make_processors: ProcessorFactory,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 32,
    title: str = "",
    show_progress: bool = False,
) -> list[Reading]:
    """Read texts with and without a method.

    Args:
        target: the model.
        make_processors: of the method.
        pairs: ids before, at least one, and ids that are looked at.
        batch_size: rows per forward pass, at most.
        title: of the progress bar.
        show_progress: draw one on standard error.

    Returns:
        A reading of each pair's second part, in their order.
    """
    order = sorted(range(len(pairs)), key=lambda place: sum(map(len, pairs[place])))
    found: dict[int, Reading] = {}
    lengths = [sum(map(len, pairs[place])) for place in order]
    with tqdm(total=len(pairs), desc=title, unit="text", disable=not show_progress) as progress:
        for part in batches(target.model, lengths, batch_size):
            chosen = order[part]
            rows = [[*pairs[place][0], *pairs[place][1]] for place in chosen]
            start = min(len(pairs[place][0]) for place in chosen) - 1
            columns = _read_batch(target, make_processors, rows, start)
            for number, place in enumerate(chosen):
                before, after = map(len, pairs[place])
                looked_at = slice(before - 1, before - 1 + after)  # column i is of token i + 1
                found[place] = Reading(*(column[number, looked_at] for column in columns))
            progress.update(len(chosen))
    return [found[place] for place in range(len(pairs))]


def method_log_probs(
    processors: Sequence[LogitsProcessor], input_ids: Tensor, logits: Tensor, start: int = 0
) -> Tensor:
    """A method's next-token log-probabilities at the positions of given sequences.

    Args:
        processors: in order. Those with `fuse_logits` do whole sequences at once; others are called step by step. The
            first gets the logits as they are, as in `generate()`: a fusion of hidden states undoes their soft cap.
        input_ids: int64 [rows, length], padding only behind the text.
        logits: float [rows, length, vocabulary]; not modified.
        start: first position that is wanted; those before are left as they are by step-wise processors.

    Returns:
        float32, shape of `logits`, nats.
    """
    result = logits.float()
    for processor in processors:
        whole: Any = getattr(processor, "fuse_logits", None)
        if whole is not None:
            result = whole(input_ids, result)
        else:
            steps = [result[:, :start]]
            for place in range(start, input_ids.shape[1]):
                call: Any = processor
                steps.append(call(input_ids[:, : place + 1], result[:, place]).float()[:, None])
            result = torch.cat(steps, dim=1)
    return result.log_softmax(dim=-1)


@torch.no_grad()
def _read_batch(
    target: LanguageModel, make_processors: ProcessorFactory, rows: Sequence[Sequence[int]], start: int
) -> tuple[NDArray[Any], ...]:
    """The fields of Reading, each [rows, length - 1], from the second token on; right from position `start` on."""
    input_ids, mask = pad_right(rows, target.model.device)
    model: Any = target.model
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    own = input_ids[:, 1:, None]
    log_probs, is_best = [], []
    for each in (logits.float().log_softmax(dim=-1), method_log_probs(make_processors(), input_ids, logits, start)):
        chosen = each[:, :-1].gather(-1, own)[..., 0]
        log_probs.append(chosen.double().cpu().numpy())
        is_best.append((chosen >= each[:, :-1].amax(dim=-1)).cpu().numpy())
    return (*log_probs, *is_best)
