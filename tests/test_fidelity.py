"""Bits per byte, among all tokens and among candidates, and the scripts that compare them across vocabularies."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_calibrators import make_bound, make_calibrator, make_vocabulary

from calibfuse.bits_per_byte import measure_fidelity
from calibfuse.vocabulary import Vocabulary

SIZE = 96


def random_sequences(count=6, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, SIZE, generator.integers(1, 9)).tolist() for _ in range(count)]


WORDS = {first + second: -2.0 for first in "abcdefgh" for second in "abcdefghijklmnop"} | {"a": 1.0, "b": -1.0}


@pytest.fixture(scope="module")
def bound():
    return make_bound()


@pytest.fixture(scope="module")
def minding():
    """With words that most random sequences complete."""
    calibrator = make_calibrator(words=WORDS)
    return calibrator.bind(make_vocabulary(SIZE), use_disk_cache=False)


@pytest.fixture(scope="module")
def script(load_tool):
    return load_tool("measure_fidelity")


@pytest.mark.parametrize("head", ["calibrator", "reference"])
@pytest.mark.parametrize("name", ["bound", "minding"])
def test_both_figures_equal_a_slow_loop(name, head, request, script):
    bound = request.getfixturevalue(name)
    sequences = random_sequences()
    candidates = script.FrequentCandidates(sequences, SIZE, count=3)
    result = measure_fidelity(bound, sequences, head=head, batch_size=2)
    nats = restricted = byte_count = 0
    for sequence in sequences:
        ask = bound.log_probs if head == "calibrator" else bound.reference_log_probs
        rows = torch.cat([bound.first_log_probs(head)[None], ask(torch.tensor([sequence]))[0]])
        for place, token in enumerate(sequence):
            if bound.vocabulary.is_special[token]:
                continue
            before = torch.tensor([sequence[place - 1] if place else -1])
            allowed = set(candidates(before)[0].nonzero()[:, 0].tolist()) | {token}
            allowed = [each for each in sorted(allowed) if not bound.vocabulary.is_special[each]]
            nats -= float(rows[place, token])
            restricted += float(rows[place, allowed].logsumexp(0) - rows[place, token])
            byte_count += len(bound.vocabulary.token_bytes(token))
    assert result.bytes == byte_count
    assert result.nats == pytest.approx(nats, rel=1e-4)
    assert script.restricted_nats(bound, sequences, candidates, head=head) == pytest.approx(restricted, rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(sequences=st.lists(st.lists(st.integers(0, 7), max_size=6), max_size=6), count=st.integers(1, 4))
def test_candidates_are_the_frequent_tokens_and_followers(script, sequences, count):
    candidates = script.FrequentCandidates(sequences, 8, count=count)
    totals = np.bincount([token for sequence in sequences for token in sequence], minlength=8)
    for before in range(-1, 8):
        followers = np.zeros(8, dtype=int)
        for sequence in sequences:
            for one, other in zip([-1, *sequence], sequence, strict=False):
                followers[other] += one == before
        chosen = set(candidates(torch.tensor([before]))[0].nonzero()[:, 0].tolist())
        frequent = set(np.argsort(-totals, kind="stable")[:count].tolist())
        assert frequent <= chosen
        most = sorted(followers[followers > 0], reverse=True)[:count]
        assert sorted((followers[token] for token in chosen if followers[token]), reverse=True)[: len(most)] == most
        assert all(followers[token] for token in chosen - frequent)


def test_a_map_of_equal_strings_onto_the_same_vocabulary_is_the_calibrator_itself(script, bound):
    sequences = [[token for token in sequence if token > 2] for sequence in random_sequences()]
    counts = np.ones(SIZE, dtype=np.int64)
    carried = script.EqualStrings(bound, bound.vocabulary, counts)
    expected = measure_fidelity(bound, sequences)
    # nothing is left for tokens without an equal one, and of special tokens neither says anything
    assert carried.uncovered_mass == pytest.approx(0.0, abs=1e-9)
    assert carried.nats(sequences, "calibrator") == pytest.approx(expected.nats, rel=2e-3)


def test_a_map_of_equal_strings_is_a_distribution(script, bound):
    tokens = [bound.vocabulary.token_bytes(i) or None for i in range(40)]
    target = Vocabulary.from_byte_strings([*tokens, b"unheard of", b"a\xffb"])
    counts = np.arange(len(target))
    carried = script.EqualStrings(bound, target, counts)
    total = sum(
        math.exp(-carried.nats([[10, token]], "calibrator") + carried.nats([[10]], "calibrator"))
        for token in range(len(target))
        if not target.is_special[token]
    )
    assert total == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_the_script_compares_tokenizers(repository, sample_lines, byte_level_tokenizer, tmp_path, monkeypatch):
    from calibfuse.training.config import TrainingText
    from calibfuse.training.data import PassageStore
    from calibfuse.training.tokenizers.pool import PoolSpec, TokenizerPool

    text = tmp_path / "text.jsonl"
    rows = [json.dumps({"text": " ".join(sample_lines[i : i + 5])}) for i in range(len(sample_lines))]
    text.write_text("\n".join(rows))
    monkeypatch.setattr("calibfuse.training.data.VALIDATION_SHARE", 0.2)
    store = PassageStore.build(TrainingText(wanted=[str(text)]), tmp_path, show_progress=False)
    TokenizerPool.train(
        [row * 3 for row in rows], [PoolSpec(style="byte-level", vocab_size=300)], show_progress=False
    ).save(tmp_path / "pool")
    files = tmp_path / "tokenizers"
    files.mkdir()
    byte_level_tokenizer.save(str(files / "own.json"))

    make_calibrator().save_pretrained(tmp_path / "calibrator")
    command = [sys.executable, str(repository / "tools" / "measure_fidelity.py")]
    command += ["--calibrator", tmp_path / "calibrator", "--tokenizers", files, "--pool", tmp_path / "pool"]
    command += ["--bytes", 1500, "--store", store.folder, "--candidates", 5, "--equal-strings", "--counted-bytes", 2000]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| own.json | unseen | 600 |" in done.stdout
