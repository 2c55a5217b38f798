"""A world small enough to count: R, q and KL against sums over all continuations; convergence of the learned R."""

import math

import pytest
import torch
from small_world import LENGTH, PROMPT, SIZE, WORLD_VOCABULARY, make_world, relative_entropy, softened
from tiny_calibrators import make_calibrator

from calibfuse.calibrator import Calibrator
from calibfuse.finetune.tuning import constrained_kl, constrained_log_probs
from calibfuse.fusion import FusionConfig
from calibfuse.processor import CalibFusion
from calibfuse.value.auxiliary import make_auxiliary_model
from calibfuse.value.auxiliary_training import AuxiliaryTrainingConfig, train_auxiliary
from calibfuse.value.samples import SampleSet


@pytest.fixture(scope="module", params=["hard", "soft"])
def world(request, tiny_llama):
    return make_world(softened(tiny_llama(SIZE, seed=3, eos_token_id=None)), soft=request.param == "soft")


@pytest.fixture(scope="module")
def hard_world(tiny_llama):
    return make_world(softened(tiny_llama(SIZE, seed=3, eos_token_id=None)), soft=False)


def exact_q(world):
    """q of all continuations, token by token from the exact R."""
    total = torch.zeros_like(world.joint)
    for count in range(LENGTH):
        log_q = constrained_log_probs(world.next_probabilities(count).log(), world.r(count + 1).log())
        total = total + log_q.nan_to_num(nan=-torch.inf).view([SIZE] * (count + 1) + [1] * (LENGTH - count - 1))
    return total.exp()


def test_the_world_is_a_distribution_with_something_to_constrain(world):
    assert float(world.joint.sum()) == pytest.approx(1.0, abs=1e-6)
    assert 0.2 < world.expectation(world.joint) < 0.9


def test_exact_r_is_forward_consistent(world):
    for count in range(LENGTH):
        summed = (world.next_probabilities(count) * world.r(count + 1)).sum(-1)
        torch.testing.assert_close(summed, world.r(count))


def test_q_by_tokens_is_the_tilted_base(world):
    tilted = world.joint * world.constraint
    torch.testing.assert_close(exact_q(world), tilted / tilted.sum(), atol=1e-12, rtol=1e-6)


def test_q_satisfies_the_constraint_as_far_as_it_can(world):
    """Hard C: E_q[C] = 1. Soft C: E_q[C] = E_p[C^2] / E_p[C], which is 1 for a hard one."""
    p, c = world.joint, world.constraint
    expected = float((p * c**2).sum() / (p * c).sum())
    assert world.expectation(exact_q(world)) == pytest.approx(expected, abs=1e-9)
    if bool(((c == 0) | (c == 1)).all()):
        assert expected == pytest.approx(1.0)
    assert expected > world.expectation(p)


def test_the_token_wise_kl_sums_to_that_of_sequences(world):
    """Chain rule: KL(q || p) = sum of E_q[KL of next-token distributions]; for a hard C it is -log E_p[C]."""
    q = exact_q(world)
    total = 0.0
    for count in range(LENGTH):
        log_p = world.next_probabilities(count).log()
        kl = constrained_kl(constrained_log_probs(log_p, world.r(count + 1).log()), log_p)
        prefix = q.sum(tuple(range(count, LENGTH)))
        total += float((prefix * kl.nan_to_num()).sum())  # a prefix that q excludes has no next token
    assert total == pytest.approx(relative_entropy(q, world.joint), abs=1e-9)
    if bool(((world.constraint == 0) | (world.constraint == 1)).all()):
        assert total == pytest.approx(-math.log(world.expectation(world.joint)), abs=1e-9)


def errors(auxiliary, world):
    """Mean |R^ - R| over next tokens, by length of the prefix, weighted by the base's probabilities."""
    with torch.no_grad():
        log_r = auxiliary(world.sequences[:, :-1])
    found = []
    for count in range(1, LENGTH + 1):
        prefix = world.joint.sum(tuple(range(count, LENGTH))) if count < LENGTH else world.joint
        place = len(PROMPT) + count - 2
        every = SIZE ** (LENGTH - count + 1)
        learned = log_r[::every, place].exp().double().reshape([SIZE] * count)
        found.append(float((prefix * (learned - world.r(count)).abs()).sum()))
    return found


def fresh_auxiliary(world):
    """Its body is random and frozen: what the head learns is how to read 1,111 prefixes from it."""
    calibrator = make_calibrator(words={}, token_width=12, width=64, adapter_width=64)
    return make_auxiliary_model(world.base, WORLD_VOCABULARY, seed=0, calibrator=calibrator)


@pytest.mark.parametrize("soft", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_auxiliary_model_converges_to_the_enumerated_r(tiny_llama, soft):
    """From 6,000 drawn continuations; the tolerance of 0.17 is on the mean of |R^ - R| under the base."""
    world = make_world(softened(tiny_llama(SIZE, seed=3, eos_token_id=None)), soft=soft)
    auxiliary = fresh_auxiliary(world)
    auxiliary.set_prior(world.expectation(world.joint))
    before = errors(auxiliary, world)
    config = AuxiliaryTrainingConfig(steps=150, batch_size=128, learning_rate=2e-2, held_out_share=0.0)
    figures = train_auxiliary(auxiliary, world.base, drawn(world, 6000), config, show_progress=False)
    after = errors(auxiliary, world)
    print(_row("soft C" if soft else "hard C", before, after, figures))
    assert max(after) < 0.17, (before, after)
    assert sum(after) < 0.45 * sum(before), (before, after)
    assert figures["consistency_gap"] < 0.05

    def next_log_probs(ids):
        return constrained_log_probs(world.base(input_ids=ids).logits.float().log_softmax(-1), auxiliary(ids))

    p, c = world.joint, world.constraint
    best = float((p * c**2).sum() / (p * c).sum())
    reached = world.expectation(world.joint_of(next_log_probs))
    assert world.expectation(p) + 0.8 * (best - world.expectation(p)) < reached < best + 0.02


def _row(name, before, after, figures):
    """A line of the table in docs/guides/value-guide.md (`pytest -s`)."""
    errors_before, errors_after = (", ".join(f"{each:.3f}" for each in row) for row in (before, after))
    gap, bce = figures["consistency_gap"], figures["held_out_bce"]
    return f"\n{name}: |R^ - R| {errors_before} -> {errors_after}; gap {gap:.4f}; BCE {bce:.4f}"


def drawn(world, count, seed=0):
    """Continuations drawn from the base: rows of `samples` without weights."""
    rows = torch.multinomial(world.joint.flatten(), count, replacement=True, generator=_generator(seed))
    every = world.samples()
    return SampleSet(
        every.input_ids[rows],
        lengths=every.lengths[rows],
        prompt_lengths=every.prompt_lengths[rows],
        log_weights=torch.zeros(count),
        satisfaction=every.satisfaction[rows],
    )


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def test_weights_stand_for_the_base(hard_world):
    """Uniform draws, weighted by p: the same R as without the detour, but for the noise of fewer effective samples."""
    world = hard_world
    rows = torch.randperm(SIZE**LENGTH, generator=_generator(1))[:5000]
    auxiliary = fresh_auxiliary(world)
    config = AuxiliaryTrainingConfig(steps=120, batch_size=128, learning_rate=2e-2, held_out_share=0.0)
    figures = train_auxiliary(auxiliary, world.base, world.samples().rows(rows), config, show_progress=False)
    assert figures["effective_samples"] < 0.8 * len(rows)
    assert figures["mean_satisfaction"] == pytest.approx(world.expectation(world.joint), abs=0.1)
    assert max(errors(auxiliary, world)) < 0.2


def test_decoding_with_the_trained_guide_is_q(hard_world, tmp_path):
    world = hard_world
    auxiliary = fresh_auxiliary(world)
    config = AuxiliaryTrainingConfig(steps=20, batch_size=100, learning_rate=3e-3, held_out_share=0.0)
    train_auxiliary(auxiliary, world.base, drawn(world, 1000), config, show_progress=False)
    auxiliary.save_pretrained(tmp_path)
    guide = Calibrator.from_pretrained(tmp_path).bind(WORLD_VOCABULARY, use_disk_cache=False)
    ids = world.sequences[::97]
    with torch.no_grad():
        logits = world.base(input_ids=ids).logits
        log_r = auxiliary(ids)
    for alpha in (1.0, 2.5):
        fusion = CalibFusion(guide, FusionConfig(mode="value", alpha=alpha, candidates=0, max_shift=math.inf))
        fused = fusion.fuse_logits(ids, logits)
        # the begin mark has no R of its own: it keeps its probability, and the others share the rest
        text = slice(1, None)
        expected = constrained_log_probs(logits[..., text].log_softmax(-1), alpha * log_r[..., text])
        rest = torch.log1p(-logits.softmax(-1)[..., :1])
        torch.testing.assert_close(fused[..., text], expected + rest, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fused[..., 0], logits.log_softmax(-1)[..., 0], atol=1e-5, rtol=1e-5)
