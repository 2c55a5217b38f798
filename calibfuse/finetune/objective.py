"""The loss of attribute-controlled fine-tuning: cross-entropy on a corpus, and a closed-form KL on samples.

The distribution nearest to a base p that satisfies a constraint C decomposes exactly into tokens, with
R(x_<=i) = E_p[C | x_<=i] (Meng et al. 2022, arXiv 2205.14219, section 3); the loss is CE + weight * KL(q || p).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from calibfuse.errors import InputError


def constrained_log_probs(base_log_probs: Tensor, log_r: Tensor) -> Tensor:
    """Log q = log_softmax(log p + log R), float [..., vocab], nats; -inf where p is 0.

    With exact R the normaliser is R(x_<i) itself; normalising over the vocabulary gives a distribution for any R.
    """
    if base_log_probs.shape != log_r.shape:
        raise InputError(
            f"log p and log R must have one shape, got {tuple(base_log_probs.shape)} and {tuple(log_r.shape)}; is the "
            "auxiliary model made for this target?"
        )
    return (base_log_probs + log_r).log_softmax(dim=-1)


def constrained_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) of next-token log-probabilities [..., vocab]: float [...], nats, differentiable in `log_p`."""
    if log_q.shape != log_p.shape:
        raise InputError(
            f"KL needs two distributions over one vocabulary, got shapes {list(log_q.shape)} and {list(log_p.shape)}."
        )
    q = log_q.exp()
    # 0 * (-inf - x) would be nan
    return torch.where(q > 0, q * (log_q - log_p), torch.zeros_like(q)).sum(dim=-1)


def continuation_positions(lengths: Tensor, prompt_lengths: Tensor, length: int) -> Tensor:
    """Where the next token is one of the continuation: bool [rows, length - 1], entry i speaks of token i + 1."""
    predicted = torch.arange(1, length, device=lengths.device)
    return (predicted >= prompt_lengths[:, None]) & (predicted < lengths[:, None])


def corpus_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Mean cross-entropy of all tokens but the first, nats: float [rows, length, vocab], int64 [rows, length]."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten())
