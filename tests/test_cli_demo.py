"""`calibfuse demo`: its figures by hand, its fairness, and the whole run on tiny models (and on the bundled ones)."""

import json
import math
import re
import time

import pytest
import torch
from tiny_calibrators import make_calibrator
from tiny_checkpoints import BUNDLED, BUNDLED_CHECKPOINTS, save_bundle

from calibfuse.cli import main as cli
from calibfuse.cli.commands.demo import bundled_prompts
from calibfuse.cli.comparison import Outcome, continuation_nats, continue_both, most_different, score, speed_kept
from calibfuse.errors import CheckpointError, InputError
from calibfuse.fusion import FusionConfig
from calibfuse.generation.decoding import Decoding
from calibfuse.generation.language_model import load_language_model
from calibfuse.processor import CalibFusion


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, byte_level_tokenizer, wrap_tokenizer, tiny_llama):
    tokenizer = wrap_tokenizer(byte_level_tokenizer)
    return save_bundle(tmp_path_factory.mktemp("bundle"), tiny_llama(len(tokenizer)), tokenizer)


@pytest.fixture(scope="module")
def target(bundle):
    return load_language_model(str(bundle / "demo-target"))


@pytest.fixture
def run(bundle, monkeypatch, capsys):
    """A function: arguments -> (exit code, standard output, standard error)."""
    monkeypatch.setattr("calibfuse.hub.remote._BUNDLED", bundle)

    def call(*arguments):
        try:
            code = cli.main(["demo", *arguments])
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_figures_are_those_worked_by_hand():
    """Two prompts, two continuations each, scores .9 .1 and .2 .4.

    Toxic: one of four. Mean: 1.6 / 4. Worst per prompt: .9 and .4, mean .65; one of two prompts has a toxic one.
    """
    outcome = Outcome(toxicity=[[0.9, 0.1], [0.2, 0.4]], nats=math.log(8) * 5, scored_tokens=5)
    outcome.seconds_per_token = [0.5, 0.1, 0.2]
    assert outcome.toxic_share == 0.25
    assert outcome.mean_toxicity == pytest.approx(0.4)
    assert outcome.expected_maximum == pytest.approx(0.65)
    assert outcome.toxicity_probability == 0.5
    assert outcome.perplexity == pytest.approx(8.0)
    assert outcome.tokens_per_second == pytest.approx(5.0)


def test_the_speed_kept_is_the_median_of_pairs():
    """Ratios .5, 1 and .8: a single slow moment of the machine does not count."""
    outcomes = {"plain": Outcome(seconds_per_token=[1, 9, 4]), "fused": Outcome(seconds_per_token=[2, 9, 5])}
    assert speed_kept(outcomes) == 0.8


def test_the_most_different_pairs_come_first_one_per_prompt():
    outcomes = {
        "plain": Outcome(toxicity=[[0.1, 0.2], [0.9, 0.8], [0.0, 0.5]]),
        "fused": Outcome(toxicity=[[0.1, 0.3], [0.1, 0.7], [0.9, 0.5]]),
    }
    assert most_different(outcomes, 2) == [(2, 0), (1, 0)]
    assert most_different(outcomes, 9) == [(2, 0), (1, 0), (0, 1)]


def test_perplexity_counts_each_token_of_each_continuation_once(target):
    """Against one forward pass per token."""
    prompt, rows = [5, 6, 7], [(10, 11, 12), (), (20,), (30, 31)]
    expected = 0.0
    for row in rows:
        for place, token_id in enumerate(row):
            with torch.no_grad():
                logits = target.model(torch.tensor([[*prompt, *row[:place]]])).logits[0, -1]
            expected -= float(logits.log_softmax(-1)[token_id])
    nats, tokens = continuation_nats(target, prompt, rows)
    assert tokens == 6
    assert nats == pytest.approx(expected, rel=1e-4)
    assert continuation_nats(target, prompt, [()]) == (0.0, 0)


def test_plain_and_fused_start_from_the_same_draws(target):
    """With alpha 0 both say the same; with the calibrator on they do not."""
    decoding = Decoding(max_new_tokens=8, samples=3)
    guide = make_calibrator().bind(target.tokenizer)
    off = continue_both(target, CalibFusion(guide, FusionConfig(alpha=0.0)), ["The river", "She"], decoding, seed=4)
    assert off["plain"].texts == off["fused"].texts
    assert off["plain"].nats == off["fused"].nats
    on = continue_both(target, CalibFusion(guide), ["The river", "She"], decoding, seed=4)
    assert on["plain"].texts == off["plain"].texts
    assert on["fused"].texts != on["plain"].texts
    assert [len(texts) for texts in on["plain"].texts] == [3, 3]
    assert len(on["plain"].seconds_per_token) == len(on["fused"].seconds_per_token) == 2


def test_scores_go_to_the_texts_they_belong_to():
    class Length:
        name = "length"

        def score(self, texts):
            return [len(text) / 10 for text in texts]

    outcome = Outcome(texts=[["a", "bbb"], ["cc", "dddd"]])
    score(outcome, Length())
    assert outcome.toxicity == [[0.1, 0.3], [0.2, 0.4]]


def test_the_bundled_prompts_are_distinct_and_mild():
    prompts = bundled_prompts(30)
    assert len(set(prompts)) == 30
    from calibfuse.scorers.words import strong_words

    words = {word for prompt in prompts for word in re.findall(r"\w+", prompt.lower())}
    assert not words & set(strong_words())
    assert not any(prompt.endswith(" ") for prompt in prompts)  # a trailing space breaks the next word's token


def test_the_bundled_prompts_are_no_benchmarks(shared_data):
    import lzma

    with lzma.open(shared_data / "prompts" / "realtoxicityprompts.jsonl.xz", "rt", encoding="utf-8") as lines:
        benchmark = {json.loads(line)["prompt"].strip().lower() for line in lines}
    assert not {prompt.lower() for prompt in bundled_prompts(30)} & benchmark


def test_a_damaged_prompts_file_is_an_error(monkeypatch):
    monkeypatch.setattr("calibfuse.hub.read_config", lambda *arguments, **options: {"prompts": [1]})
    with pytest.raises(CheckpointError, match="damaged"):
        bundled_prompts(1)
    monkeypatch.undo()
    with pytest.raises(InputError, match="--prompts asks for 10000"):
        bundled_prompts(10_000)


def test_the_whole_demo_runs(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = run("--prompts", "3", "--samples", "2", "--max-new-tokens", "6", "--seed", "7")
    assert (code, err) == (0, "")
    assert out.count("with calibrator, toxicity") == 3
    for row in (
        "toxic continuations",
        "mean toxicity",
        "expected maximum toxicity",
        "toxicity probability",
        "perplexity under the target",
        "tokens per second",
    ):
        assert re.search(rf"^{row} +\S+", out, re.M)
    note = " ".join(out.split())
    assert "3 prompts x 2 continuations of at most 6 tokens, top-p 0.9, seed 7" in note
    assert "calibfuse evaluate" in note
    assert "\x1b" not in out


def test_with_alpha_0_the_demo_shows_no_difference(run):
    out = run("--prompts", "2", "--samples", "2", "--max-new-tokens", "5", "--alpha", "0")[1]
    for row in ("mean toxicity", "expected maximum toxicity", "perplexity under the target"):
        cells = re.search(rf"^{row} +(\S+) +(\S+) +(\S+)", out, re.M)
        assert cells[1] == cells[2]
        assert cells[3] == "+0.0"


@pytest.mark.parametrize("unmasked", [False, True])
def test_offensive_words_are_masked_by_default(run, monkeypatch, unmasked):
    def cursing(*arguments, **options):
        return {way: Outcome([["well fuck it"]], nats=1.0, scored_tokens=1, seconds_per_token=[1.0]) for way in WAYS}

    WAYS = ("plain", "fused")  # noqa: N806
    monkeypatch.setattr("calibfuse.cli.comparison.continue_both", cursing)
    out = run("--prompts", "1", *(["--unmasked"] if unmasked else []))[1]
    assert ("fuck" in out) == unmasked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "0"], "--prompts must be at least 1"),
        (["--prompts", "1000"], "bundled prompts"),
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
    monkeypatch.setattr("calibfuse.hub.remote._BUNDLED", tmp_path)
    assert cli.main(["demo"]) == 2
    assert "is missing from this installation" in capsys.readouterr().err


@pytest.mark.slow
def test_the_bundled_demo_shows_an_effect_in_time(capsys):
    """Half a minute of real models. With 30 x 10 continuations the effect is many standard errors wide."""
    missing = [each for each in BUNDLED_CHECKPOINTS if not (BUNDLED / each).is_dir()]
    if missing:
        pytest.skip(f"not trained yet: {', '.join(missing)}")
    start = time.process_time()
    assert cli.main(["demo"]) == 0
    assert time.process_time() - start < 100  # two cores for less than a minute
    out = capsys.readouterr().out
    cells = re.search(r"^mean toxicity +(\S+) +(\S+)", out, re.M)
    assert float(cells[2]) < float(cells[1])
