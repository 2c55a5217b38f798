"""Fine-tuning of one step of a schedule: optimiser steps on corpus blocks and, with a constraint, on samples.

The loss is CE(corpus) + weight * KL(q || p_theta) on samples, in closed form: the distribution q nearest to a base p
that satisfies a constraint C decomposes exactly into tokens, with R(x_<=i) = E_p[C | x_<=i] (Meng et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from calibfuse.errors import InputError, check_ranges
from calibfuse.finetune.corpus import PackedCorpus
from calibfuse.training.loop import TrainingLoop, endless_batches, learning_rate, make_optimizer, mixed_precision
from calibfuse.value.auxiliary import AuxiliaryModel
from calibfuse.value.samples import SampleSet


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """How to fine-tune."""

    steps: int = 200  # optimiser steps of one iteration
    batch_size: int = 8  # corpus blocks per optimiser step
    sample_batch_size: int = 32  # samples per optimiser step, for the KL
    kl_weight: float = 1.0  # weight of KL(q || p_theta), nats per token; 0: plain fine-tuning
    strength: float = 1.0  # q is p * R ** strength; 1: the closest distribution to p that satisfies the constraint
    learning_rate: float = 1e-4  # peak
    warmup: float = 0.05  # share of the steps of all iterations in which the rate rises from 0; then it falls to 0
    weight_decay: float = 0.0  # of matrices
    precision: str = "fp32"  # "fp32", or "bf16" for autocast; weights stay as they were loaded
    seed: int = 0  # of the order of blocks and samples, and of dropout

    def __post_init__(self) -> None:
        check_ranges(self, **dict.fromkeys(("steps", "batch_size", "sample_batch_size"), "[1, inf)"))
        check_ranges(self, **dict.fromkeys(("learning_rate", "strength"), "(0, inf)"))
        check_ranges(self, kl_weight="[0, inf)", weight_decay="[0, inf)", warmup="[0, 1]", precision=("fp32", "bf16"))

    def rate_at(self, step: int, iterations: int) -> float:
        """Learning rate of an optimiser step counted over all iterations: rises, then falls linearly to 0."""
        return learning_rate(step, self.steps * iterations, peak=self.learning_rate, warmup=self.warmup)


@dataclass(frozen=True, eq=False)
class Constraint:
    """What the KL term draws the model towards."""

    base: PreTrainedModel  # p, frozen, in evaluation mode
    auxiliary: AuxiliaryModel  # R, likewise
    samples: SampleSet  # whose continuation positions are looked at; labels are not needed here


def tuning_optimizer(model: PreTrainedModel, config: TuningConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; biases and norms are not decayed."""
    parameters = dict(model.named_parameters())
    return make_optimizer(parameters, rate=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.999))


def tune(
    model: PreTrainedModel,
    optimizer: torch.optim.AdamW,
    corpus: PackedCorpus,
    config: TuningConfig,
    *,
    iteration: int,
    iterations: int,
    constraint: Constraint | None = None,
    show_progress: bool = False,
) -> dict[str, float]:
    """Fine-tune a model in place for one iteration: CE(corpus) + kl_weight * KL(q || p_theta).

    `optimizer` is of `tuning_optimizer`, with the state of the iteration before; `iteration`, from 1, decides where in
    the corpus to read, and the learning rate.

    Returns:
        "corpus_nats", "kl_nats" (nan without a constraint) per token over the last quarter of the steps,
        "first_kl_nats" over the first eighth, "corpus_tokens" and "sample_tokens" read.
    """
    check_corpus(corpus, config)
    loop = _TuningLoop(model, optimizer, corpus, config, iteration, iterations, constraint, show_progress=show_progress)
    model.train()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([config.seed, 23, iteration]).generate_state(1)[0]))
        loop.train()
    model.eval()  # type: ignore[no-untyped-call]
    count = len(loop.history)
    kl = [row.get("KL", math.nan) for row in loop.history]
    return {
        "corpus_nats": float(np.mean([row["corpus_loss"] for row in loop.history[-max(1, count // 4) :]])),
        "kl_nats": float(np.mean(kl[-max(1, count // 4) :])),
        "first_kl_nats": float(np.mean(kl[: max(1, count // 8)])),
        "corpus_tokens": loop.tokens,
        "sample_tokens": loop.sample_tokens,
    }


class _TuningLoop(TrainingLoop):
    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.AdamW,
        corpus: PackedCorpus,
        config: TuningConfig,
        iteration: int,
        iterations: int,
        constraint: Constraint | None,
        *,
        show_progress: bool,
    ) -> None:
        first = (iteration - 1) * config.steps
        super().__init__(
            dict(model.named_parameters()),
            optimizer,
            steps=first + config.steps,
            first_step=first,
            rate=partial(config.rate_at, iterations=iterations),
            label=f"tuning {iteration}",
            show_progress=show_progress,
        )
        self.model, self.corpus, self.config = model, corpus, config
        self.constraint = constraint if config.kl_weight > 0 else None
        self.sample_tokens = 0
        blocks = _batches(len(corpus.train), config.batch_size, config.seed, 21)
        self._blocks = islice(blocks, first, None)
        if self.constraint is not None:
            count = len(self.constraint.samples)
            self._rows = _batches(count, config.sample_batch_size, config.seed, 22, iteration)

    def losses(self) -> dict[str, float]:
        model, config = self.model, self.config
        ids = self.corpus.train[torch.from_numpy(next(self._blocks))].to(model.device, torch.long)
        with mixed_precision(model.device, config.precision):
            loss = corpus_loss(model(input_ids=ids, use_cache=False).logits, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        self.tokens += ids[:, 1:].numel()
        row = {"corpus_loss": float(loss.detach())}
        if self.constraint is not None:
            # a second backward pass: the graphs of corpus and samples are never in memory together
            row["KL"], positions = _add_kl_gradient(model, self.constraint, torch.from_numpy(next(self._rows)), config)
            self.sample_tokens += positions
        return row


def _batches(count: int, size: int, *seeds: int) -> Iterator[NDArray[np.int64]]:
    return endless_batches(np.arange(count), size, lambda epoch: np.random.default_rng([*seeds, epoch]))


def check_corpus(corpus: PackedCorpus, config: TuningConfig) -> None:
    """Refuse a corpus with fewer blocks than one batch."""
    if len(corpus.train) < config.batch_size:
        raise InputError(
            f"The corpus has {len(corpus.train)} blocks of {corpus.block_length} tokens, fewer than one batch of "
            f"{config.batch_size}. Give more text, or a smaller batch or block length."
        )


def _add_kl_gradient(
    model: PreTrainedModel, constraint: Constraint, rows: Tensor, config: TuningConfig
) -> tuple[float, int]:
    """Add the gradient of the weighted KL on some samples; returns the KL and its number of positions."""
    samples = constraint.samples
    lengths, prompt_lengths = samples.lengths[rows], samples.prompt_lengths[rows]
    longest = int(lengths.max())
    ids = samples.input_ids[rows, :longest].to(model.device)
    mask = (torch.arange(longest) < lengths[:, None]).long().to(model.device)
    chosen = continuation_positions(lengths, prompt_lengths, longest).to(model.device)
    positions = int(chosen.sum())
    if not positions:
        return 0.0, 0
    with mixed_precision(model.device, config.precision):
        with torch.no_grad():
            base_logits = constraint.base(input_ids=ids, attention_mask=mask, use_cache=False).logits
            log_r = constraint.auxiliary(ids, mask)[:, :-1][chosen]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with torch.no_grad():
        base_log_probs = torch.log_softmax(base_logits[:, :-1][chosen].float(), dim=-1)
        log_q = constrained_log_probs(base_log_probs, config.strength * log_r.float())
    log_p = torch.log_softmax(logits[:, :-1][chosen].float(), dim=-1)
    divergence = constrained_kl(log_q, log_p).mean()
    (config.kl_weight * divergence).backward()  # type: ignore[no-untyped-call]
    return float(divergence.detach()), positions


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
