"""Training of the linear scorer: gradient, optimiser, calibration, files, and the command."""

import csv
import gzip
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calibfuse.cli.main import main
from calibfuse.errors import DataError, InputError
from calibfuse.scorers import LinearScorer
from calibfuse.scorers.labelled_files import LabelledTexts, read_labelled, read_pairs, read_texts
from calibfuse.scorers.linear import FeatureConfig
from calibfuse.scorers.recipe import (
    ScorerData,
    added_texts,
    gather,
    identity_sentences,
    insert_words,
    overlapping_texts,
)
from calibfuse.scorers.training import (
    TrainingOptions,
    _Objective,
    area_under_curve,
    fit_platt,
    train_linear_scorer,
)
from calibfuse.scorers.words import ADJECTIVES, PLURALS, identity_terms, strong_words

REPOSITORY = Path(__file__).resolve().parent.parent
NOUNS = ["garden", "train", "window", "letter", "river", "song", "table", "teacher", "winter", "house"]
SMALL = FeatureConfig(bucket_bits=14)


def made_up_texts(n=400, seed=0):
    """Half of the texts hold "grumble" or "snarl" among everyday words."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for i in range(n):
        words = rng.choice(NOUNS, size=rng.integers(3, 30)).tolist()
        if i % 2:
            words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(["grumble", "snarl"])))
        texts.append(" ".join(words))
        labels.append(float(i % 2))
    return LabelledTexts.build(texts, labels)


@pytest.fixture(scope="module")
def trained():
    return train_linear_scorer(made_up_texts(), TrainingOptions(features=SMALL, iterations=40), name="made-up")


def test_gradient_equals_finite_differences():
    data = LabelledTexts.build(["a b c d e f g", "one two", "b b b", ""], [1.0, 0.3, 0.0, 1.0])
    objective = _Objective(data, TrainingOptions(features=SMALL, windows=(1, 3), l2=0.1))
    rng = np.random.default_rng(0)
    point = rng.normal(size=objective.size)
    _, gradient = objective(point)
    for i in [*rng.integers(objective.size, size=10).tolist(), objective.size - 1]:
        step = np.zeros(objective.size)
        step[i] = 1e-5
        slope = (objective(point + step)[0] - objective(point - step)[0]) / 2e-5
        assert gradient[i] == pytest.approx(slope, abs=1e-8)


def test_platt_recovers_slope_and_intercept():
    """20,000 draws from a known curve: the estimates' standard errors are about 0.02, the tolerance five of them."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=20_000) * 2
    labels = (rng.random(20_000) < 1 / (1 + np.exp(-(0.7 * logits - 0.4)))).astype(float)
    slope, intercept = fit_platt(logits, labels)
    assert slope == pytest.approx(0.7, abs=0.1)
    assert intercept == pytest.approx(-0.4, abs=0.1)


def test_platt_refuses_scores_that_fall_with_toxicity():
    with pytest.raises(DataError, match="labels swapped"):
        fit_platt(np.linspace(-5, 5, 200), np.linspace(1, 0, 200))


def test_area_under_curve_equals_counting_pairs():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 8, size=60).astype(float), (rng.random(60) > 0.6).astype(float)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels > 0.5] for b in scores[labels < 0.5]]
    assert area_under_curve(scores, labels) == pytest.approx(np.mean(pairs))
    with pytest.raises(DataError, match="both classes"):
        area_under_curve(scores, np.zeros(60))


def test_training_finds_the_words_that_matter(trained):
    assert trained.training["held_out_auc"] > 0.99
    assert trained.score(["grumble", "the river snarl song", "a garden in winter"]).round().tolist() == [1, 1, 0]
    assert trained.score(["garden train " * 60 + "snarl " + "river song " * 60])[0] > 0.5


def test_training_twice_gives_the_same_scorer(trained):
    again = train_linear_scorer(made_up_texts(), TrainingOptions(features=SMALL, iterations=40), name="made-up")
    assert again.score(NOUNS).tolist() == trained.score(NOUNS).tolist()


def test_what_training_returns_is_what_comes_back_from_disk(trained, tmp_path):
    trained.save(tmp_path)
    assert LinearScorer.load(tmp_path).score(NOUNS).tolist() == trained.score(NOUNS).tolist()


def test_neutral_words_say_little_whatever_the_labels():
    options = TrainingOptions(features=SMALL, iterations=40)
    plain = train_linear_scorer(made_up_texts(), options)
    capped = train_linear_scorer(made_up_texts(), options, neutral_words=["snarl"])
    assert plain.logits(["snarl"])[0] - plain.bias > 1.0
    assert capped.logits(["snarl"])[0] - capped.bias == pytest.approx(0.5, abs=0.01)
    assert capped.logits(["grumble"])[0] == pytest.approx(plain.logits(["grumble"])[0], abs=0.01)


def test_added_texts_never_hold_held_out_ones():
    seen = []

    def augment(texts):
        seen.extend(texts.texts)

    data = made_up_texts(100)
    train_linear_scorer(data, TrainingOptions(features=SMALL, iterations=2, held_out=0.2), augment=augment)
    assert len(seen) == 80


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["a"] * 40, [1.0] * 40, "both classes"),
        (["..."] * 40, [0.0, 1.0] * 20, "has a word"),
        (["a", "b"], [0.0, 1.0], "both classes"),
    ],
    ids=["one class", "no words", "too few"],
)
def test_texts_that_teach_nothing_are_refused(texts, labels, message):
    with pytest.raises(DataError, match=message):
        train_linear_scorer(LabelledTexts.build(texts, labels), TrainingOptions(features=SMALL))


@pytest.mark.parametrize(
    "values",
    [
        {"windows": (0,)},
        {"l2": -1.0},
        {"l2": float("nan")},
        {"pool_temperature": 0.0},
        {"iterations": 0},
        {"held_out": 1.0},
    ],
    ids=str,
)
def test_impossible_options_are_refused(values):
    with pytest.raises(InputError):
        TrainingOptions(**values)


@pytest.mark.parametrize("labels", [[0.0], [0.0, 2.0], [0.0, float("nan")]], ids=["too few", "above one", "nan"])
def test_wrong_labels_are_refused(labels):
    with pytest.raises(DataError, match="labels|Label of text 1"):
        LabelledTexts.build(["a", "b"], labels)


# ---- added texts


def test_identity_sentences_are_balanced_and_filled_in():
    sentences = identity_sentences(per_term=3)
    assert len(sentences) == 6 * (len(ADJECTIVES) + len(PLURALS)) == 6 * len(identity_terms())
    assert sentences.labels.mean() == 0.5
    assert not any("{" in text for text in sentences.texts)
    assert identity_sentences(per_term=1, seed=1).texts == identity_sentences(per_term=1, seed=1).texts
    with pytest.raises(InputError, match="per_term"):
        identity_sentences(per_term=0)


def test_inserted_words_keep_or_take_labels():
    carriers = LabelledTexts.build(["calm words here", "angry words there"], [0.0, 1.0])
    kept = insert_words(["green"], carriers, per_word=4)
    assert kept.labels.tolist() == [0, 1, 0, 1]
    assert all("green" in text.split() for text in kept.texts)
    taken = insert_words(["green"], carriers, per_word=4, label=1.0)
    assert taken.labels.tolist() == [1, 1, 1, 1]
    assert all("calm" in text for text in taken.texts)
    with pytest.raises(DataError, match="both classes"):
        insert_words(["green"], LabelledTexts.build(["calm"], [0.0]), per_word=1)


def test_strong_words_are_plain_and_distinct():
    words = strong_words()
    assert len(set(words)) == len(words) > 100
    assert all(re.fullmatch(r"[a-z]+", word) for word in words)
    assert not set(words) & set(identity_terms())


# ---- overlaps


def test_overlap_finds_copied_passages_and_nothing_else():
    others = [
        "Long ago there was a small house by the old river and nobody lived in it.",
        "Short but complete sentence.",
    ]
    texts = [
        "He wrote: there was a small house by the OLD river!",  # nine words in a row
        "there was a small house by my river",  # eight words, not in a row
        "short, but complete: sentence",  # a whole text of four words
        "complete sentence",  # too short to count
        "",
    ]
    assert overlapping_texts(texts, others).tolist() == [True, False, True, False, False]
    assert overlapping_texts(texts, []).tolist() == [False] * 5


def test_overlap_equals_a_slow_search():
    rng = np.random.default_rng(3)
    texts = [" ".join(rng.choice(list("xyz"), size=rng.integers(1, 14))).replace("x", "ex") for _ in range(60)]
    others = [" ".join(rng.choice(list("xyz"), size=40)).replace("x", "ex") for _ in range(6)]
    texts = [text.replace("y", "yes").replace("z", "zoo") for text in texts]
    others = [text.replace("y", "yes").replace("z", "zoo") for text in others]

    def slow(text):
        words = text.split()
        n = min(8, len(words))
        runs = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        return n >= 4 and any(f" {run} " in f" {other} " for run in runs for other in others)

    assert overlapping_texts(texts, others).tolist() == [slow(text) for text in texts]


# ---- files


def write_rows(path, rows):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if ".csv" in path.name:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"text": 'rain, and\n"wind"', "toxic": 0, "split": "train"},
    {"text": "grumble", "toxic": 1, "split": "train"},
    {"text": "  ", "toxic": 1, "split": "train"},
    {"text": "snow", "toxic": 0.25, "split": "test"},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.csv", "a.csv.gz"])
def test_labelled_rows_are_read_from_every_kind_of_file(tmp_path, name):
    path = write_rows(tmp_path / name, ROWS)
    everything = read_labelled([path])
    assert everything.texts == ['rain, and\n"wind"', "grumble", "snow"]
    assert everything.labels.tolist() == [0, 1, 0.25]
    assert read_labelled([path], where={"split": "test"}).texts == ["snow"]


def test_pairs_give_both_classes(tmp_path):
    rows = [{"toxic": "grumble", "neutral": ["a word", "another", "third"]}, {"toxic": "snarl", "neutral": "calm"}]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    pairs = read_pairs([path])
    assert pairs.texts == ["grumble", "a word", "another", "snarl", "calm"]
    assert pairs.labels.tolist() == [1, 0, 0, 1, 0]
    assert read_texts([path]) == ["grumble", "a word", "another", "third", "snarl", "calm"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "a"}\n', "line 1 has no label"),
        ("a.jsonl", b'{"label": 1}\n', "line 1 has no text"),
        ("a.jsonl", b'{"text": "a", "label": "very"}\n', "label 'very'"),
        ("a.jsonl", b'{"text": "a", "label": 7}\n', "label 7"),
        ("a.jsonl", b'{"text": 3, "label": 1}\n', "int where its text"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', "line 2: expected one JSON object per line"),
        ("a.jsonl", b"[1]\n", "expected a JSON object .* got list"),
        ("a.jsonl", b"\xff\xfe\x00\x80", "expected UTF-8"),
        ("a.jsonl.xz", b"not compressed", "damaged"),
        ("a.jsonl.gz", b"not compressed", "damaged"),
        ("a.csv", b"id\n1\n", "no text"),
        ("a.parquet", b"PAR1", "jsonl or .csv"),
    ],
    ids=str,
)
def test_unusable_files_give_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read_labelled([tmp_path / name])
    assert "\n" not in str(raised.value)


def test_missing_files_and_conditions_that_never_hold_are_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_labelled([tmp_path / "nothing.jsonl"])
    with pytest.raises(DataError, match="no usable row where"):
        read_labelled([write_rows(tmp_path / "a.jsonl", ROWS)], where={"split": "validation"})


def test_gathering_excludes_repeats_and_distrusts_lower_case(tmp_path):
    rows = [
        {"text": "The garden by the river is green today", "label": 0},
        {"text": "the table in the house has no window", "label": 0},
        {"text": "grumble and snarl at the teacher all day", "label": 1},
        {"text": "Winter came early to the town that year", "label": 0},
    ]
    data = write_rows(tmp_path / "data.jsonl", rows)
    other = write_rows(tmp_path / "other.jsonl", [{"text": "winter came early to the town that year, he said"}])
    source = ScorerData(data=[data], exclude=[other], distrust_lowercase=True, background=["plain words"])
    gathered = gather(source)
    assert gathered.labelled.texts == [rows[0]["text"], rows[2]["text"], "plain words"]
    assert gathered.n_excluded == 1
    assert added_texts(source, gathered.labelled) is None
    with pytest.raises(DataError, match="nothing is left"):
        gather(ScorerData(data=[data], exclude=[data]))


# ---- the command


def run_command(*arguments, folder):
    return subprocess.run(
        [sys.executable, "-m", "calibfuse", "train-scorer", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=120,
        check=False,
    )


def test_the_command_trains_a_scorer_that_loads(tmp_path):
    data = made_up_texts()
    rows = [{"text": text, "toxic": label} for text, label in zip(data.texts, data.labels.tolist(), strict=True)]
    write_rows(tmp_path / "data.jsonl.xz", rows)
    (tmp_path / "clean.txt").write_text("\n\n".join(f"The {noun} is old." for noun in NOUNS))
    result = run_command(
        *("--data", "data.jsonl.xz", "--non-toxic", "clean.txt", "--strong-words", "--identity-terms"),
        *("--bucket-bits", 16, "--iterations", 15, "--output", "mine"),
        folder=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "Scorer written to mine" in result.stdout
    scorer = LinearScorer.load(tmp_path / "mine")
    assert scorer.name == "mine"
    assert scorer.score(["snarl"])[0] > scorer.score(["garden"])[0]
    assert scorer.training["data"] == ["data.jsonl.xz"]


def test_the_command_keeps_the_scorer_that_is_there(tmp_path, monkeypatch, capsys, trained):
    monkeypatch.chdir(tmp_path)
    trained.save("mine")
    before = Path("mine/model.safetensors").read_bytes()
    assert main(["train-scorer", "--data", "missing.jsonl", "--output", "mine"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Path("mine/model.safetensors").read_bytes() == before
    assert main(["train-scorer", "--data", "missing.jsonl", "--output", "mine", "--overwrite"]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs labelled texts"),
        (["--data", "missing.jsonl"], "No such file"),
        (["--data", "missing.jsonl", "--where", "split"], "FIELD=VALUE"),
        (["--data", "missing.jsonl", "--windows", "5", "2"], "ascending"),
        (["--data", "missing.jsonl", "--bucket-bits", "40"], "must lie in 8..24"),
    ],
    ids=["no data", "missing file", "condition", "windows", "buckets"],
)
def test_the_command_refuses_bad_input_in_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train-scorer", *arguments, "--output", "mine"]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "mine").exists()
