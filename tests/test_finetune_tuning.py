"""One iteration of tuning: weight 0 is plain fine-tuning to the bit; the KL draws the model to q; state goes on."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from calibfuse.errors import InputError
from calibfuse.finetune.corpus import PackedCorpus
from calibfuse.finetune.tuning import Constraint, TuningConfig, tune, tuning_optimizer
from calibfuse.training.loop import load_optimizer, optimizer_tensors
from calibfuse.value.samples import SampleSet

VOCABULARY = 40
CONFIG = TuningConfig(steps=4, batch_size=2, sample_batch_size=3, learning_rate=1e-2, kl_weight=0.0, seed=5)


class ForbiddenToken(torch.nn.Module):
    """R of the constraint "token 7 must not occur": nearly 0 for it, 1 for every other."""

    def forward(self, input_ids, attention_mask=None):
        log_r = torch.zeros(*input_ids.shape, VOCABULARY)
        log_r[..., 7] = -10.0
        return log_r


@pytest.fixture
def corpus():
    blocks = torch.randint(8, VOCABULARY, (9, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return PackedCorpus(blocks, blocks[:0], 9)


@pytest.fixture
def constraint(tiny_llama):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (7, 10), generator=generator)
    lengths = torch.tensor([10, 8, 10, 6, 9, 10, 7])
    zeros = torch.zeros(7)
    samples = SampleSet(ids, lengths, torch.full((7,), 3), zeros, zeros)
    return Constraint(tiny_llama(VOCABULARY), ForbiddenToken(), samples)


def run(model, corpus, config, iterations=1, constraint=None):
    optimizer = tuning_optimizer(model, config)
    figures = [
        tune(model, optimizer, corpus, config, iteration=number, iterations=iterations, constraint=constraint)
        for number in range(1, iterations + 1)
    ]
    return model.state_dict(), figures


def assert_equal(one, other):
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weight_zero_equals_a_plain_loop(tiny_llama, corpus):
    """Written out: AdamW, linear rise and fall, clipped gradients, blocks in the corpus's order."""
    model = tiny_llama(VOCABULARY).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    epochs = (np.random.default_rng([5, 21, epoch]).permutation(len(corpus.train)) for epoch in range(16))
    order = (row for epoch in epochs for row in epoch.tolist())
    for step in range(8):
        ids = torch.stack([corpus.train[next(order)] for _ in range(2)]).long()
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, step + 1, (8 - step) / 7)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    state, _ = run(tiny_llama(VOCABULARY), corpus, replace(CONFIG, warmup=0.0), iterations=2)
    assert_equal(state, model.state_dict())


def test_weight_zero_does_not_look_at_the_samples(tiny_gpt2, corpus, constraint):
    """With dropout: the KL term must not even draw random numbers."""
    plain, _ = run(tiny_gpt2(VOCABULARY), corpus, CONFIG)
    broken = Constraint(constraint.base, None, constraint.samples)
    with_constraint, figures = run(tiny_gpt2(VOCABULARY), corpus, CONFIG, constraint=broken)
    assert_equal(plain, with_constraint)
    assert math.isnan(figures[0]["kl_nats"])


def test_seed_decides_everything(tiny_gpt2, corpus, constraint):
    config = replace(CONFIG, kl_weight=1.0)
    one, _ = run(tiny_gpt2(VOCABULARY), corpus, config, constraint=constraint)
    torch.rand(3)
    same, _ = run(tiny_gpt2(VOCABULARY), corpus, config, constraint=constraint)
    assert_equal(one, same)
    other, _ = run(tiny_gpt2(VOCABULARY), corpus, replace(config, seed=6), constraint=constraint)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_optimizer_state_goes_on_from_a_file(tiny_llama, corpus):
    whole, _ = run(tiny_llama(VOCABULARY), corpus, CONFIG, iterations=2)
    model = tiny_llama(VOCABULARY)
    optimizer = tuning_optimizer(model, CONFIG)
    tune(model, optimizer, corpus, CONFIG, iteration=1, iterations=2)
    tensors = {
        name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, dict(model.named_parameters())).items()
    }
    again = tiny_llama(VOCABULARY)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = tuning_optimizer(again, CONFIG)
    load_optimizer(resumed, dict(again.named_parameters()), tensors)
    tune(again, resumed, corpus, CONFIG, iteration=2, iterations=2)
    assert_equal(whole, again.state_dict())
    with pytest.raises(InputError, match="belongs to another model: it has nowhere"):
        load_optimizer(resumed, dict(again.named_parameters()), {"nowhere|exp_avg": torch.zeros(1)})


def test_kl_draws_the_model_to_the_constrained_distribution(tiny_llama, corpus, constraint):
    """The forbidden token has to lose its probability on the samples; the KL against enumerated q falls."""
    config = replace(CONFIG, steps=60, kl_weight=20.0, learning_rate=3e-3)
    model = tiny_llama(VOCABULARY)
    before = _forbidden_share(model, constraint)
    _, figures = run(model, corpus, config, constraint=constraint)
    assert figures[0]["kl_nats"] < 0.5 * figures[0]["first_kl_nats"]
    assert _forbidden_share(model, constraint) < 0.5 * before
    assert figures[0]["sample_tokens"] > 0
    assert figures[0]["corpus_tokens"] == 60 * 2 * 11


def test_without_a_constraint_by_r_the_kl_starts_at_zero(tiny_llama, corpus, constraint):
    """R = 1 everywhere: q is the base, which the model is at first."""
    silent = Constraint(constraint.base, _Ones(), constraint.samples)
    config = replace(CONFIG, steps=1, kl_weight=1.0)
    _, figures = run(tiny_llama(VOCABULARY), corpus, config, constraint=silent)
    assert figures[0]["kl_nats"] == pytest.approx(0.0, abs=1e-5)


class _Ones(torch.nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return torch.zeros(*input_ids.shape, VOCABULARY)


@torch.no_grad()
def _forbidden_share(model, constraint):
    return float(model(constraint.samples.input_ids).logits[:, 2:].softmax(-1)[..., 7].mean())


def test_divergence_is_an_error_with_a_cure(tiny_llama, corpus):
    model = tiny_llama(VOCABULARY)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(InputError, match="corpus loss became nan at optimiser step 1: .* lower learning rate"):
        run(model, corpus, CONFIG)


def test_a_corpus_shorter_than_one_batch_is_refused(tiny_llama, corpus):
    with pytest.raises(InputError, match="9 blocks of 12 tokens, fewer than one batch of 10"):
        run(tiny_llama(VOCABULARY), corpus, replace(CONFIG, batch_size=10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"kl_weight": -1.0}, "kl_weight must be at least 0"),
        ({"kl_weight": math.nan}, "kl_weight must be"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"strength": 0.0}, "strength must be above 0"),
        ({"warmup": 2.0}, "warmup must be at least 0 and at most 1"),
        ({"precision": "fp8"}, "precision must be"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        TuningConfig(**options)


def test_rate_rises_and_falls_over_all_iterations():
    config = TuningConfig(steps=50, warmup=0.1, learning_rate=1.0)
    rates = [config.rate_at(step, 2) for step in range(100)]
    assert max(rates) == rates[10] == 1.0
    assert rates[0] == pytest.approx(0.1)
    assert rates[99] == pytest.approx(1 / 90)
    assert all(later <= earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))
