"""Metrics by hand, and intervals against a slow bootstrap."""

import doctest

import numpy as np
import pytest

from calibfuse.errors import InputError
from calibfuse.evaluation import bootstrap, metrics
from calibfuse.evaluation.bootstrap import Sums, bootstrap_counts, resample
from calibfuse.evaluation.metrics import METRICS, distinct_counts, toxicity_sums


def value(sums):
    return float(sums.numerator.sum() / sums.denominator.sum())


def test_the_examples_of_the_docstrings_are_true():
    assert doctest.testmod(metrics).failed == 0


def test_toxicity_worked_by_hand():
    """Two of six continuations reach 0.5; one of two prompts has one; maxima 0.5 and 0.4."""
    sums = toxicity_sums(np.array([[0.5, 0.5, 0.0], [0.1, 0.4, 0.0]]))
    assert value(sums["toxic_share"]) == pytest.approx(2 / 6)
    assert value(sums["toxicity_probability"]) == 0.5
    assert value(sums["expected_maximum_toxicity"]) == pytest.approx(0.45)
    assert value(sums["mean_toxicity"]) == pytest.approx(0.25)
    assert value(toxicity_sums(np.array([[0.5, 0.6]]), toxic_from=0.55)["toxic_share"]) == 0.5


def test_distinct_worked_by_hand():
    """ "a b a b" and "a b": 6 words, words {a, b}, pairs {ab, ba}, triples {aba, bab}."""
    assert distinct_counts(["a b a b", "a b"]) == [2 / 6, 2 / 6, 2 / 6]
    assert distinct_counts(["", "  "]) == [0.0, 0.0, 0.0]


def test_resampling_equals_a_slow_loop():
    generator = np.random.default_rng(0)
    sums = {
        "toxic_share": Sums(generator.integers(0, 5, 12).astype(float), np.full(12, 5.0)),
        "perplexity": Sums(generator.random(12) * 60, generator.integers(10, 20, 12).astype(float), True),
    }
    found = resample(sums, resamples=40, seed=3)
    counts = np.concatenate(list(bootstrap_counts(12, 40, 3)))
    for number, row in enumerate(counts):
        drawn = np.repeat(np.arange(12), row)
        assert len(drawn) == 12
        share = sums["toxic_share"].numerator[drawn].sum() / sums["toxic_share"].denominator[drawn].sum()
        ppl = np.exp(sums["perplexity"].numerator[drawn].sum() / sums["perplexity"].denominator[drawn].sum())
        assert found["toxic_share"].resamples[number] == pytest.approx(share)
        assert found["perplexity"].resamples[number] == pytest.approx(ppl)


def test_blocks_of_resamples_are_bounded_and_complete(monkeypatch):
    monkeypatch.setattr(bootstrap, "_CHUNK", 50)
    blocks = list(bootstrap_counts(10, 23, 0))
    assert [len(block) for block in blocks] == [5, 5, 5, 5, 3]
    assert all((block.sum(axis=1) == 10).all() for block in blocks)


def test_intervals_hold_the_value_and_narrow_with_more_prompts():
    generator = np.random.default_rng(1)
    widths = []
    for prompts in (20, 2000):
        sums = {"mean_toxicity": Sums(generator.random(prompts), np.ones(prompts))}
        estimate = resample(sums)["mean_toxicity"].estimate()
        assert estimate.low < estimate.value < estimate.high
        widths.append(estimate.high - estimate.low)
    assert widths[1] < 0.2 * widths[0]


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """200 experiments: a 95 % interval misses 10 +- 3 times; fewer than 24 misses (4.5 sigma) are asked for."""
    generator = np.random.default_rng(2)
    misses = 0
    for seed in range(200):
        sums = {"mean_toxicity": Sums(generator.random(60), np.ones(60))}
        estimate = resample(sums, resamples=300, seed=seed)["mean_toxicity"].estimate()
        misses += not estimate.low <= 0.5 <= estimate.high
    assert misses < 24


def test_differences_are_paired_by_prompts():
    """Two methods whose difference is the same on every prompt: the difference has no spread, the figures do."""
    base = np.random.default_rng(0).random(50)
    one, other = ({"mean_toxicity": Sums(base + shift, np.ones(50))} for shift in (0.0, -0.1))
    plain, method = resample(one)["mean_toxicity"], resample(other)["mean_toxicity"]
    difference = method.minus(plain)
    assert difference.low == pytest.approx(-0.1)
    assert difference.high == pytest.approx(-0.1)
    assert method.estimate().high - method.estimate().low > 0.05
    half = resample({"mean_toxicity": Sums(base / 2, np.ones(50))})["mean_toxicity"]
    assert half.relative_to(plain).value == pytest.approx(-0.5)
    assert half.relative_to(plain).high == pytest.approx(-0.5)


def test_a_change_against_nothing_has_no_number():
    zero = resample({"empty_share": Sums(np.zeros(5), np.ones(5))})["empty_share"]
    assert np.isnan(zero.relative_to(zero).value)


def test_metrics_without_anything_to_divide_by_are_left_out_and_lengths_must_agree():
    assert resample({"perplexity": Sums(np.zeros(3), np.zeros(3))}) == {}
    with pytest.raises(InputError, match="equally many prompts"):
        resample({"length": Sums(np.zeros(3), np.zeros(2))})
    with pytest.raises(InputError, match="at least 1 resample"):
        resample({"length": Sums(np.zeros(3), np.ones(3))}, resamples=0)


def test_every_metric_has_a_title_of_its_own():
    assert len({metric.title for metric in METRICS.values()}) == len(METRICS)
