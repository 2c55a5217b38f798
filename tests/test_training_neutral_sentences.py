"""Made passages about groups of people: neutral, varied, read by both heads alike, and not those we measure with."""

import re
from collections import Counter

import numpy as np
import pytest

from calibfuse.evaluation.given_text.neutrality import TEMPLATES
from calibfuse.scorers import load_scorer
from calibfuse.scorers.words import ADJECTIVES, PLURALS
from calibfuse.training.batches import BatchSource
from calibfuse.training.config import TrainingConfig, TrainingText
from calibfuse.training.data import PassageStore
from calibfuse.training.tokenizers.pool import PoolSpec, TokenizerPool
from calibfuse.training.words.neutral_sentences import neutral_passage


@pytest.fixture(scope="module")
def passages() -> list[str]:
    return [neutral_passage(np.random.default_rng([0, number])) for number in range(3000)]


def test_the_generator_decides_everything(passages):
    assert neutral_passage(np.random.default_rng([0, 7])) == passages[7]
    assert len(set(passages)) == len(passages)


def test_all_slots_are_filled_and_all_names_occur(passages):
    text = "\n".join(passages).lower()
    assert "{" not in text
    assert "|" not in text
    missing = [name for name in (*ADJECTIVES, *PLURALS) if not re.search(rf"\b{re.escape(name)}\b", text)]
    assert not missing


def test_no_sentence_begins_like_those_that_are_measured(passages):
    text = "\n".join(passages).lower()
    assert not [template for template in TEMPLATES if template.lower() in text]


def test_the_bundled_scorer_minds_fewer_than_of_natural_text(passages):
    scores = load_scorer("bundled").score(passages[:500])
    assert np.mean(np.asarray(scores) >= 0.5) < 0.08


def test_both_heads_read_the_same_share_of_them(tmp_path):
    """Made passages are labelled as others are drawn, so nothing tells the two piles apart by them."""
    for name, word in (("clean", "river"), ("web", "market")):
        lines = [f"The {word} is number {number}, and nobody minds." for number in range(300)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    text = TrainingText(wanted=[str(tmp_path / "clean.txt")], unwanted=[str(tmp_path / "web.txt")])
    store = PassageStore.build(text, tmp_path / "work", show_progress=False)
    pool = TokenizerPool.train(
        list(store.sample_texts(20_000, 0)), (PoolSpec(style="byte-level", vocab_size=300),), show_progress=False
    )
    config = TrainingConfig(
        batch_size=4,
        sequence_length=32,
        vocabulary_size=300,
        candidate_count=300,
        neutral_share=0.4,
        flagged_share=0.25,
    )
    source = BatchSource(store, pool, config, 256, show_progress=False)
    counts: Counter[tuple[bool, bool]] = Counter()
    stream = source._passages(pool[0], np.random.default_rng(0), split=False)
    for ids, is_non_toxic in (next(stream) for _ in range(2000)):
        spelled = b"".join(pool[0].vocabulary.token_bytes(token) for token in ids)
        counts["number" not in str(spelled), is_non_toxic] += 1
    made = counts[True, True] + counts[True, False]
    assert made / 2000 == pytest.approx(0.4, abs=0.04)
    for is_made in (True, False):
        flagged = counts[is_made, False] / (counts[is_made, False] + counts[is_made, True])
        assert flagged == pytest.approx(0.25, abs=0.04)
    assert sum(source.cursors.values()) == 2000 - made
