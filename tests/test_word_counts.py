"""Word shifts counted from the two piles: the numbers of the formula, and what never becomes one."""

import math
from pathlib import Path

import numpy as np
import pytest

from calibfuse.training.data import PassageStore
from calibfuse.training.words.counts import LARGEST_SHIFT, LEAST_PASSAGES, LEAST_SHIFT, word_shifts
from tests.sorted_store import build_sorted_store


@pytest.fixture
def store(tmp_path: Path) -> PassageStore:
    """1,000 passages, every tenth flagged; "nitwit" stands in all flagged and, spoken of, in 3 clean ones."""
    lines = []
    for i in range(1000):
        n = i // 10
        if i % 10:
            lines.append(f"A quiet day number {i} at the lake" + (", nitwit was said" if i in (1, 11, 21) else ""))
            continue
        shouted = " grumph" * 50 if n < LEAST_PASSAGES - 1 else ""
        name = ", Zounds" if n < 3 * LEAST_PASSAGES else ""
        lines.append(f"you NITWIT at the lake, rotten{shouted}{name}, day {i}")
    return build_sorted_store(tmp_path, lines, "rotten")


def test_shifts_are_those_of_the_formula(store):
    shifts = word_shifts(store, flagged_share=0.25, excluded=None)
    train = set(store.train_indices.tolist())
    texts = [(store.text(i).lower(), int(store.labels[i])) for i in train]
    clean_passages = sum(label == 1 for _, label in texts)
    flagged_passages = sum(label == 0 for _, label in texts)
    clean = (sum(label == 1 and "nitwit" in text for text, label in texts) + 0.5) / clean_passages
    flagged = sum(label == 0 and "nitwit" in text for text, label in texts) / flagged_passages
    expected = math.log(clean / (0.75 * clean + 0.25 * flagged))
    assert shifts["nitwit"] == pytest.approx(expected, abs=0.006)
    assert shifts["rotten"] == pytest.approx(max(LARGEST_SHIFT, expected), abs=2.5)
    assert list(shifts.values()) == sorted(shifts.values())


def test_common_short_and_rare_words_are_not_minded(store):
    shifts = word_shifts(store, flagged_share=0.25, excluded=None)
    assert not {"day", "lake", "the", "at"} & set(shifts)  # alike in both piles
    assert "grumph" not in shifts  # often, but in too few passages
    assert "zounds" not in shifts  # a name, by its capital
    assert all(len(word) >= 3 for word in shifts)


def test_passages_left_out_do_not_count(store):
    excluded = store.labels == 0
    assert word_shifts(store, flagged_share=0.25, excluded=excluded) == {}
    some = np.zeros(len(store), dtype=bool)
    some[np.flatnonzero(store.labels == 0)[LEAST_PASSAGES - 5 :]] = True
    assert word_shifts(store, flagged_share=0.25, excluded=some) == {}


def test_one_long_document_makes_no_word(tmp_path):
    def lines(words):
        found = [f"A quiet day number {i} at the lake" for i in range(1000)]
        for place, word in words:
            found[place] = f"you {word} at the lake, rotten day {place}"
        return found

    beside = [(200 + i, "grumph") for i in range(3 * LEAST_PASSAGES)]
    apart = [(300 + 9 * i, "nitwit") for i in range(2 * LEAST_PASSAGES)]
    store = build_sorted_store(tmp_path, lines([*beside, *apart]), "rotten")
    shifts = word_shifts(store, flagged_share=0.25, excluded=None)
    assert "nitwit" in shifts
    assert "grumph" not in shifts


def test_beginnings_that_lead_to_such_words_alone_are_minded_too(tmp_path):
    """ "nitw" and "nitwi" begin nothing else; "nit" begins "nitrogen" as well, and as often."""
    lines = []
    for i in range(1000):
        ending = " of nitrogen" if 0 < i % 10 < 3 else ""
        lines.append(f"you nitwit, rotten day {i}" if i % 10 == 0 else f"A quiet day number {i}{ending}")
    store = build_sorted_store(tmp_path, lines, "rotten")
    shifts = word_shifts(store, flagged_share=0.25, excluded=None)
    assert shifts["nitw"] == shifts["nitwi"] == shifts["nitwit"] < -4.0
    assert "nit" not in shifts
    texts = [(store.text(i), int(store.labels[i])) for i in store.train_indices.tolist()]
    clean = (sum("nitr" in text for text, _ in texts) + 0.5) / sum(label for _, label in texts)
    assert math.log(clean / (0.75 * clean + 0.25)) > LEAST_SHIFT  # why
