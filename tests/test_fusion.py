"""The arithmetic of the fusion against slow loops, numbers worked by hand, and what must never change."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibfuse.candidates import MIN_CANDIDATES, MIN_PROBABILITY
from calibfuse.errors import InputError
from calibfuse.fusion import MODES, FusionConfig, fuse

NEG = -math.inf
MODE_NAMES = [name for name, mode in MODES.items() if mode.fuse is not None]  # the others fuse hidden states


class StubGuide:
    """Fixed scores per head; the ids beyond its width, and those listed, are not covered."""

    def __init__(self, heads, covered):
        self.heads = heads
        self.covered = covered
        self.asked = []

    def scores(self, head, token_ids):
        self.asked.append((head, token_ids))
        full = self.heads[head]
        if token_ids is None:
            return full
        width = full.shape[-1]
        return full.gather(-1, token_ids.clamp(max=width - 1))

    def pick(self, heads, places, token_ids):
        return {head: self.heads[head][places, token_ids] for head in heads}

    def covers(self, token_ids):
        inside = token_ids < len(self.covered)
        return inside & self.covered[token_ids.clamp(max=len(self.covered) - 1)]


def random_case(seed, rows=3, vocab=40, *, uncovered=5, excluded=6, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocab, generator=generator) * scale
    heads = {
        head: torch.randn(rows, vocab, generator=generator) * scale for head in ("calibrator", "reference", "value")
    }
    heads["value"] = torch.nn.functional.logsigmoid(heads["value"])  # log R, at most 0
    covered = torch.ones(vocab, dtype=torch.bool)
    covered[torch.randperm(vocab, generator=generator)[:uncovered]] = False
    for row in range(rows):
        scores[row, torch.randperm(vocab, generator=generator)[:excluded]] = NEG
    return scores, StubGuide(heads, covered)


def run(scores, guide, config):
    return fuse(scores, guide.scores, guide.covers, config)


def log_sum_exp(values):
    top = max(values)
    return NEG if top == NEG else top + math.log(sum(math.exp(value - top) for value in values))


def slow_row(scores, heads, covered, config):
    """One row in plain Python: the definitions of fusion.py, token by token."""
    total = log_sum_exp(scores)
    log_probs = [score - total for score in scores]
    order = sorted(range(len(scores)), key=lambda i: -log_probs[i])
    if config.candidates is None:
        candidates = [i for n, i in enumerate(order) if n < MIN_CANDIDATES or log_probs[i] >= math.log(MIN_PROBABILITY)]
    else:
        candidates = order[: config.candidates] if config.candidates else order
    chosen = [i for i in candidates if covered[i] and log_probs[i] > NEG]
    if not chosen or config.alpha == 0:
        return log_probs
    mass = log_sum_exp([log_probs[i] for i in chosen])
    target = {i: log_probs[i] - mass for i in chosen}
    guide = {}
    for head, values in heads.items():
        constant = log_sum_exp([values[i] for i in chosen])
        guide[head] = {i: values[i] - constant for i in chosen}
    a, fused = config.alpha, {}
    if config.mode == "contrast" and config.value_weight:
        prefix = log_sum_exp([target[j] + heads["value"][j] for j in chosen])
        worth = {i: a * config.value_weight * (heads["value"][i] - prefix) for i in chosen}
        target = {i: target[i] + min(max(worth[i], -0.65), 0.5) for i in chosen}
        constant = log_sum_exp(list(target.values()))
        target = {i: value - constant for i, value in target.items()}
    for i in chosen:
        if config.mode == "contrast":
            gap = guide["calibrator"][i] - guide["reference"][i]
            size = max(abs(gap) - config.margin, 0.0)
            if config.value_weight:
                odds = math.exp(heads["value"][i]) / -math.expm1(heads["value"][i])
                share = 1 / (1 + (odds * config.harm_threshold / (1 - config.harm_threshold)) ** 4)
                size -= min(size * (1 - share), config.max_excused)
            shift = a * math.copysign(size, gap)
            upper = 0.0 if config.one_sided else config.max_shift
            fused[i] = target[i] + min(max(shift, -config.max_shift), upper)
        elif config.mode == "geometric":
            fused[i] = (1 - a) * target[i] + a * guide["calibrator"][i]
        elif config.mode == "blend":
            fused[i] = math.log((1 - a) * math.exp(target[i]) + a * math.exp(guide["calibrator"][i]))
        else:
            prefix = log_sum_exp([target[j] + heads["value"][j] for j in chosen])
            fused[i] = target[i] + min(max(a * (heads["value"][i] - prefix), -config.max_shift), config.max_shift)
    if config.mass_to_others and config.one_sided and config.mode == "contrast":
        fused = slow_hold(target, fused)
    constant = log_sum_exp(list(fused.values()))
    return [mass + fused[i] - constant if i in fused else log_probs[i] for i in range(len(scores))]


def slow_hold(target, lowered):
    """By bisection."""
    penalty = {i: min(math.expm1(target[i] - lowered[i]), 1e18) for i in target}
    low, high = 1e-3, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if sum(math.exp(target[i]) / (middle + penalty[i]) for i in target) > 1:
            low = middle
        else:
            high = middle
    return {i: target[i] - math.log(high + penalty[i]) for i in target}


configs = st.sampled_from(MODE_NAMES).flatmap(
    lambda mode: st.builds(
        FusionConfig,
        mode=st.just(mode),
        alpha=st.floats(0, min(MODES[mode].max_alpha, 5.0)),
        candidates=st.sampled_from([None, 0, 1, 2, 7, 39, 40, 41, 500]),
        one_sided=st.booleans(),
        margin=st.sampled_from([0.0, 0.1, 2.0]),
        max_shift=st.sampled_from([0.5, 10.0, 40.0]),
        mass_to_others=st.booleans(),
        value_weight=st.sampled_from([0.0, 0.4]),
        harm_threshold=st.sampled_from([0.5, 0.88]),
        max_excused=st.sampled_from([0.0, 0.7, 10.0]),
    )
)


@settings(max_examples=150, deadline=None)
@given(config=configs, seed=st.integers(0, 10_000))
def test_every_mode_equals_the_slow_loop(config, seed):
    scores, guide = random_case(seed)
    result = run(scores, guide, config)
    heads = {name: values.double() for name, values in guide.heads.items()}
    expected = [
        slow_row(
            scores[row].double().tolist(),
            {name: values[row].tolist() for name, values in heads.items()},
            guide.covered.tolist(),
            config,
        )
        for row in range(len(scores))
    ]
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float32), atol=2e-4, rtol=1e-5)


def one_row(target, **heads):
    """A row of given probabilities, everything covered."""
    full = {name: torch.tensor([values]).log() for name, values in heads.items()}
    return torch.tensor([target]).log(), StubGuide(full, torch.ones(len(target), dtype=torch.bool))


def test_contrast_worked_by_hand():
    """Two candidates of three: .5 and .3 hold mass .8; the tail .2 stays.

    Inside: .625 and .375. The guide's heads over the two: calibrator .2/.6 and .4/.6, reference .5 and .5 (.3, .3).
    Shifts log(2/3), log(4/3); one-sided with alpha 2: (2/3)**2 = 4/9 and 1. So .625 * 4/9 = .27778 and .375, sum
    .65278; back to mass .8: .34043 and .45957.
    """
    scores, guide = one_row([0.5, 0.3, 0.2], calibrator=[0.2, 0.4, 0.4], reference=[0.3, 0.3, 0.4])
    result = run(scores, guide, FusionConfig(alpha=2.0, candidates=2)).exp()
    torch.testing.assert_close(result, torch.tensor([[0.34043, 0.45957, 0.2]]), atol=1e-5, rtol=0)


def test_two_sided_contrast_worked_by_hand():
    """As above with both signs: .625 * 4/9 = .27778 and .375 * 16/9 = .66667; of .8: .23529 and .56471."""
    scores, guide = one_row([0.5, 0.3, 0.2], calibrator=[0.2, 0.4, 0.4], reference=[0.3, 0.3, 0.4])
    result = run(scores, guide, FusionConfig(alpha=2.0, candidates=2, one_sided=False)).exp()
    torch.testing.assert_close(result, torch.tensor([[0.23529, 0.56471, 0.2]]), atol=1e-5, rtol=0)


def test_blend_worked_by_hand():
    """Alpha .25 of [.1, .9] into [.6, .4]: .75 * .6 + .25 * .1 = .475 and .525."""
    scores, guide = one_row([0.6, 0.4], calibrator=[0.1, 0.9])
    result = run(scores, guide, FusionConfig(mode="blend", alpha=0.25)).exp()
    torch.testing.assert_close(result, torch.tensor([[0.475, 0.525]]), atol=1e-6, rtol=0)


def test_geometric_worked_by_hand():
    """Square roots: sqrt(.8 * .2) = .4 and sqrt(.2 * .8) = .4: a draw."""
    scores, guide = one_row([0.8, 0.2], calibrator=[0.2, 0.8])
    result = run(scores, guide, FusionConfig(mode="geometric", alpha=0.5)).exp()
    torch.testing.assert_close(result, torch.tensor([[0.5, 0.5]]), atol=1e-6, rtol=0)


def test_value_worked_by_hand():
    """Weights R = (1, .5) on (.5, .5): .5 and .25, normalised 2/3 and 1/3."""
    scores, guide = one_row([0.5, 0.5], value=[1.0, 0.5])
    result = run(scores, guide, FusionConfig(mode="value", alpha=1.0)).exp()
    torch.testing.assert_close(result, torch.tensor([[2 / 3, 1 / 3]]), atol=1e-6, rtol=0)


def test_without_truncation_the_modes_are_the_textbook_formulas():
    scores, guide = random_case(1, uncovered=0, excluded=0)
    t, c, r = (x.log_softmax(-1) for x in (scores, guide.heads["calibrator"], guide.heads["reference"]))
    a = 0.5
    expected = {
        "contrast": (t + a * (c - r)).log_softmax(-1),
        "geometric": ((1 - a) * t + a * c).log_softmax(-1),
        "blend": ((1 - a) * t.exp() + a * c.exp()).log(),
        "value": (t + a * guide.heads["value"]).log_softmax(-1),
    }
    for mode, textbook in expected.items():
        config = FusionConfig(mode=mode, alpha=a, candidates=0, one_sided=False, max_shift=math.inf)
        torch.testing.assert_close(run(scores, guide, config), textbook, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["geometric", "blend"])
def test_the_ends_of_alpha_are_target_and_guide(mode, alpha):
    scores, guide = random_case(2, uncovered=0, excluded=0)
    result = run(scores, guide, FusionConfig(mode=mode, alpha=alpha, candidates=0))
    expected = (guide.heads["calibrator"] if alpha else scores).log_softmax(-1)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("candidates", [0, 10])
@pytest.mark.parametrize("mode", MODE_NAMES)
class TestInvariants:
    """Whatever the mode, with and without truncation."""

    @pytest.fixture
    def config(self, mode, candidates):
        return FusionConfig(mode=mode, alpha=0.7, candidates=candidates)

    def test_alpha_zero_gives_the_target(self, config, mode, candidates):
        scores, guide = random_case(3)
        result = run(scores, guide, FusionConfig(mode=mode, alpha=0.0, candidates=candidates))
        assert torch.equal(result, scores.log_softmax(-1))
        assert guide.asked == []

    def test_results_are_normalised_log_probabilities(self, config):
        scores, guide = random_case(4)
        result = run(scores, guide, config)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.logsumexp(-1), torch.zeros(3), atol=1e-5, rtol=0)
        assert not result.isnan().any()

    def test_excluded_tokens_stay_excluded_and_no_others_are(self, config):
        scores, guide = random_case(5)
        assert torch.equal(run(scores, guide, config) == NEG, scores == NEG)

    def test_scores_are_not_written_to(self, config):
        scores, guide = random_case(6)
        before, heads = scores.clone(), {name: values.clone() for name, values in guide.heads.items()}
        run(scores, guide, config)
        assert torch.equal(scores, before)
        assert all(torch.equal(guide.heads[name], values) for name, values in heads.items())

    def test_a_constant_per_row_changes_nothing(self, config):
        scores, guide = random_case(7)
        expected = run(scores, guide, config)
        shifted = StubGuide({**guide.heads}, guide.covered)
        for head in ("calibrator", "reference"):
            shifted.heads[head] = guide.heads[head] + torch.tensor([[3.0], [-8.0], [0.5]])
        result = run(scores + torch.tensor([[-20.0], [4.0], [100.0]]), shifted, config)
        torch.testing.assert_close(result, expected, atol=5e-5, rtol=1e-5)

    def test_permuted_rows_permute_the_result(self, config):
        scores, guide = random_case(8)
        order = torch.tensor([2, 0, 1])
        permuted = StubGuide({name: values[order] for name, values in guide.heads.items()}, guide.covered)
        assert torch.equal(run(scores[order], permuted, config), run(scores, guide, config)[order])

    def test_uncovered_tokens_keep_their_log_probability_exactly(self, config):
        scores, guide = random_case(9, uncovered=15)
        result, target = run(scores, guide, config), scores.log_softmax(-1)
        assert torch.equal(result[:, ~guide.covered], target[:, ~guide.covered])

    def test_nothing_covered_changes_nothing(self, config):
        scores, guide = random_case(10, uncovered=40)
        assert torch.equal(run(scores, guide, config), scores.log_softmax(-1))

    def test_leading_axes_are_free(self, config):
        scores, guide = random_case(11, rows=6)
        expected = run(scores, guide, config)
        shaped = StubGuide({name: values.view(2, 3, 40) for name, values in guide.heads.items()}, guide.covered)
        torch.testing.assert_close(run(scores.view(2, 3, 40), shaped, config), expected.view(2, 3, 40))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions_of_scores(self, config, dtype):
        scores, guide = random_case(12)
        rounded = scores.to(dtype)
        result = run(rounded, guide, config)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, run(rounded.float(), guide, config))

    def test_one_token_left_to_choose(self, config):
        scores, guide = random_case(13)
        scores[0] = NEG
        scores[0, 17] = 2.0
        result = run(scores, guide, config)
        assert result[0, 17] == 0
        assert (result[0] == NEG).sum() == 39

    def test_extreme_scores_stay_finite(self, config):
        scores, guide = random_case(14)
        scores[0, 3], scores[1, 5] = 1e30, -1e30
        for head in guide.heads.values():
            head[2, 7] = -1e4
        result = run(scores, guide, config)
        assert not result.isnan().any()
        torch.testing.assert_close(result.logsumexp(-1), torch.zeros(3), atol=1e-5, rtol=0)

    def test_one_vector_without_rows(self, config):
        scores, guide = random_case(15)
        flat = StubGuide({name: values[0] for name, values in guide.heads.items()}, guide.covered)
        torch.testing.assert_close(run(scores[0], flat, config), run(scores, guide, config)[0])


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_the_tail_keeps_its_log_probabilities_and_the_candidates_their_mass(mode):
    scores, guide = random_case(16, uncovered=0, excluded=0)
    target, result = scores.log_softmax(-1), run(scores, guide, FusionConfig(mode=mode, alpha=0.9, candidates=8))
    index = target.topk(8).indices
    tail = torch.ones_like(target, dtype=torch.bool).scatter(-1, index, False)
    assert torch.equal(result[tail], target[tail])
    torch.testing.assert_close(result.gather(-1, index).logsumexp(-1), target.gather(-1, index).logsumexp(-1))


def test_only_needed_heads_are_asked_and_for_candidates_only():
    scores, guide = random_case(17)
    run(scores, guide, FusionConfig(mode="geometric", alpha=0.5, candidates=6))
    ((head, token_ids),) = guide.asked
    assert head == "calibrator"
    assert token_ids.shape == (3, 6)
    guide.asked.clear()
    run(scores, guide, FusionConfig(candidates=0))
    assert guide.asked == [("calibrator", None), ("reference", None)]
    guide.asked.clear()
    run(scores, guide, FusionConfig(candidates=0, value_weight=0.4))
    assert guide.asked == [("calibrator", None), ("reference", None), ("value", None)]


def test_a_word_costs_less_where_the_value_head_takes_the_text_for_harmless():
    """Of two tokens that the calibrator dislikes alike, one leaves the text harmless (R .98) and one does not (.02)."""
    scores, guide = one_row(
        [0.2, 0.2, 0.6], calibrator=[0.1, 0.1, 0.8], reference=[0.3, 0.3, 0.4], value=[0.98, 0.02, 0.98]
    )
    lowered = run(scores, guide, FusionConfig(candidates=0)) - scores
    read = run(scores, guide, FusionConfig(candidates=0, value_weight=1e-6)) - scores
    assert lowered[0, 0] == lowered[0, 1] < -0.5
    assert read[0, 0] > -0.1
    assert read[0, 1] < -0.5


def test_the_value_head_excuses_no_more_than_it_may():
    scores, guide = one_row([0.4, 0.6], calibrator=[0.001, 0.999], reference=[0.5, 0.5], value=[0.98, 0.98])
    lost = [
        (scores - run(scores, guide, FusionConfig(candidates=0, value_weight=1e-6, max_excused=limit)))[0, 0]
        for limit in (10.0, 4.0, 0.0)
    ]
    assert lost[0] < 0.1
    assert lost[1] > 1.0
    assert lost[2] > lost[1] + 2.0


def test_the_value_head_lowers_what_both_other_heads_find_harmless():
    scores, guide = one_row([0.2, 0.8], calibrator=[0.5, 0.5], reference=[0.5, 0.5], value=[0.1, 0.9])
    lost = scores - run(scores, guide, FusionConfig(candidates=0, value_weight=1.0))
    assert 0.5 < lost[0, 0] < 0.85  # 0.65 and the renormalisation: one token is not halved by this head alone
    torch.testing.assert_close(run(scores, guide, FusionConfig(candidates=0)), scores)


@pytest.mark.parametrize("candidates", [0, None])
def test_a_protected_name_never_gains_from_the_word_beside_it(candidates):
    scores, guide = one_row([0.1, 0.6, 0.3], calibrator=[0.3, 0.4, 0.3], reference=[0.1, 0.8, 0.1])
    protected = torch.tensor([True, False, False])
    config = FusionConfig(candidates=candidates, alpha=3.0, mass_to_others=True)
    free, capped = (fuse(scores, guide.scores, guide.covers, config, protected=each) for each in (None, protected))
    assert free[0, 0] > scores[0, 0] + 0.3
    torch.testing.assert_close(capped[0, 0], scores[0, 0])
    torch.testing.assert_close(capped.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(capped[0, 2] - capped[0, 1], free[0, 2] - free[0, 1])


def test_one_sided_contrast_raises_nothing_before_renormalisation():
    """Ratios: a token that the calibrator likes better than the reference keeps its odds against another such token."""
    scores, guide = random_case(18, uncovered=0, excluded=0)
    config = FusionConfig(alpha=3.0, candidates=0)
    target, result = scores.log_softmax(-1), run(scores, guide, config)
    shift = guide.heads["calibrator"].log_softmax(-1) - guide.heads["reference"].log_softmax(-1)
    for row in range(3):
        liked = shift[row] >= 0
        gain = (result - target)[row]
        assert (gain[liked] - gain[liked][0]).abs().max() < 1e-4
        assert (gain[~liked] < gain[liked][0]).all()


def test_what_was_nearly_certain_is_held_down_and_everything_else_moves_alike():
    """A rude word's end: 0.9 falls by e**-4 to 0.0165, and by the sum alone would come back to 0.14."""
    scores, guide = one_row(
        [0.9, 0.05, 0.03, 0.02], calibrator=[0.01, 0.5, 0.29, 0.2], reference=[0.9, 0.05, 0.03, 0.02]
    )
    loose = run(scores, guide, FusionConfig(alpha=8.0, max_shift=4.0, candidates=0)).exp()[0]
    held = run(scores, guide, FusionConfig(alpha=8.0, max_shift=4.0, candidates=0, mass_to_others=True)).exp()[0]
    assert loose[0] == pytest.approx(0.9 * math.exp(-4) / (0.9 * math.exp(-4) + 0.1), rel=1e-4)
    assert held[0] < 1.02 * 0.9 * math.exp(-4)
    assert held.sum() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(held[1:] / held[1], loose[1:] / loose[1])


def test_held_down_the_divergence_is_the_least_at_that_much_penalty():
    """Nothing else with the same expected penalty is nearer to the target: steps keep both sums."""
    scores, guide = random_case(21, rows=1, vocab=12, uncovered=0, excluded=0)
    config = FusionConfig(alpha=2.0, max_shift=3.0, candidates=0)
    target = scores.double().log_softmax(-1)[0]
    shift = (
        2.0
        * (guide.heads["calibrator"].double().log_softmax(-1) - guide.heads["reference"].double().log_softmax(-1))[0]
    ).clamp(-3.0, 0.0)
    penalty = torch.expm1(-shift)
    held = run(scores, guide, dataclasses.replace(config, mass_to_others=True)).double().exp()[0]

    def divergence(distribution):
        return float((target.exp() * (target - distribution.log())).sum())

    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.stack([torch.ones(12, dtype=torch.float64), penalty], dim=1)).Q
    for _ in range(50):
        step = torch.randn(12, generator=generator, dtype=torch.float64)
        step -= basis @ (basis.T @ step)
        step *= 0.3 * float((held / step.abs()).min())
        assert divergence(held + step) > divergence(held)


@pytest.mark.parametrize("limit", [0.25, 2.0])
def test_no_shift_is_larger_than_the_clip(limit):
    scores, guide = random_case(19, uncovered=0, excluded=0)
    for config in (
        FusionConfig(alpha=50.0, candidates=0, max_shift=limit),
        FusionConfig(alpha=50.0, candidates=0, max_shift=limit, one_sided=False),
        FusionConfig(mode="value", alpha=50.0, candidates=0, max_shift=limit),
    ):
        change = run(scores, guide, config) - scores.log_softmax(-1)
        width = limit if config.one_sided and config.mode == "contrast" else 2 * limit
        spread = change.amax(-1) - change.amin(-1)  # in which the constant of renormalisation cancels
        assert (spread <= width + 1e-4).all()
        assert (spread > 0.9 * width).any()
    held = run(scores, guide, FusionConfig(alpha=50.0, candidates=0, max_shift=limit, mass_to_others=True))
    lowest = (held - scores.log_softmax(-1)).amin(-1)
    assert (lowest >= -limit - 1e-4).all()
    assert (lowest < 0.0).all()


def test_numbers_of_numpy_become_plain_ones():
    config = FusionConfig(alpha=np.float32(1.5), margin=np.float64(0.25), max_shift=np.int64(4))
    assert json.loads(json.dumps(config.to_dict())) == FusionConfig(alpha=1.5, margin=0.25, max_shift=4.0).to_dict()


def test_more_alpha_lowers_a_disliked_token_further():
    scores, guide = one_row([0.6, 0.4], calibrator=[0.1, 0.9], reference=[0.5, 0.5])
    disliked = [float(run(scores, guide, FusionConfig(alpha=alpha))[0, 0]) for alpha in (0.0, 0.5, 1.0, 2.0)]
    assert disliked == sorted(disliked, reverse=True)
    assert disliked[0] > disliked[-1]


@pytest.mark.parametrize("guide_width", [30, 40, 50], ids=["narrower guide", "equal", "wider guide"])
@pytest.mark.parametrize("candidates", [0, 10])
def test_heads_of_the_model_wider_or_narrower_than_the_guide(guide_width, candidates):
    generator = torch.Generator().manual_seed(20)
    scores = torch.randn(2, 40, generator=generator)
    full = {head: torch.randn(2, 50, generator=generator) for head in ("calibrator", "reference")}
    guide = StubGuide(
        {head: values[:, :guide_width] for head, values in full.items()}, torch.ones(guide_width, dtype=torch.bool)
    )
    config = FusionConfig(alpha=2.0, candidates=candidates)
    covered = torch.arange(50) < guide_width
    expected = run(scores, StubGuide({head: values[:, :40] for head, values in full.items()}, covered[:40]), config)
    assert torch.equal(run(scores, guide, config), expected)
    assert torch.equal(expected[:, guide_width:], scores.log_softmax(-1)[:, guide_width:])


def test_a_row_without_a_token_that_the_guide_knows_is_observed_too():
    scores, guide = random_case(22, rows=1, vocab=400, uncovered=400)
    seen = []
    result = fuse(scores, guide.scores, guide.covers, FusionConfig(), observe=seen.append, pick=guide.pick)
    assert torch.equal(result, scores.log_softmax(-1))
    assert [moved.mass.tolist() for moved in seen] == [[0.0]]


def test_gradients_pass_through_the_scores():
    scores, guide = random_case(21)
    for candidates in (0, 10):
        leaf = scores.clone().requires_grad_()
        result = run(leaf, guide, FusionConfig(candidates=candidates))
        result.masked_fill(result == NEG, 0.0).sum().backward()
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().sum() > 0


class TestConfig:
    """Validation, in one clear sentence each."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "subtract"}, "Unknown fusion mode 'subtract'; choose one of contrast, geometric, blend, value"),
            ({"mode": None}, "Unknown fusion mode None"),
            ({"margin": -0.1}, "margin must be a number of nats, 0 or more, got -0.1"),
            ({"margin": math.nan}, "margin must be .* got nan"),
            ({"margin": math.inf}, "margin must be .* got inf"),
            ({"mode": ["contrast"]}, "Unknown fusion mode"),
            ({"alpha": math.nan}, "alpha must be a number from 0 .* to 100 in mode 'contrast', got nan"),
            ({"alpha": -0.1}, "alpha must be a number from 0"),
            ({"alpha": 100.5}, "alpha must be .* to 100 .* got 100.5"),
            ({"alpha": math.inf}, "alpha must be .* got inf"),
            ({"alpha": "1"}, "alpha must be a number .* got '1'"),
            ({"alpha": True}, "alpha must be a number .* got True"),
            ({"mode": "geometric", "alpha": 1.01}, "alpha must be a number from 0 .* to 1 in mode 'geometric'"),
            ({"mode": "blend", "alpha": 2}, "to 1 in mode 'blend', got 2"),
            ({"candidates": -1}, "candidates must be None .* or a positive integer, got -1"),
            ({"candidates": 2.5}, "candidates must be .* got 2.5"),
            ({"candidates": True}, "candidates must be .* got True"),
            ({"one_sided": 1}, "one_sided must be True or False, got 1"),
            ({"value_weight": -0.5}, "value_weight must be a number from 0 to 100, got -0.5"),
            ({"harm_threshold": 1.0}, "harm_threshold must be a probability between 0 and 1, got 1.0"),
            ({"max_shift": 0}, "max_shift must be a positive number of nats, got 0"),
            ({"max_shift": math.nan}, "max_shift must be .* got nan"),
            ({"max_shift": -math.inf}, "max_shift must be .* got -inf"),
        ],
    )
    def test_bad_options_are_named(self, options, message):
        with pytest.raises(InputError, match=message):
            FusionConfig(**options)

    def test_unknown_options_are_named(self):
        with pytest.raises(InputError, match=r"Unknown fusion options: aplha; known are mode, alpha"):
            FusionConfig.from_dict({"aplha": 1.0})

    @pytest.mark.parametrize("mode", MODE_NAMES)
    def test_dictionary_round_trip(self, mode):
        config = FusionConfig(mode=mode, alpha=0.25, candidates=7, one_sided=False, max_shift=3.0)
        assert FusionConfig.from_dict(config.to_dict()) == config

    def test_is_frozen(self):
        with pytest.raises(AttributeError):
            FusionConfig().alpha = 2.0

    def test_options_are_keyword_only(self):
        with pytest.raises(TypeError):
            FusionConfig("contrast")
