"""Which tokens fusion may re-rank: the same whatever the batch, the device's way of finding them, and the ties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibfuse.candidates import MIN_CANDIDATES, MIN_PROBABILITY, choose_candidates
from calibfuse.fusion import FusionConfig, fuse

NEG = -math.inf


def random_rows(scales, vocab, seed=0):
    """Rows of log-probabilities, from unsure (small scale) to sure (large scale)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(len(scales), vocab, generator=generator) * torch.tensor(scales)[:, None]).log_softmax(-1)


def chosen_sets(log_probs, count, always=None):
    """The candidates of each row, the same in both layouts."""
    sets = []
    for as_list in (False, True):
        token_ids, values, is_candidate, places = choose_candidates(log_probs, count, always, as_list=as_list)
        if places is not None:
            assert torch.equal(values, log_probs[places, token_ids])
            assert (torch.diff(places * log_probs.shape[1] + token_ids) > 0).all(), "row by row, with rising ids"
            sets.append([set(token_ids[places == row].tolist()) for row in range(len(log_probs))])
            assert sum(map(len, sets[-1])) == len(token_ids)
            continue
        if token_ids is None:
            token_ids = torch.arange(log_probs.shape[-1]).expand_as(log_probs)
        assert torch.equal(values, log_probs.gather(-1, token_ids))
        if is_candidate is None:
            is_candidate = torch.ones_like(token_ids, dtype=torch.bool)
        sets.append([set(ids[mask].tolist()) for ids, mask in zip(token_ids, is_candidate, strict=True)])
    assert sets[0] == sets[1]
    return sets[0]


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


def test_scores_that_are_not_normalised_give_the_same_list():
    rows = random_rows([0.5, 9.0, 2.0], 5_000)
    scale = torch.tensor([[3.0], [-70.0], [20.0]])
    always = torch.tensor([7, 3_000])
    plain = choose_candidates(rows, None, always, as_list=True)
    scaled = choose_candidates(rows + scale, None, always, as_list=True, log_sums=scale)
    assert torch.equal(plain.token_ids, scaled.token_ids)
    assert torch.equal(plain.places, scaled.places)
    torch.testing.assert_close(plain.log_probs, scaled.log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["contrast", "geometric", "value"])
def test_both_layouts_fuse_to_the_same(mode):
    """What a GPU does, which never counts, against what a CPU does."""
    rows = random_rows([4.0, 9.0, 2.0], 40_000).view(3, 1, -1)
    rows[1, 0, 5:30_000] = -1e9
    heads = {
        name: random_rows([1.0] * 3, 40_000, seed).view(3, 1, -1)
        for seed, name in enumerate(("calibrator", "reference", "value"))
    }
    always = torch.tensor([7, 31_000])
    config = FusionConfig(mode=mode, alpha=0.7, margin=0.05, mass_to_others=True)
    alpha = torch.tensor([[0.7], [0.2], [0.0]])

    def scores(head, token_ids):
        return heads[head] if token_ids is None else heads[head].gather(-1, token_ids)

    def pick(names, places, token_ids):
        return {name: heads[name].flatten(0, 1)[places, token_ids] for name in names}

    def run(**options):
        def covers(ids):
            return ids % 11 > 0

        return fuse(rows, scores, covers, config, always, **options)

    for options in ({}, {"alpha": alpha}, {"keep_scale": True}, {"alone": torch.tensor([[False], [True], [False]])}):
        seen = []
        listed = run(pick=pick, observe=seen.append, **options)
        torch.testing.assert_close(listed, run(observe=seen.append, **options), atol=2e-5, rtol=1e-5)
        judged = torch.ones(3, dtype=torch.bool) if "alone" not in options else ~options["alone"].flatten()
        torch.testing.assert_close(seen[0].mass[judged], seen[1].mass[judged], atol=2e-5, rtol=1e-5)
    written = rows.clone()
    kept = fuse(written, scores, lambda ids: ids % 11 > 0, config, always, pick=pick, keep_scale=True, in_place=True)
    assert kept is written or torch.equal(kept, written)
    assert torch.equal(written, run(pick=pick, keep_scale=True))
    torch.testing.assert_close(run(alpha=alpha)[2], rows[2].log_softmax(-1), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(run(alpha=alpha)[0], run()[0] * 0 + rows[0].log_softmax(-1), atol=1e-3)


def test_a_row_with_a_scale_of_its_own_keeps_it():
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)) * 3 + torch.tensor([[5.0], [-40.0]])
    heads = {"calibrator": random_rows([1.0] * 2, 300), "reference": random_rows([1.0] * 2, 300, 1)}

    def scores(head, token_ids):
        return heads[head]

    result = fuse(logits, scores, lambda ids: ids > 5, FusionConfig(candidates=0), keep_scale=True)
    torch.testing.assert_close(result.logsumexp(-1), logits.logsumexp(-1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(result[:, :6], logits[:, :6], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("excluded", [-math.inf, -1e9, -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("as_list", [False, True])
def test_excluded_is_excluded_however_it_is_written(excluded, as_list):
    """Two equal tokens left: whatever the others' scores are, they share what the calibrator makes of the two."""
    heads = {"calibrator": random_rows([3.0] * 2, 2_000), "reference": random_rows([3.0] * 2, 2_000, 1)}
    scores = torch.full((2, 2_000), excluded)
    scores[:, [10, 20]] = 1.5

    def pick(names, places, token_ids):
        return {name: heads[name][places, token_ids] for name in names}

    def say(head, token_ids):
        return heads[head] if token_ids is None else heads[head].gather(-1, token_ids)

    def run(scores):
        always = torch.tensor([500, 600])
        return fuse(scores, say, lambda ids: ids > 0, FusionConfig(), always, pick=pick if as_list else None).exp()

    expected = run(torch.where(scores > 0, scores, -math.inf))
    assert abs(float(expected[0, 10]) - 0.5) > 0.05
    torch.testing.assert_close(run(scores), expected)


def test_one_constrained_row_does_not_make_the_others_wide():
    rows = random_rows([9.0] * 8, 40_000)
    rows[3] = -math.inf
    rows[3, [5, 6]] = math.log(0.5)
    found = choose_candidates(rows, None, as_list=True)
    assert [int((found.places == row).sum()) for row in (2, 3)] == [200, 2]
    assert chosen_sets(rows, None)[3] == {5, 6}


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
