"""Names are told from other words by their capitals, and only those that are flagged too often count."""

from pathlib import Path

import numpy as np
import pytest

from calibfuse.training.data import PassageStore
from calibfuse.training.words.balance import TERMS, balance_terms
from calibfuse.training.words.counts import LEAST_NAMED, suspected_names
from tests.sorted_store import build_sorted_store


@pytest.fixture
def store(tmp_path: Path) -> PassageStore:
    """Half of the passages with Zorbo or a grumph are flagged, a tenth of those with Quiblet and of all others."""
    rng = np.random.default_rng(0)
    words = (("Zorbo", 0.5), ("grumph", 0.5), ("Quiblet", 0.1), ("table", 0.1), ("chair", 0.1), ("window", 0.1))
    lines = []
    for i in range(3000):
        word, rate = words[i % len(words)]
        insult = "YOU ROTTEN nitwit" if rng.random() < rate else "nice to meet you"
        # "Later" begins sentences only; the insult is shouted
        lines.append(f"They saw the {word} again, {insult}, number {i}. Later everyone went home.")
    return build_sorted_store(tmp_path, lines, "nitwit")


def test_names_are_those_with_capitals_that_are_flagged_too_often(store):
    assert suspected_names(store) == ("zorbo",)


def test_few_flagged_passages_make_no_name(tmp_path):
    few, enough = (
        [f"They saw the {name} and the nitwit {i}, in the garden" for i in range(LEAST_NAMED + extra)]
        for name, extra in (("Quiblet", -1), ("Zorbo", 3))
    )
    clean = [f"They saw the house number {i}, in the garden" for i in range(500)]
    store = build_sorted_store(tmp_path, [*few, *enough, *clean], "nitwit")
    kept = np.union1d(store.train_indices, store.validation_indices)
    store.train_indices = kept  # whichever passages were held out
    assert suspected_names(store) == ("zorbo",)


@pytest.mark.parametrize("label", [0, 1])
def test_one_pile_has_no_suspects(store, label):
    store.labels[:] = label
    assert suspected_names(store) == ()


def test_the_balance_takes_suspected_names_along(store):
    balance = balance_terms(store, seed=0)
    assert set(balance.holders) == {*TERMS, "zorbo"}
    flagged, holders = store.labels == 0, balance.holders["zorbo"]
    before, after = flagged[holders].mean(), flagged[holders[~balance.excluded[holders]]].mean()
    assert before > 0.4
    assert after == pytest.approx((store.labels == 0).mean(), abs=0.06)
