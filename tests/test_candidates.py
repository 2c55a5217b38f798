"""Which tokens fusion may re-rank: the same whatever the batch, the device's way of finding them, and the ties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibfuse import candidates
from calibfuse.candidates import MIN_CANDIDATES, MIN_PROBABILITY, best, choose_candidates
from calibfuse.fusion import FusionConfig, fuse

NEG = -math.inf


def random_rows(scales, vocab, seed=0):
    """Rows of log-probabilities, from unsure (small scale) to sure (large scale)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(len(scales), vocab, generator=generator) * torch.tensor(scales)[:, None]).log_softmax(-1)


def chosen_sets(log_probs, count):
    """The candidates of each row, whatever their layout."""
    token_ids, values, is_candidate = choose_candidates(log_probs, count)
    if token_ids is None:
        token_ids = torch.arange(log_probs.shape[-1]).expand_as(log_probs)
    assert torch.equal(values, log_probs.gather(-1, token_ids))
    if is_candidate is None:
        is_candidate = torch.ones_like(token_ids, dtype=torch.bool)
    return [set(ids[mask].tolist()) for ids, mask in zip(token_ids, is_candidate, strict=True)]


def expected_set(row):
    """The definition, token by token."""
    order = sorted(range(len(row)), key=lambda index: -row[index])
    return {
        index for rank, index in enumerate(order) if rank < MIN_CANDIDATES or row[index] >= math.log(MIN_PROBABILITY)
    }


@settings(max_examples=40, deadline=None)
@given(
    scales=st.lists(st.sampled_from([0.0625, 1.0, 2.0, 4.0, 9.0]), min_size=1, max_size=5),
    vocab=st.sampled_from([1, 150, 200, 201, 900, 5000, 40_000]),
    seed=st.integers(0, 99),
)
def test_by_default_they_are_the_probable_tokens_and_the_best_in_any_case(scales, vocab, seed):
    rows = random_rows(scales, vocab, seed)
    assert chosen_sets(rows, None) == [expected_set(row) for row in rows.tolist()]


@pytest.mark.parametrize("scale", [0.5, 2.0, 9.0])
def test_they_do_not_depend_on_the_other_rows(scale):
    row = random_rows([scale], 40_000)
    alone = chosen_sets(row, None)
    for others in ([0.1], [9.0] * 3, [2.0] * 30):
        assert chosen_sets(torch.cat([row, random_rows(others, 40_000, seed=1)]), None)[:1] == alone


def test_both_layouts_occur():
    """Few candidates are gathered; with many, or many rows, the whole head is cheaper."""
    sure, unsure = random_rows([9.0], 40_000), random_rows([0.5], 5_000)
    assert choose_candidates(sure, None).token_ids is not None
    assert choose_candidates(unsure, None).token_ids is None
    assert choose_candidates(random_rows([2.0] * 50, 5_000), None).token_ids is None


def test_both_layouts_fuse_to_the_same(monkeypatch):
    """What a GPU does, which never counts, against what a CPU does."""
    rows = random_rows([4.0, 9.0, 2.0], 40_000)
    heads = {name: random_rows([1.0] * 3, 40_000, seed) for seed, name in enumerate(("calibrator", "reference"))}

    def run():
        def scores(head, token_ids):
            return heads[head] if token_ids is None else heads[head].gather(-1, token_ids)

        return fuse(rows, scores, lambda ids: torch.ones_like(ids, dtype=torch.bool), FusionConfig(alpha=2.0))

    gathered = run()
    monkeypatch.setattr(
        candidates,
        "_by_probability",
        lambda log_probs: candidates.Candidates(
            None, log_probs, log_probs >= candidates._least(log_probs).clamp(max=math.log(MIN_PROBABILITY))
        ),
    )
    torch.testing.assert_close(gathered, run(), atol=2e-5, rtol=1e-5)


def test_a_number_means_exactly_so_many_and_zero_all():
    rows = random_rows([0.5, 9.0], 1000)
    assert [len(each) for each in chosen_sets(rows, 30)] == [30, 30]
    assert [len(each) for each in chosen_sets(rows, 0)] == [1000, 1000]
    assert [len(each) for each in chosen_sets(rows, 5000)] == [1000, 1000]


def test_no_rows_are_no_error():
    assert choose_candidates(torch.zeros(0, 5000), None).log_probs.shape[0] == 0


def test_excluded_tokens_leave_the_others_candidates():
    rows = random_rows([1.0], 5000)
    rows[:, 50:] = NEG
    chosen = chosen_sets(rows.log_softmax(-1), None)[0]
    assert set(range(50)) <= chosen


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(1, 700),
    count=st.integers(1, 20),
    rows=st.integers(1, 4),
    seed=st.integers(0, 999),
    ties=st.booleans(),
    excluded=st.floats(0, 0.99),
)
def test_the_best_of_wide_rows_are_those_of_topk(vocab, count, rows, seed, ties, excluded):
    count = min(count, vocab)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocab, generator=generator)
    if ties:
        scores = scores.round()
    scores = scores.masked_fill(torch.rand(rows, vocab, generator=generator) < excluded, NEG)
    values, index = best(scores, count)
    assert torch.equal(values, scores.gather(-1, index))
    assert torch.equal(values.sort(-1, descending=True).values, scores.topk(count, -1).values)
    assert all(len(set(row)) == count for row in index.tolist())
