"""The constrained next-token distribution, in closed form (Meng et al. 2022, arXiv 2205.14219, section 3).

Among all q with E_q[C] as demanded, the one nearest to a base model p is the tilted q*(x) proportional to p(x) C(x).
With R(x_<=i) = E_p[C | x_<=i] it decomposes exactly into tokens:

    q*(y | x_<i) = p(y | x_<i) R(x_<i, y) / R(x_<i),      R(x_<i) = sum_y p(y | x_<i) R(x_<i, y)
"""

from __future__ import annotations

from torch import Tensor

from calibfuse.errors import InputError


def constrained_log_probs(base_log_probs: Tensor, log_r: Tensor) -> Tensor:
    """Log q = log_softmax(log p + log R).

    With exact R the normaliser is R(x_<i) itself; normalising over the vocabulary gives a distribution for any R.

    Args:
        base_log_probs: float [..., vocab], log p in nats (logits will do: a constant per row cancels).
        log_r: float [..., vocab], log R of each next token; multiply it to change the strength.

    Returns:
        float [..., vocab], normalised, nats; -inf where p is 0.

    Raises:
        InputError: the shapes differ.

    Example:
        >>> import torch
        >>> p, r = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.3])
        >>> constrained_log_probs(p.log(), r.log()).exp()
        tensor([0.7500, 0.2500])
    """
    if base_log_probs.shape != log_r.shape:
        raise InputError(
            f"log p and log R must have one shape, got {tuple(base_log_probs.shape)} and {tuple(log_r.shape)}; is the "
            "auxiliary model made for this target?"
        )
    return (base_log_probs + log_r).log_softmax(dim=-1)
