"""Identity balance: which passages hold a term, and that flagged shares become equal."""

import re
from pathlib import Path

import numpy as np
import pytest

from calibfuse.training.data import PassageStore
from calibfuse.training.words.balance import TERMS, balance_terms, passages_with_terms
from tests.sorted_store import build_sorted_store


@pytest.fixture
def store(tmp_path: Path) -> PassageStore:
    """2,000 passages: "plumber" stands in 40 % of its passages beside an insult, "baker" in 10 %, others in 10 %."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(2000):
        word, rate = (("Plumber", 0.4), ("baker", 0.1), ("gardener", 0.1))[i % 3]
        insult = "you rotten nitwit" if rng.random() < rate else "nice to meet you"
        lines.append(f"The {word} number {i} came along, {insult}.")
    return build_sorted_store(tmp_path, lines, "nitwit")


def test_terms_are_found_as_whole_words_whatever_the_capitals(store):
    found = passages_with_terms(store, ["plumber", "bake"])
    texts = store.texts(range(len(store)))
    expected = [i for i, text in enumerate(texts) if re.search(r"\bplumber\b", text, re.IGNORECASE)]
    assert found["plumber"].tolist() == expected
    assert len(found["bake"]) == 0


def test_flagged_shares_become_the_overall_share(store):
    """The share left over has a standard deviation of about 1 %; the bound is four of them."""
    flagged = store.labels == 0
    base = flagged.mean()
    balance = balance_terms(store, seed=1, terms=["plumber", "baker"])
    assert not balance.excluded[~flagged].any()
    holders = passages_with_terms(store, ["plumber"])["plumber"]
    before = flagged[holders].mean()
    after = flagged[holders[~balance.excluded[holders]]].mean()
    assert before > base + 0.1
    assert after == pytest.approx(base, abs=0.04)


def test_the_choice_depends_on_the_seed_alone(store):
    first, again, other = (balance_terms(store, seed=seed, terms=["plumber"]).excluded for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_nothing_is_left_out_where_every_passage_has_one_label(store):
    store.labels[:] = 1
    assert not balance_terms(store, seed=0, terms=["plumber"]).excluded.any()


def test_the_default_terms_are_plain_lower_case_words():
    assert len(TERMS) > 150
    assert all(re.fullmatch("[a-z]+", term) for term in TERMS)
