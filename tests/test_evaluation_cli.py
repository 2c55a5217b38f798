"""`calibfuse evaluate` on tiny random checkpoints: what it writes and prints, and how it refuses bad input."""

import json
import math
import re
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibfuse.calibrator import Calibrator

FAST = ("--prompt-count", "4", "--samples", "3", "--max-new-tokens", "4", "--speed-rounds", "0", "--quiet")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("The river\nShe said that\nEvery morning he\nA long walk\nIt was\n")
    return path


@pytest.fixture
def run(bundle, monkeypatch, command_line, prompts, tmp_path):
    """A function: further arguments -> (exit code, standard output, standard error)."""
    monkeypatch.setattr("calibfuse.hub._BUNDLED", bundle)

    def call(*arguments, bare=False, fast=FAST):
        options = () if "--prompts" in arguments or bare else ("--prompts", str(prompts))
        folder = () if bare else ("--output", str(tmp_path / "out"))
        return command_line("evaluate", *options, *folder, *fast, *arguments)

    return call


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_missing_package_is_told_before_any_work(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("--alpha", "1")
    assert code == 2
    assert "pip install 'calibfuse[eval]'" in err
    assert not (tmp_path / "out").exists()


def test_everything_is_measured_and_written(run, bundle, tmp_path):
    code, out, err = run("--alpha", "0", "0.5", "2", "--judge", str(bundle / "demo-target"), "--baseline", "bad-words")
    assert code == 0, err
    data = report(tmp_path / "out")
    assert [method["key"] for method in data["methods"]] == ["plain", "contrast-0.5", "contrast-2", "bad-words"]
    assert {"perplexity", "target_perplexity", "toxic_share"} <= set(data["methods"][1]["metrics"])
    assert data["facts"]["prompt_count"] == 4
    assert "evaluate" in data["facts"]["command"] or data["facts"]["command"]
    assert out.startswith("# Evaluation")
    assert "demo target" in err
    assert (tmp_path / "out" / "report.html").stat().st_size > 5000


def test_several_scorers_stand_side_by_side(run, tmp_path, monkeypatch):
    (tmp_path / "own_scorer.py").write_text("def rate(texts):\n    return [0.8] * len(texts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = run(
        "--alpha", "1", "--no-neutrality", "--max-shift", "2.5", "--scorer", "bundled", "own_scorer:rate"
    )
    assert code == 0, err
    assert "| mean toxicity (own_scorer:rate) |\n" in out
    assert re.search(r"^\| plain \|.*\| 0\.800 \[0\.800, 0\.800\] \|$", out, re.MULTILINE)
    data = report(tmp_path / "out")
    assert data["facts"]["other_scorers"] == ["own_scorer:rate"]
    assert data["methods"][1]["settings"]["fusion"]["max_shift"] == 2.5
    assert data["methods"][1]["metrics"]["mean_toxicity (own_scorer:rate)"]["value"] == pytest.approx(0.8)


def test_resume_goes_on_with_the_same_figures(run, tmp_path):
    run("--alpha", "1", "--no-neutrality")
    first = report(tmp_path / "out")
    path = tmp_path / "out" / "continuations" / "contrast-1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    shutil.rmtree(tmp_path / "out" / "stages")
    code, _, err = run("--alpha", "1", "--no-neutrality", "--resume")
    assert code == 0, err
    for one, other in zip(first["methods"], report(tmp_path / "out")["methods"], strict=True):
        assert one["metrics"] == other["metrics"]
    code, _, err = run("--alpha", "1", "--no-neutrality", "--resume", "--seed", "1")
    assert code == 2
    assert "other settings" in err


def test_without_prompts_and_output_the_demo_prompts_go_into_a_folder_here(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("--alpha", "1", "--no-neutrality", bare=True)
    assert code == 0, err
    assert "a first look" in err
    assert report(tmp_path / "calibfuse-evaluation")["facts"]["prompt_count"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--pick-alpha"], "give --calibrator FOLDER, or --output"), (["--max-prompt-toxicity", "0.5"], "give both")],
)
def test_what_needs_a_folder_or_a_file_says_so(run, arguments, message):
    code, _, err = run(*arguments, bare=True)
    assert code == 2
    assert message in err


def test_json_goes_to_standard_output(run):
    code, out, err = run("--alpha", "1", "--json", "--no-neutrality")
    assert code == 0, err
    assert json.loads(out)["format"] == "calibfuse-evaluation"


def test_only_baselines_need_no_calibrator(run, bundle, monkeypatch, tmp_path):
    monkeypatch.setattr("calibfuse.calibrator.Calibrator.from_pretrained", lambda *_, **__: pytest.fail("not needed"))
    code, _, err = run("--alpha", "0", "--baseline", "temperature:1.3", "top-k:5", "--no-neutrality")
    assert code == 0, err
    assert [method["key"] for method in report(tmp_path / "out")["methods"]] == ["plain", "temperature-1.3", "top-k-5"]


@pytest.mark.parametrize(
    ("fusion", "options", "expected"),
    [
        ({}, (), [1, 3, 5]),
        ({"mode": "contrast", "alpha": 2.5, "margin": 0.1}, (), [1, 2.5, 3, 5]),
        ({"mode": "contrast", "alpha": 12.0}, ("--pick-alpha",), [0.5, 1, 2, 3, 4, 5, 6, 8, 12]),
        ({"mode": "contrast", "alpha": 12.0}, ("--mode", "geometric"), [0.1, 0.2, 0.3]),
        ({"mode": "contrast", "alpha": 12.0}, ("--alpha", "1", "0"), [1]),
        ({"mode": "geometric", "alpha": 0.9}, ("--fluency-budget", "0.02"), [0.1, 0.2, 0.3, 0.5, 0.7, 0.9]),
    ],
    ids=["none", "few", "many", "other mode", "given", "mixture"],
)
def test_without_strengths_the_calibrators_own_is_among_those_tried(run, bundle, tmp_path, fusion, options, expected):
    folder = shutil.copytree(bundle / "default-calibrator", tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "fusion": fusion}))
    small = ("--prompt-count", "1", "--samples", "1", "--max-new-tokens", "1", "--no-neutrality")
    code, _, err = run("--calibrator", str(folder), *small, *options)
    assert code == 0, err
    methods = report(tmp_path / "out")["methods"][1:]
    assert [method["alpha"] for method in methods] == expected
    recommended = fusion.get("alpha", 1.0)
    defaults = [method["alpha"] for method in methods if method["is_default"]]
    if "geometric" in options:
        assert defaults == [0.3]
    else:
        assert defaults == ([recommended] if recommended in expected else [])


def test_the_calibrator_is_bound_once_for_all_strengths_and_baselines(run, monkeypatch, tmp_path):
    bound = []
    bind = Calibrator.bind
    monkeypatch.setattr(Calibrator, "bind", lambda self, *a, **k: bound.append(self) or bind(self, *a, **k))
    code, _, err = run("--alpha", "1", "2", "3", "--baseline", "experts:1,2", "geometric:0.5", "--no-neutrality")
    assert code == 0, err
    assert len(report(tmp_path / "out")["methods"]) == 7
    assert len(bound) == 1


def test_strengths_of_ones_own_stand_for_a_baseline_of_all(run, tmp_path):
    code, _, err = run("--alpha", "1", "--baseline", "all", "experts:2,3", "reward:7", "--no-neutrality")
    assert code == 0, err
    keys = [method["key"] for method in report(tmp_path / "out")["methods"]]
    assert [key for key in keys if key.startswith(("experts", "reward"))] == ["experts-2", "experts-3", "reward-7"]
    assert {"top-k-20", "geometric-1", "bad-words"} <= set(keys)


def test_experts_are_the_contrast_both_ways(run, tmp_path):
    code, _, err = run("--alpha", "1", "--baseline", "experts:3", "temperature", "--no-neutrality")
    assert code == 0, err
    methods = {method["key"]: method for method in report(tmp_path / "out")["methods"]}
    assert methods["experts-3"]["settings"]["fusion"]["one_sided"] is False
    assert "temperature-matched" in methods


def test_all_methods_are_compared_at_one_fluency(run, tmp_path):
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("The river was wide\nShe is a teacher\n")
    options = ("--baseline", "all", "--fluency-budget", "0.02", "--alpha", "1", "--suite", str(sentences))
    code, out, err = run(*options, "--prompt-count", "2", "--samples", "2", "--no-neutrality")
    assert code == 0, err
    data = report(tmp_path / "out")
    families = [each["family"] for each in data["fluency_budget"]["families"]]
    expected = "contrast temperature top-k nucleus bad-words reward self-debias experts geometric".split()
    assert families == expected
    assert "leaves out embedding" in err
    assert [each["default"] for each in data["fluency_budget"]["families"] if each["family"] == "experts"] == [
        "experts-2"
    ]
    experts = next(method for method in data["methods"] if method["key"] == "experts-2")
    assert experts["settings"]["nucleus_before"] == 0.9
    assert [row["cases"] for row in experts["suites"]["sentences"]["rows"] if row["label"] == "harmless"] == [2]
    assert "within a fluency budget of 2.0%" in out


def test_the_scorer_that_sorted_the_training_text_gets_a_loud_note(run, bundle, tmp_path):
    folder = shutil.copytree(bundle / "default-calibrator", tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    config["training"] = {"name": "x", "data": {"sorted by": "tiny, toxic from 0.5"}}
    (folder / "config.json").write_text(json.dumps(config))
    code, _, err = run("--alpha", "1", "--calibrator", str(folder), "--no-neutrality")
    assert code == 0
    assert "THE SCORER 'tiny' ALSO SORTED" in err
    assert any("ALSO SORTED" in note for note in report(tmp_path / "out")["facts"]["notes"])
    assert "ALSO SORTED" in (tmp_path / "out" / "report.html").read_text()


def test_a_picked_alpha_goes_into_the_users_calibrator_and_never_into_the_bundled_one(run, bundle, tmp_path):
    bundled = (bundle / "default-calibrator" / "config.json").read_bytes()
    pick = ("--alpha", "0.5", "2", "--pick-alpha", "--fluency-budget", "9", "--no-neutrality")
    code, out, err = run(*pick)
    assert code == 0, err
    assert (bundle / "default-calibrator" / "config.json").read_bytes() == bundled
    mine = shutil.copytree(bundle / "default-calibrator", tmp_path / "mine")
    code, out, err = run(*pick, "--calibrator", str(mine), "--resume")
    assert code == 0, err
    for folder in (mine, tmp_path / "out" / "calibrator"):
        if "No alpha was written" in out:
            assert not (tmp_path / "out" / "calibrator").exists()
        else:
            assert Calibrator.from_pretrained(folder).config.fusion["alpha"] in (0.5, 2.0)
            assert f"Picked alpha {Calibrator.from_pretrained(folder).config.fusion['alpha']:g}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", "none.txt"), "No such file"),
        (("--prompt-count", "-1"), "--prompt-count"),
        (("--samples", "0"), "at least 1"),
        (("--top-p", "0"), "--top-p must be above 0"),
        (("--batch-size", "0"), "--batch-size"),
        (("--seed", "-1"), "--seed"),
        (("--alpha", "nan"), "alpha must be"),
        (("--alpha", "-1"), "alpha must be"),
        (("--mode", "magic"), "Unknown fusion mode"),
        (("--mode", "geometric", "--alpha", "2"), "alpha must be"),
        (("--mode", "value"), "needs the head 'value'"),
        (("--baseline", "prayer"), "Unknown baseline"),
        (("--baseline", "experts:x"), "Expected numbers"),
        (("--baseline", "prayer"), "experts, geometric, embedding, words, heads, all"),
        (("--baseline", "geometric:2"), "alpha must be"),
        (("--baseline", "embedding"), "needs an alignment"),
        (("--fluency-budget", "-1"), "--fluency-budget"),
        (("--suite", "/no/such/file"), "No such file"),
        (("--suite-count", "-1"), "--suite-count"),
        (("--pick-alpha", "--fluency-budget", "-1"), "at least 0"),
        (("--pick-alpha", "--alpha", "0"), "--alpha 0 is none"),
        (("--pick-alpha", "--mode", "contrast", "geometric"), "one mode"),
        (("--scorer", "no/such/scorer/at/all"), "no/such/scorer/at/all"),
        (("--model", "/no/such/model"), "/no/such/model"),
        (("--judge", "/no/such/model"), "/no/such/model"),
        (("--calibrator", "/no/such/calibrator"), "/no/such/calibrator"),
        (("--speed-rounds", "-1"), "--speed-rounds"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_gives_one_sentence_and_writes_nothing(run, tmp_path, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if "note:" not in line]) == 1
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_a_chat_template_goes_round_each_prompt(run, bundle, tmp_path):
    """The perplexity is that of continuations after the whole template."""
    folder = shutil.copytree(bundle / "demo-target", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}reply:"
    tokenizer.save_pretrained(folder)
    options = ("--alpha", "0", "--no-neutrality", "--model", str(folder))
    code, _, err = run(*options, "--system", "be kind")
    assert code == 0, err
    data = report(tmp_path / "out")
    assert data["facts"]["sampling"]["system"] == "be kind"
    lines = (tmp_path / "out" / "continuations" / "plain.jsonl").read_text().splitlines()[1:]
    assert len(lines) == 4
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    nats = tokens = 0.0
    for record in map(json.loads, lines):
        ids = tokenizer(f"[system] be kind [user] {record['prompt']} reply:")["input_ids"]
        for said in record["continuations"]:
            row = torch.tensor([[*ids, *said["token_ids"]]])
            log_probs = model(row).logits.detach()[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
            nats -= float(log_probs[len(ids) - 1 :].sum())
            tokens += len(said["token_ids"])
    assert data["methods"][0]["metrics"]["target_perplexity"]["value"] == pytest.approx(
        math.exp(nats / tokens), rel=1e-3
    )


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_protocol_sets_prompts_draws_and_figures(run, tmp_path):
    rows = [
        {"prompt": f"The river {number}", "prompt_toxicity": 0.2 * number, "challenging": number % 2 == 1}
        for number in range(5)
    ]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    options = ("--prompts", path, "--alpha", "1", "--no-neutrality")
    code, out, err = run(*options, "--protocol", "challenging", fast=("--speed-rounds", "0", "--quiet"))
    assert code == 0, err
    facts = report(tmp_path / "out")["facts"]
    assert facts["prompt_count"] == 2
    assert (facts["sampling"]["samples"], facts["sampling"]["max_new_tokens"]) == (10, 20)
    assert facts["protocol"].startswith("challenging")
    assert "## Protocol challenging" in out
    assert "| method | mean toxicity | perplexity (target) |" in out
    assert "Protocol challenging" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "3"), "draws with samples 25, got 3"),
        (("--max-prompt-toxicity", "0.5"), "give --prompts FILE alone"),
    ],
)
def test_what_contradicts_a_protocol_is_refused(run, arguments, message):
    code, _, err = run("--protocol", "non-toxic", *arguments, fast=("--quiet",))
    assert code == 2
    assert message in err


def test_sentences_names_and_tasks_are_read(run, tmp_path):
    sentences = [
        {"text": "The river was wide", "label": "hateful", "functionality": "threat_dir_h", "group": "women"},
        {"text": "She said it rained", "label": "harmless", "functionality": "counter_ref_nh", "group": "women"},
    ]
    folder = tmp_path / "names"
    folder.mkdir()
    for name, data in (
        ("descriptors", {"age": {"old": ["old", "young"]}}),
        ("sentence_templates", {"I'm {noun_phrase}.": {}, "I like {plural_noun_phrase}.": {}}),
        ("standalone_noun_phrases", {"age": [{"noun_phrase": "a youth", "plural_noun_phrase": "youths"}]}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(data))
    (tmp_path / "wiki.txt").write_text("= River =\nThe river was wide .\n")
    code, out, err = run(
        *("--alpha", "1", "--no-neutrality"),
        *("--suite", write_rows(tmp_path / "hate.jsonl", sentences), str(folder)),
        *("--utility", f"lambada={write_rows(tmp_path / 'l.jsonl', [{'text': 'She said it rained'}])}"),
        f"wikitext={tmp_path / 'wiki.txt'}",
    )
    assert code == 0, err
    method = report(tmp_path / "out")["methods"][1]
    assert [row["name"] for row in method["suites"]["hate"]["rows"]][2:] == ["threat_dir_h", "counter_ref_nh"]
    assert method["holistic_bias"]["names"] == 3
    assert [each["name"] for each in method["utility"]["figures"]] == [
        "lambada_accuracy",
        "lambada_perplexity",
        "word_perplexity",
    ]
    for title in ("Labelled sentences: hate", "Names of groups", "What guidance costs at tasks"):
        assert f"## {title}" in out
        assert title in (tmp_path / "out" / "report.html").read_text()


def test_words_and_heads_alone_are_methods(run, bundle, tmp_path):
    folder = shutil.copytree(bundle / "default-calibrator", tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "words": {"river": -3.0}}))
    options = ("--calibrator", str(folder), "--baseline", "words", "heads:2", "--alpha", "0", "--no-neutrality")
    code, _, err = run(*options)
    assert code == 0, err
    methods = report(tmp_path / "out")["methods"]
    assert [method["key"] for method in methods] == ["plain", "words-1", "heads-2"]
    assert methods[1]["is_default"]
    (tmp_path / "words.txt").write_text("teacher\nriver -1\n")
    more = ("--words", str(tmp_path / "words.txt"), "--output", str(tmp_path / "more"))
    assert run("--calibrator", str(folder), "--alpha", "1", "--no-neutrality", *more)[0] == 0
    settings = report(tmp_path / "more")["methods"][1]["settings"]
    assert settings["fusion"]["alpha"] == 1.0
    assert settings["words"] == {"teacher": -6.0, "river": -1.0}
    code, _, err = run("--baseline", "words", "--output", str(tmp_path / "other"))
    assert code == 2
    assert "no table of words" in err


@pytest.mark.parametrize("given", ["lambada", "nope=x"])
def test_tasks_are_named(run, given):
    code, _, err = run("--utility", given)
    assert code == 2
    assert "Expected lambada=FILE, wikitext=FILE after" in err
