"""The linear scorer: windows, invariants, round trip, damaged files, and the bundled one on real text."""

import json
import lzma
import os
import re

import numpy as np
import pytest

from calibfuse.errors import CheckpointError, CheckpointFormatError, InputError, ScorerError
from calibfuse.scorers import LinearScorer, ToxicityScorer, load_scorer
from calibfuse.scorers.linear import FeatureConfig, NgramHasher, Windows
from calibfuse.scorers.plain_words import split_words
from calibfuse.scorers.training import area_under_curve

TEXTS = ["A calm day at the sea.", "", "One", "Rain and wind, wind and rain, " * 9, "Ünïcödé — and \U0001f600 emoji"]
SMALL = FeatureConfig(bucket_bits=12)


@pytest.fixture
def scorer():
    weights = np.random.default_rng(0).normal(size=1 << SMALL.bucket_bits).astype(np.float16)
    return LinearScorer(weights, SMALL, bias=-1.0, windows=(2, 5), slope=0.3, intercept=0.1, name="random")


def slow_score(scorer, text):
    """Every word, n-gram and window in plain loops."""
    stream = split_words([text])
    hasher = NgramHasher(scorer.features)
    weights = scorer.weights
    values = []
    pairs, has_left = hasher.bigram_buckets(stream)
    for i in range(len(stream)):
        alone = split_words([stream.word(i).decode()])
        grams = [int(b) for buckets, exists in hasher.char_buckets(alone) for b in buckets[exists]]
        value = float(weights[hasher.word_buckets(alone)[0]])
        value += sum(float(weights[b]) for b in grams) / len(grams) ** 0.5
        values.append(value + (float(weights[pairs[i]]) if has_left[i] else 0.0))
    largest = scorer.windows[-1]
    sums = [sum(values[i : i + n]) for n in scorer.windows for i in range(len(values) - n + 1)]
    if 0 < len(values) <= largest:
        sums.append(sum(values))
    logit = scorer.bias + (max(sums) if sums else 0.0)
    return 1.0 / (1.0 + np.exp(-(scorer.slope * logit + scorer.intercept)))


def test_scores_equal_a_slow_loop(scorer):
    np.testing.assert_allclose(scorer.score(TEXTS), [slow_score(scorer, text) for text in TEXTS], atol=1e-6)


def test_windows_of_a_worked_example():
    """Text 0 has words 0-3, text 1 has word 4; sizes 2 and 3: 0-2, 1-3, 2-4 and 0-3, 1-4; word 4 alone."""
    windows = Windows.of(np.array([0, 0, 0, 0, 1]), (2, 3))
    pairs = sorted(zip(windows.starts.tolist(), windows.stops.tolist(), strict=True))
    assert pairs == [(0, 2), (0, 3), (1, 3), (1, 4), (2, 4), (4, 5)]
    assert windows.sums(np.array([1.0, 2, 4, 8, 16])).sum() == 3 + 7 + 6 + 14 + 12 + 16


def test_batches_do_not_change_scores(scorer, monkeypatch):
    alone = [float(scorer.score([text])[0]) for text in TEXTS]
    np.testing.assert_allclose(scorer.score(TEXTS), alone, atol=1e-9)
    monkeypatch.setattr("calibfuse.scorers.linear._BATCH_CHARACTERS", 8)
    np.testing.assert_allclose(scorer.score(TEXTS), alone, atol=1e-9)
    assert scorer.score([]).shape == (0,)


def test_permuting_texts_permutes_scores(scorer):
    order = [3, 0, 4, 1, 2]
    np.testing.assert_allclose(scorer.score([TEXTS[i] for i in order]), scorer.score(TEXTS)[order], atol=1e-9)


def test_a_longer_text_never_scores_below_a_whole_window_of_it(scorer):
    """The maximum over windows: words added behind cannot lower it once the largest window is full."""
    words = ("rain and wind from the west " * 4).split()
    scores = scorer.score([" ".join(words[:n]) for n in range(5, len(words))])
    assert (np.diff(scores) >= -1e-12).all()


def test_case_and_punctuation_do_not_matter(scorer):
    first, second = scorer.score(["Rain, and WIND!", "rain and wind"])
    assert first == pytest.approx(second)


def test_word_scores_are_those_of_the_words_alone(scorer):
    text = "Ünïcödé rain — w i n d and 🌧 sun"
    words = scorer.word_scores(text)
    assert [text[word.start : word.end] for word in words] == ["Ünïcödé", "rain", "w i n d", "and", "sun"]
    np.testing.assert_allclose([word.score for word in words], scorer.score([text[w.start : w.end] for w in words]))
    assert scorer.word_scores(" ") == []


def test_worst_part_scores_what_the_text_scores(scorer):
    text = TEXTS[3]
    window = scorer.worst_part(text)
    assert window in text
    assert len(window.split()) in scorer.windows
    assert scorer.score([window]) == pytest.approx(scorer.score([text]), abs=0.05)
    assert scorer.worst_part("") == ""


def test_save_and_load_keep_every_score(scorer, tmp_path):
    scorer.training = {"seed": 3}
    scorer.save(tmp_path / "a" / "b")
    loaded = LinearScorer.load(tmp_path / "a" / "b")
    assert loaded.score(TEXTS).tolist() == scorer.score(TEXTS).tolist()
    assert (loaded.name, loaded.windows, loaded.training) == ("random", (2, 5), {"seed": 3})
    assert isinstance(loaded, ToxicityScorer)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), CheckpointError, "no such file"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "no such file"),
        (lambda f: os.truncate(f / "model.safetensors", 500), CheckpointError, "no whole safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), CheckpointError, "no whole safetensors"),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "no JSON"),
        (lambda f: change_config(f, format="something-else"), CheckpointError, "something-else"),
        (lambda f: change_config(f, format_version=99), CheckpointFormatError, "newer"),
        (lambda f: change_config(f, bias=None), CheckpointError, "incomplete"),
        (lambda f: change_config(f, bias=float("nan")), CheckpointError, "finite"),
        (lambda f: change_config(f, windows=[]), CheckpointError, "Window sizes"),
        (lambda f: change_config(f, features={"bucket_bits": 13}), CheckpointError, "shape"),
        (lambda f: change_config(f, features={"colour": 1}), CheckpointError, "colour"),
    ],
    ids=[
        "no config",
        "no weights",
        "truncated",
        "pickle",
        "broken json",
        "foreign",
        "newer",
        "incomplete",
        "nan",
        "no window",
        "other size",
        "unknown feature",
    ],
)
def test_a_damaged_folder_gives_one_sentence(scorer, tmp_path, damage, error, message):
    scorer.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message) as raised:
        LinearScorer.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_an_older_scorer_does_not_read_masked_words(scorer, tmp_path):
    scorer.save(tmp_path)
    assert LinearScorer.load(tmp_path).features.unmask
    config = json.loads((tmp_path / "config.json").read_text())
    del config["features"]["unmask"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not LinearScorer.load(tmp_path).features.unmask


def test_a_flipped_bit_in_the_weights_is_found(scorer, tmp_path):
    scorer.save(tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        LinearScorer.load(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(scorer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="Cannot write"):
        scorer.save(tmp_path / "file" / "scorer")


@pytest.mark.parametrize(
    "arguments",
    [{"windows": ()}, {"windows": (5, 2)}, {"windows": (0,)}, {"slope": 0.0}, {"bias": float("nan")}],
    ids=str,
)
def test_impossible_parts_are_refused(arguments):
    with pytest.raises(InputError):
        LinearScorer(np.zeros(1 << 12), SMALL, **arguments)


def test_weights_of_the_wrong_size_are_refused():
    with pytest.raises(InputError, match=re.escape("(4096,)")):
        LinearScorer(np.zeros(7), SMALL)


def test_texts_that_are_no_texts_are_refused(scorer):
    with pytest.raises(ScorerError, match=r"pass \[text\]"):
        scorer.score("one string")
    with pytest.raises(ScorerError, match="text 1 is NoneType"):
        scorer.score(["fine", None])


# ---- the bundled scorer


def test_the_bundled_scorer_is_small_and_told_mild_from_kind(repository):
    files = list((repository / "calibfuse" / "pretrained" / "default-scorer").iterdir())
    assert sum(file.stat().st_size for file in files) < 3_000_000
    scorer = load_scorer()
    rude = ["You are a stupid idiot.", "What a pathetic moron, shut up.", "this sucks, you idiot"]
    kind = [
        "Thank you for the kind words.",
        "The train leaves at nine.",
        "My gay friend and his Muslim neighbour sing.",
        "",
    ]
    assert scorer.score(rude).min() > 0.5 > scorer.score(kind).max()


def test_one_rude_word_counts_in_a_long_paragraph():
    scorer = load_scorer()
    calm = "we walked along the river and talked about the weather and the garden " * 8
    assert scorer.score([calm])[0] < 0.5 < scorer.score([calm + "you idiot " + calm])[0]


def rows(path, count):
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(count), file, strict=False)]


def test_the_bundled_scorer_tells_toxic_comments_apart(shared_data):
    """Comments of the Jigsaw test split, which it was not trained on; docs/scorer.md has the full figures."""
    chosen = [
        row for row in rows(shared_data / "toxicity" / "jigsaw.jsonl.xz", 60_000) if row["split"] == "jigsaw_test"
    ]
    chosen = chosen[::6]
    scores = load_scorer().score([row["text"] for row in chosen])
    assert area_under_curve(scores, np.array([row["toxic"] for row in chosen], dtype=float)) > 0.91


def test_identity_terms_alone_are_not_toxic(shared_data):
    neutral = [
        row["text"] for row in rows(shared_data / "bias" / "identity_madlibs.jsonl.xz", 12_000) if not row["toxic"]
    ]
    assert (load_scorer().score(neutral) > 0.5).mean() < 0.02


@pytest.mark.parametrize(
    "text",
    [
        "screw the top screw to the bolts",
        "personal favorite super funk",
        "you're a hero. She loves it.",
        "The cock crowed.",
    ],
)
def test_the_bundled_scorer_reads_ambiguous_words_in_context(text):
    assert load_scorer().score([text])[0] < 0.5


@pytest.mark.parametrize(
    "text", ["b*tch", "a**hole", "f**k", "f*cking", "sh!t", "f u c k", "fvck", "You are such a b*tch"]
)
def test_the_bundled_scorer_reads_masked_words(text):
    assert load_scorer().score([text])[0] > 0.5
