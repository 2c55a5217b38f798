"""Which cached rows and tokens can be reused, against a plain search."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibfuse import prefix_cache
from calibfuse.prefix_cache import match_prefixes

READINGS = torch.tensor([1.5, -2.0, 7.0])


def match(cached, current):
    reuse, values = match_prefixes(torch.tensor(cached), torch.tensor(current), READINGS)
    assert values == [1.5, -2.0, 7.0]
    return reuse


def parents_of(reuse, rows):
    return list(range(rows)) if reuse.parents is None else reuse.parents.tolist()


def shared_length(a, b):
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def check(cached, current):
    """What any answer must satisfy, and that nothing reusable is thrown away."""
    reuse = match(cached, current)
    rows, length = len(current), len(current[0])
    parents = parents_of(reuse, rows)
    assert len(parents) == rows
    best = [max(shared_length(row, other) for other in cached) for row in current]
    if reuse.unchanged:
        assert current == cached
        return reuse
    assert 0 <= reuse.keep <= max(0, length - 1), "one token at least must be fed, to have something to say"
    for row, parent in zip(current, parents, strict=True):
        assert row[: reuse.keep] == cached[parent][: reuse.keep]
    assert reuse.keep == max(0, min(min(best), length - 1))
    if current == cached:
        pytest.fail("equal prefixes were not recognised")
    return reuse


batches = st.integers(1, 5).flatmap(
    lambda rows: st.integers(1, 7).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=rows, max_size=rows
        )
    )
)


@settings(max_examples=300, deadline=None)
@given(cached=batches, current=batches)
def test_any_two_batches(cached, current):
    check(cached, current)


@settings(max_examples=200, deadline=None)
@given(cached=batches, data=st.data())
def test_reordered_and_extended_rows(cached, data):
    rows = len(cached)
    parents = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
    extra = data.draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows))
    current = [cached[parent] + [token] for parent, token in zip(parents, extra, strict=True)]
    reuse = check(cached, current)
    assert reuse.keep == len(cached[0])


@pytest.mark.parametrize("limit", [0, 1 << 18], ids=["large batches", "small batches"])
class TestUsualSteps:
    """The two ways of comparing give the same answers."""

    @pytest.fixture(autouse=True)
    def set_limit(self, monkeypatch, limit):
        monkeypatch.setattr(prefix_cache, "_CHEAP_COMPARISONS", limit)

    def test_one_more_token_for_the_same_rows(self):
        reuse = match([[1, 2], [3, 4]], [[1, 2, 9], [3, 4, 9]])
        assert (reuse.keep, reuse.parents, reuse.unchanged) == (2, None, False)

    def test_twins_stay_with_themselves(self):
        """Equal rows must not be swapped: it would cost a copy at every step."""
        reuse = match([[1, 2], [1, 2], [1, 2]], [[1, 2, 7], [1, 2, 8], [1, 2, 9]])
        assert (reuse.keep, reuse.parents) == (2, None)

    def test_the_same_ids_again(self):
        reuse = match([[1, 2], [3, 4]], [[1, 2], [3, 4]])
        assert reuse.unchanged

    def test_swapped_rows(self):
        reuse = match([[1, 2], [3, 4]], [[3, 4, 9], [1, 2, 9]])
        assert (reuse.keep, reuse.parents.tolist()) == (2, [1, 0])

    def test_swapped_rows_without_a_new_token_feed_the_last_one_again(self):
        reuse = match([[1, 2], [3, 4]], [[3, 4], [1, 2]])
        assert (reuse.keep, reuse.parents.tolist(), reuse.unchanged) == (1, [1, 0], False)

    def test_a_single_row(self):
        reuse = match([[1, 2]], [[1, 2, 3]])
        assert (reuse.keep, reuse.parents) == (2, None)


def test_shorter_prefix_keeps_all_but_its_last_token():
    reuse = match([[1, 2, 3, 4, 5]], [[1, 2, 3]])
    assert (reuse.keep, reuse.unchanged) == (2, False)


def test_rejected_draft_tokens_are_dropped():
    assert match([[1, 2, 3, 4, 5]], [[1, 2, 3, 9]]).keep == 3


def test_a_new_text_keeps_nothing():
    assert match([[1, 2, 3]], [[5, 6, 7, 8]]).keep == 0


def test_second_turn_of_a_chat_keeps_the_first():
    assert match([[1, 2, 3]], [[1, 2, 3, 4, 5, 6]]).keep == 3


def test_more_rows_than_before_continue_the_rows_they_share_most_with():
    reuse = match([[1, 2, 3], [1, 5, 6]], [[1, 5, 6, 7], [1, 5, 6, 8], [1, 2, 3, 7]])
    assert (reuse.keep, reuse.parents.tolist()) == (3, [1, 1, 0])


def test_fewer_rows_than_before():
    reuse = match([[1, 2, 3], [1, 5, 6], [7, 7, 7]], [[7, 7, 7, 1]])
    assert (reuse.keep, reuse.parents.tolist()) == (3, [2])


def test_a_generation_that_starts_without_ids():
    empty = torch.zeros(2, 0, dtype=torch.int64)
    reuse, _ = match_prefixes(empty, torch.tensor([[4], [5]]), READINGS)
    assert (reuse.keep, reuse.parents) == (0, None)
    reuse, _ = match_prefixes(torch.tensor([[4], [5]]), empty, READINGS)
    assert reuse.keep == 0
    reuse, _ = match_prefixes(empty, empty, READINGS)
    assert reuse.unchanged
