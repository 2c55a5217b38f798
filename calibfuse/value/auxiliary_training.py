"""Training of an auxiliary model on labelled samples (Meng et al. 2022, arXiv 2205.14219, section 4).

With w the self-normalised importance weight of a sample (mean 1) and the sums over its continuation positions:

    loss = mean w [ BCE(C, R(x_<=i)) + consistency_weight * KL_bern( sum_y R(x_<i, y) p(y | x_<i) || R(x_<i) ) ]

The first term's minimum is R = E_p[C | x_<=i], also for soft C. Only the taken token of each position has a label; the
second term ties the other tokens' R to it, and needs no label. Left out: drawing and labelling.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibfuse.errors import DataError, ScorerError, check_ranges
from calibfuse.training.loop import TrainingLoop, endless_batches, learning_rate, make_optimizer
from calibfuse.value.auxiliary import AuxiliaryModel
from calibfuse.value.samples import SampleSet

_CLOSEST = -1e-7  # log R is kept this far below 0, so that log(1 - R) is finite


@dataclass(frozen=True, kw_only=True)
class AuxiliaryTrainingConfig:
    """How an auxiliary model learns."""

    steps: int = 300  # optimiser steps
    batch_size: int = 32  # samples of a step
    learning_rate: float = 1e-3  # peak; it rises over the first twentieth of the steps and falls linearly to 0
    consistency_weight: float = 0.5  # of the forward consistency; 0 leaves it (and its cost) out
    # It costs a forward pass of the base model and all scores of the vocabulary; the labels need neither.
    consistency_share: float = 0.25  # share of a batch's samples at whose positions it is asked for
    weight_decay: float = 0.01  # of the matrices
    held_out_share: float = 0.1  # share of the prompts (of the samples where there are few prompts) that only measures
    seed: int = 0  # of the held-out draw and the order of the samples

    def __post_init__(self) -> None:
        check_ranges(self, steps="[1, inf)", batch_size="[1, inf)", learning_rate="(0, inf)")
        check_ranges(self, consistency_weight="[0, inf)", weight_decay="[0, inf)")
        check_ranges(self, consistency_share="(0, 1]", held_out_share="[0, 1)")


def train_auxiliary(
    auxiliary: AuxiliaryModel,
    base: PreTrainedModel,
    samples: SampleSet,
    config: AuxiliaryTrainingConfig,
    *,
    folder: Path | None = None,
    save_every: int = 50,
    show_progress: bool = True,
) -> dict[str, float]:
    """Teach an auxiliary model what the samples' labels say.

    The auxiliary model is changed in place, on the base model's device, and left in evaluation mode. Samples whose
    label is nan are left out, and counted. Where `folder` holds a checkpoint of the same samples and settings, training
    goes on from it, and comes to the same as without the stop.

    Returns:
        "samples" and "left_out" (counts), "effective_samples" (Kish's count under the weights), "mean_satisfaction"
        (weighted), "held_out_bce" and "prior_bce" (nats per position of the held-out samples, under the model and under
        the mean alone), "consistency_gap" (mean |sum_y R p - R| there, or nan), "loss" (of the last tenth of steps).
    """
    if not len(samples):
        raise DataError("An auxiliary model needs samples to learn from, got none.")
    labelled = ~samples.satisfaction.isnan()
    if not labelled.any():
        raise ScorerError(f"None of the {len(samples)} samples has a label, so there is nothing to learn from.")
    used = samples.rows(labelled)
    is_held_out = _held_out(used, config)
    train = torch.nonzero(~is_held_out)[:, 0]
    if not len(train):
        raise DataError(f"{len(used)} labelled samples are too few to train an auxiliary model with.")
    loop = _AuxiliaryLoop(auxiliary, base, used, train, config, folder, save_every, show_progress=show_progress)
    auxiliary.train()
    if auxiliary.is_fresh:
        auxiliary.set_prior(loop.mean)
    if loop.checkpoint:
        loop.resume()
    if not loop.train():
        raise KeyboardInterrupt
    auxiliary.eval()
    tail = [row["loss"] for row in loop.history[-max(1, len(loop.history) // 10) :]]
    return {
        "samples": float(len(used)),
        "left_out": float(len(samples) - len(used)),
        "effective_samples": float(loop.weights.sum() ** 2 / (loop.weights**2).sum()),
        "mean_satisfaction": loop.mean,
        **loop.measure(torch.nonzero(is_held_out)[:, 0] if bool(is_held_out.any()) else train),
        "loss": sum(tail) / len(tail),
    }


@dataclass(frozen=True)
class _Terms:
    """Weighted means over the positions of a batch; prior_bce is that of a constant R, gap is |sum_y R p - R|."""

    bce: Tensor
    prior_bce: Tensor
    consistency: Tensor
    gap: Tensor


class _AuxiliaryLoop(TrainingLoop):
    def __init__(
        self,
        auxiliary: AuxiliaryModel,
        base: PreTrainedModel,
        samples: SampleSet,
        train: Tensor,
        config: AuxiliaryTrainingConfig,
        folder: Path | None,
        save_every: int,
        *,
        show_progress: bool,
    ) -> None:
        parameters = {name: each for name, each in auxiliary.named_parameters() if each.requires_grad}
        super().__init__(
            parameters,
            make_optimizer(parameters, rate=config.learning_rate, weight_decay=config.weight_decay),
            steps=config.steps,
            rate=partial(learning_rate, steps=config.steps, peak=config.learning_rate, warmup=0.05),
            folder=folder,
            identity={"auxiliary model": {name: list(each.shape) for name, each in parameters.items()}},
            save_every=save_every,
            label="auxiliary model",
            show_progress=show_progress,
        )
        self.auxiliary, self.base = auxiliary, base.eval()  # type: ignore[no-untyped-call]
        self.samples, self.config = samples, config
        self.weights = normalised_weights(samples.log_weights)
        self.mean = float((self.weights * samples.satisfaction).mean())
        share = config.consistency_share if config.consistency_weight > 0 else 0.0
        self._consistent = math.ceil(share * config.batch_size)
        self._trims = "logits_to_keep" in inspect.signature(base.forward).parameters
        rng = np.random.default_rng([config.seed, 42])
        self._batches = endless_batches(train.numpy(), config.batch_size, lambda epoch: rng)

    def losses(self) -> dict[str, float]:
        terms = self.terms(torch.from_numpy(next(self._batches)), self._consistent)
        loss = terms.bce + self.config.consistency_weight * terms.consistency
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach()), "BCE": float(terms.bce.detach())}

    def position(self) -> int:
        return self.step

    def set_position(self, position: int) -> None:
        for _ in range(position):
            next(self._batches)

    def terms(self, rows: Tensor, consistent: int) -> _Terms:
        """Loss terms of some samples; the first `consistent` of them are asked for forward consistency."""
        device, auxiliary, batch = self.base.device, self.auxiliary, self.samples.rows(rows)
        longest = int(batch.lengths.max())
        ids = batch.input_ids[:, :longest].to(device)
        lengths, prompts = batch.lengths.to(device)[:, None], batch.prompt_lengths.to(device)[:, None]
        places = torch.arange(longest, device=device)
        mask = (places < lengths).long()
        weights, labels = self.weights[rows].to(device), batch.satisfaction.to(device)
        # Entry i speaks of token i + 1: from the last token of the prompt on, whose R is E_p[C | prompt].
        spoken = (places >= prompts - 2) & (places < lengths - 1)
        states = auxiliary.states(ids, mask)
        # R of each prefix x_<=i, where something was said of its last token
        prefix = torch.zeros_like(ids, dtype=torch.float32)
        prefix = prefix.masked_scatter(spoken.roll(1, dims=1), auxiliary.of_next(states, ids, spoken))
        has_prefix = spoken.roll(1, dims=1) & auxiliary.bound.covers(ids)
        share = (weights[:, None] * has_prefix).sum().clamp(min=1e-6)
        label = labels[:, None].expand_as(prefix)
        bce = (weights[:, None] * bernoulli_cross_entropy(label, prefix))[has_prefix].sum() / share
        constant = torch.full_like(label, math.log(min(max(self.mean, 1e-6), 1 - 1e-6)))
        prior_bce = (weights[:, None] * bernoulli_cross_entropy(label, constant))[has_prefix].sum() / share
        zero = torch.zeros((), device=device)
        if consistent == 0:
            return _Terms(bce, prior_bce, zero, zero * torch.nan)
        asked = has_prefix & (places >= prompts - 1) & (places < lengths - 1)
        asked[consistent:] = False
        if not bool(asked.any()):  # prompts of one token and continuations of one token
            return _Terms(bce, prior_bce, zero, zero)
        summed = (self._base_log_probs(ids, mask, asked) + auxiliary.of_all(states, ids, asked)).logsumexp(dim=-1)
        known, weight = prefix[asked], weights[:, None].expand_as(prefix)[asked]
        total = weight.sum().clamp(min=1e-6)
        consistency = (weight * bernoulli_kl(summed, known)).sum() / total
        gap = (weight * (summed.exp() - known.exp()).abs()).sum() / total
        return _Terms(bce, prior_bce, consistency, gap)

    @torch.no_grad()
    def _base_log_probs(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Log p of the base at some positions, float32 [m, vocab]; reads only what they need."""
        rows = positions.any(dim=1).nonzero()[:, 0]
        columns = positions.any(dim=0).nonzero()[:, 0]
        first, stop = int(columns[0]), int(columns[-1]) + 1
        options = {"logits_to_keep": stop - first} if self._trims else {}
        logits = self.base(
            input_ids=ids[rows, :stop], attention_mask=mask[rows, :stop], use_cache=False, **options
        ).logits[:, first - stop :]
        log_probs: Tensor = logits[positions[rows, first:stop]].float().log_softmax(dim=-1)
        return log_probs

    @torch.no_grad()
    def measure(self, rows: Tensor) -> dict[str, float]:
        """Held-out figures of `train_auxiliary`, on some samples."""
        sums, total = np.zeros(3), 0.0
        for part in torch.split(rows, self.config.batch_size):
            terms = self.terms(part, len(part) if self.config.consistency_weight > 0 else 0)
            tokens = self.samples.lengths[part] - self.samples.prompt_lengths[part]
            share = float((self.weights[part] * tokens).sum())
            sums += share * np.array([float(terms.bce), float(terms.prior_bce), float(terms.gap)])
            total += share
        bce, prior_bce, gap = (sums / max(total, 1e-6)).tolist()
        return {"held_out_bce": bce, "prior_bce": prior_bce, "consistency_gap": gap}


def normalised_weights(log_weights: Tensor) -> Tensor:
    """exp(log_weights), scaled to mean 1; float32 [n]."""
    scaled = (log_weights.double() - log_weights.double().max()).exp()
    return (scaled / scaled.mean()).float()


def bernoulli_cross_entropy(labels: Tensor, log_r: Tensor) -> Tensor:
    """-C log R - (1 - C) log(1 - R), elementwise, nats; labels C in [0, 1], log R at most 0."""
    log_r = log_r.clamp(max=_CLOSEST)
    return -labels * log_r - (1.0 - labels) * log_one_minus_exp(log_r)


def bernoulli_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL between Bernoulli distributions of probabilities exp(log_a) and exp(log_b), elementwise, nats."""
    log_a, log_b = log_a.clamp(max=_CLOSEST), log_b.clamp(max=_CLOSEST)
    a = log_a.exp()
    return a * (log_a - log_b) + (1.0 - a) * (log_one_minus_exp(log_a) - log_one_minus_exp(log_b))


def log_one_minus_exp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, precise at both ends (Mächler 2012)."""
    near = values > -math.log(2.0)
    # each branch gets an argument that is harmless where it is not taken, so that no gradient is nan
    small = torch.where(near, values, -1.0)
    large = torch.where(near, -1.0, values)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def _held_out(samples: SampleSet, config: AuxiliaryTrainingConfig) -> Tensor:
    """Bool [n]; samples of one prompt stay together where there are at least ten prompts."""
    rng = np.random.default_rng([config.seed, 41])
    prompts = [
        tuple(ids[:length])
        for ids, length in zip(samples.input_ids.tolist(), samples.prompt_lengths.tolist(), strict=True)
    ]
    groups = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    numbers = np.array([groups[prompt] for prompt in prompts]) if len(groups) >= 10 else np.arange(len(prompts))
    count = int(numbers.max()) + 1
    chosen = rng.permutation(count)[: int(config.held_out_share * count)]
    return torch.from_numpy(np.isin(numbers, chosen))
