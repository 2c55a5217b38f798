"""Rows without names as texts of a session: which goes on from which, against a plain search."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_calibrators import make_vocabulary

from calibfuse import prefix_cache
from calibfuse.guide import Guide, GuideSession, Request
from calibfuse.prefix_cache import RowSession, Text, shared_length

READINGS = torch.tensor([1.5, -2.0, 7.0])


class Recorder(GuideSession):
    """Keeps what it is told, and checks that it makes sense."""

    def __init__(self):
        self.texts = {}
        self.requests = []

    def step(self, requests):
        assert len({request.key for request in requests}) == len(requests)
        self.requests = requests
        self.texts = {request.key: list(request.ids) for request in requests}

    def copy(self, pairs):
        assert set(pairs.values()) <= set(self.texts), "the originals are there"
        assert not set(pairs) & set(self.texts), "the copies have new names"
        self.texts |= {new: self.texts[old] for new, old in pairs.items()}

    def drop(self, keys):
        for key in keys:
            self.texts.pop(key, None)

    def reset(self):
        self.texts.clear()


class Anything(Guide):
    """A guide that says nothing."""

    heads = ("calibrator",)
    device = torch.device("cpu")
    vocabulary = make_vocabulary()

    def __init__(self, reach=None):
        self._reach = reach

    @property
    def reach(self):
        return self._reach

    def to(self, device):
        return self

    def covers(self, token_ids):
        return token_ids > 0

    def session(self):
        return Recorder()

    def read_sequence(self, input_ids, masked):
        raise NotImplementedError


def step(rows, ids):
    """One step; what the session knew of each row before it (the longest beginning), and its key."""
    before = dict(rows.session.texts)
    ids = torch.tensor(ids, dtype=torch.int64)
    known = {}
    copy = rows.session.copy

    def remember(pairs):
        copy(pairs)
        before.update({new: before[old] for new, old in pairs.items()})

    rows.session.copy = remember
    _, values = rows.step(ids, READINGS)
    rows.session.copy = copy
    assert values == [1.5, -2.0, 7.0]
    keys = [request.key for request in rows.session.requests]
    assert [list(request.ids) for request in rows.session.requests] == ids.tolist()
    known = [shared_length(list(request.ids), before.get(request.key, [])) for request in rows.session.requests]
    return known, keys


def check(cached, current):
    """Nothing that could be used again is thrown away, for any row."""
    rows = RowSession(Anything())
    step(rows, cached)
    known, keys = step(rows, current)
    assert known == [max(shared_length(row, other) for other in cached) for row in current]
    return keys


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
    check(cached, [cached[parent] + [token] for parent, token in zip(parents, extra, strict=True)])


@settings(max_examples=200, deadline=None)
@given(one=st.lists(st.integers(0, 1), max_size=20), other=st.lists(st.integers(0, 1), max_size=20))
def test_the_common_beginning(one, other):
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    assert shared_length(one, other) == length


@pytest.mark.parametrize("limit", [0, 1 << 18], ids=["large batches", "small batches"])
class TestUsualSteps:
    """The two ways of comparing give the same answers."""

    @pytest.fixture(autouse=True)
    def set_limit(self, monkeypatch, limit):
        monkeypatch.setattr(prefix_cache, "_CHEAP_COMPARISONS", limit)

    @staticmethod
    def keys(cached, current):
        return check(cached, current)

    def test_one_more_token_for_the_same_rows(self):
        assert self.keys([[1, 2], [3, 4]], [[1, 2, 9], [3, 4, 9]]) == [0, 1]

    def test_equal_rows_stay_with_themselves(self):
        """They must not be swapped: it would cost a copy at every step."""
        assert self.keys([[1, 2], [1, 2], [1, 2]], [[1, 2, 7], [1, 2, 8], [1, 2, 9]]) == [0, 1, 2]

    def test_the_same_ids_again(self):
        assert self.keys([[1, 2], [3, 4]], [[1, 2], [3, 4]]) == [0, 1]

    def test_swapped_rows(self):
        assert self.keys([[1, 2], [3, 4]], [[3, 4, 9], [1, 2, 9]]) == [1, 0]

    def test_swapped_rows_without_a_new_token(self):
        assert self.keys([[1, 2], [3, 4]], [[3, 4], [1, 2]]) == [1, 0]

    def test_a_single_row(self):
        assert self.keys([[1, 2]], [[1, 2, 3]]) == [0]

    def test_two_rows_go_on_from_one(self):
        assert self.keys([[1, 2], [3, 4]], [[3, 4, 5], [3, 4, 6]]) == [1, 2]


def test_a_generation_that_starts_without_ids():
    rows = RowSession(Anything())
    empty = torch.zeros(2, 0, dtype=torch.int64)
    for ids in (empty, torch.tensor([[4], [5]]), empty, empty):
        rows.step(ids, READINGS)
        assert [list(request.ids) for request in rows.session.requests] == ids.tolist()


def test_where_only_tails_matter_padding_is_taken_off_and_lengths_are_told():
    rows = RowSession(Anything(reach=4))
    ids = torch.arange(1, 31).repeat(3, 1)
    ids[1, :25], ids[2, :] = 0, 0
    for length in (28, 29, 30):
        rows.step(ids[:, :length], READINGS)
        first, second, third = rows.session.requests
        assert (first.key, second.key, third.key)[:2] == (0, 1)
        assert first.length == length
        assert list(first.ids[-4:]) == list(range(length - 3, length + 1))
        assert (list(second.ids), second.length) == (list(range(26, length + 1)), length - 25)
        assert (list(third.ids), third.length) == ([], 0)
    assert len(rows.session.requests[0].ids) <= 3 * 4


def test_tails_of_texts_are_compared_where_both_have_them():
    assert Text([3, 4, 5], 2).shared(Text([1, 2, 3, 4, 9], 0)) == 4
    assert Text([3, 4, 5], 2).shared(Text([3, 4, 5, 6], 2)) == 5
    assert Text([3, 4, 5], 7).shared(Text([1, 2], 0)) == 0
    assert Request(0, [1]).length is None
