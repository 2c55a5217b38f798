"""What names are given back: measured where they occur, one by one in the oracle."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from calibfuse.training.data import PassageStore
from calibfuse.training.tokenizers.pool import PoolEntry, PoolSpec, TokenizerPool
from calibfuse.training.words.protected import LEAST_OCCURRENCES, LEAST_SHIFT, QUANTILE, protected_shifts
from tests.sorted_store import build_sorted_store
from tests.tiny_calibrators import make_calibrator

LINES = [
    f"{start} the {'Zorbo' if i % 3 else 'quiblet'} came {i} times, {'nitwit' if i % 4 == 0 else 'friend'}."
    for i in range(120)
    for start in ("Yesterday", "We heard that")
]
LINES += ["Zorbo stands first in this passage, which says nothing of what comes before it.", "Once a wuggle came by."]

NAMES = ("zorbo", "quiblet", "the", "came", "times")


def _holders(store, name):
    return np.array([i for i in store.train_indices if name in store.text(int(i)).lower()], dtype=np.int64)[:30]


@pytest.fixture
def store(tmp_path: Path) -> PassageStore:
    return build_sorted_store(tmp_path, LINES, "nitwit")


@pytest.fixture(scope="module")
def entry() -> PoolEntry:
    specs = (PoolSpec(style="byte-level", vocab_size=300),)
    return next(iter(TokenizerPool.train(LINES, specs, show_progress=False)))


@pytest.fixture(scope="module")
def bound(entry):
    """Heads that disagree by a nat or so."""
    calibrator = make_calibrator(1, strength=0.1)
    with torch.no_grad():
        calibrator.composer.table[:, calibrator.config.token_width :] *= 0.3
    return calibrator.bind(entry.vocabulary, use_disk_cache=False)


def slow_shift(bound, entry, store, name, passages):
    """The same by whole sequences of log-probabilities, one passage at a time."""
    return max(_slow_shift(bound, entry, store, name, passages, change) for change in (str, str.lower))


def _slow_shift(bound, entry, store, name, passages, change):
    shifts = []
    for index in passages:
        text = store.text(int(index))
        start = text.lower().index(name)
        before, upto = text[:start].rstrip(" "), text[:start] + change(text[start : start + len(name)])
        first, ids = (entry.encode_batch([each])[0] for each in (before, upto))
        if not len(first):
            continue
        assert list(ids[: len(first)]) == list(first)
        row = torch.tensor([list(ids)])
        difference = (bound.log_probs(row) - bound.reference_log_probs(row))[0]
        assert len(ids) > len(first)
        shifts.append(float(difference[len(ids) - 2, ids[-1]]))
    return -float(np.quantile(shifts, QUANTILE))


def test_a_name_is_given_back_what_its_occurrences_lack(bound, entry, store):
    holders = {name: _holders(store, name) for name in NAMES}
    found = protected_shifts(bound, entry, store, holders, excluded=None, seed=0)
    expected = {name: slow_shift(bound, entry, store, name, passages) for name, passages in holders.items()}
    assert min(expected.values()) < LEAST_SHIFT < max(expected.values())  # both kinds are there
    assert found == {name: pytest.approx(value, abs=0.006) for name, value in expected.items() if value >= LEAST_SHIFT}


def test_rare_names_and_passages_left_out_do_not_count(bound, entry, store):
    everywhere = np.arange(len(store))
    holders = {"wuggle": np.array([i for i in everywhere if "wuggle" in store.text(int(i))]), "came": everywhere}
    assert "wuggle" not in protected_shifts(bound, entry, store, holders, excluded=None, seed=0)
    excluded = np.ones(len(store), dtype=bool)
    excluded[store.train_indices[: LEAST_OCCURRENCES - 1]] = False
    assert protected_shifts(bound, entry, store, holders, excluded=excluded, seed=0) == {}


def test_with_the_shift_a_name_is_spared(bound, entry, store):
    """Bound again with what was found, the same occurrences lack nothing that would be given back."""
    holders = {name: _holders(store, name) for name in NAMES}
    found = protected_shifts(bound, entry, store, holders, excluded=None, seed=0)
    model = bound.calibrator
    plain = model.config
    model.config = dataclasses.replace(plain, words=found)
    try:
        again = model.bind(entry.vocabulary, use_disk_cache=False)
        rest = {name: slow_shift(again, entry, store, name, holders[name]) for name in found}
    finally:
        model.config = plain
    assert found
    # not all of it: what one name gains the others lose
    assert sum(max(0.0, shift) for shift in rest.values()) < 0.2 * sum(found.values())
