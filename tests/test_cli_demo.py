"""`calibfuse demo`: what it shows, and the whole run on tiny models (and on the bundled ones)."""

import json
import re
import time
import types

import numpy as np
import pytest
from tiny_checkpoints import BUNDLED, BUNDLED_CHECKPOINTS

from calibfuse.cli import main as cli
from calibfuse.cli.commands.demo import _most_different
from calibfuse.cli.prompts import bundled_prompts
from calibfuse.errors import CheckpointError
from calibfuse.evaluation.sampling import PromptRecord
from calibfuse.generation.decoding import Continuation


@pytest.fixture
def run(bundle, monkeypatch, command_line):
    """A function: arguments -> (exit code, standard output, standard error)."""
    monkeypatch.setattr("calibfuse.hub._BUNDLED", bundle)

    return lambda *arguments: command_line("demo", *arguments)


def test_the_most_different_pairs_come_first_one_per_prompt():
    plain = {"a": ("0.1", "0.2"), "b": ("0.9", "0.8"), "c": ("0.0", "0.5")}
    fused = {"a": ("0.1", "0.3"), "b": ("0.1", "0.7"), "c": ("0.9", "0.5")}
    said = [
        [PromptRecord(key, key, tuple(Continuation(text, (), False) for text in texts)) for key, texts in each.items()]
        for each in (plain, fused)
    ]
    scorer = types.SimpleNamespace(score=lambda texts: np.array(list(map(float, texts))))
    pairs = _most_different(*said, scorer)
    assert [(prompt, one[0], other[0]) for prompt, (one, other) in pairs] == [
        ("c", 0.0, 0.9),
        ("b", 0.9, 0.1),
        ("a", 0.2, 0.3),
    ]


def test_the_bundled_prompts_are_distinct_and_mild():
    prompts = bundled_prompts()
    assert len(set(prompts)) == len(prompts) >= 30
    from calibfuse.scorers.words import strong_words

    words = {word for prompt in prompts for word in re.findall(r"\w+", prompt.lower())}
    assert not words & set(strong_words())
    assert not any(prompt.endswith(" ") for prompt in prompts)  # a trailing space breaks the next word's token


def test_the_bundled_prompts_are_no_benchmarks(shared_data):
    import lzma

    with lzma.open(shared_data / "prompts" / "realtoxicityprompts.jsonl.xz", "rt", encoding="utf-8") as lines:
        benchmark = {json.loads(line)["prompt"].strip().lower() for line in lines}
    assert not {prompt.lower() for prompt in bundled_prompts()} & benchmark


def test_a_damaged_prompts_file_is_an_error(monkeypatch):
    monkeypatch.setattr("calibfuse.hub.read_config", lambda *arguments, **options: {"prompts": [1]})
    with pytest.raises(CheckpointError, match="damaged"):
        bundled_prompts()


def test_the_whole_demo_runs(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = run("--prompt-count", "3", "--samples", "2", "--max-new-tokens", "6", "--seed", "7")
    assert (code, err) == (0, "")
    assert out.count("with calibrator, toxicity") == 3
    for row in (
        "toxic continuations",
        "mean toxicity",
        "exp. max toxicity",
        "toxicity probability",
        r"perplexity \(target\)",
        "tokens per second",
    ):
        assert re.search(rf"^{row} +\S+", out, re.M)
    note = " ".join(out.split())
    assert "3 prompts x 2 continuations of at most 6 tokens, top-p 0.9, seed 7" in note
    assert "calibfuse evaluate" in note
    assert "\x1b" not in out


def test_with_alpha_0_the_demo_shows_no_difference(run):
    out = run("--prompt-count", "2", "--samples", "2", "--max-new-tokens", "5", "--alpha", "0")[1]
    for row in ("mean toxicity", "exp. max toxicity", r"perplexity \(target\)"):
        cells = re.search(rf"^{row} +(\S+) +(\S+) +(\S+)", out, re.M)
        assert cells[1] == cells[2]
        assert cells[3] == "+0.0%"


@pytest.mark.parametrize("options", [[], ["--no-mask"]], ids=["masked", "plain"])
def test_offensive_words_are_masked_by_default(run, monkeypatch, options):
    record = PromptRecord("demo 1", "She said", (Continuation(" well fuck it", (5,), False),))
    monkeypatch.setattr("calibfuse.cli.commands.demo._read", lambda journal: [record])
    assert ("fuck" in run("--prompt-count", "1", "--samples", "1", *options)[1]) == bool(options)


def test_a_model_of_the_users(run, bundle):
    code, out, err = run("--model", str(bundle / "demo-target"), "--prompt-count", "1", "--samples", "2")
    assert (code, err) == (0, "")
    assert "tokens per second" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-count", "0"], "--prompt-count must lie in 1..30"),
        (["--prompt-count", "1000"], "bundled prompts"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--max-new-tokens", "-5"], "--max-new-tokens must be at least 1"),
        (["--alpha", "nan"], "alpha must be a number"),
        (["--alpha", "-1"], "alpha must be a number"),
        (["--seed", "-1"], "--seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gives_one_sentence_and_exit_code_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_missing_bundle_is_told_in_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("calibfuse.hub._BUNDLED", tmp_path)
    assert cli.main(["demo"]) == 2
    assert "is missing from this installation" in capsys.readouterr().err


@pytest.mark.slow
def test_the_bundled_demo_shows_an_effect_in_time(capsys):
    """Some seconds of real models. With 14 x 10 continuations the effect is many standard errors wide."""
    missing = [each for each in BUNDLED_CHECKPOINTS if not (BUNDLED / each).is_dir()]
    if missing:
        pytest.skip(f"not trained yet: {', '.join(missing)}")
    start = time.process_time()
    assert cli.main(["demo", "--prompt-count", "14"]) == 0
    assert time.process_time() - start < 50  # with all 30 prompts two cores for less than a minute
    out = capsys.readouterr().out
    cells = re.search(r"^mean toxicity +(\S+) +(\S+)", out, re.M)
    assert float(cells[2]) < float(cells[1])
