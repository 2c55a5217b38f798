"""`calibfuse train-guide` and `train_guide` from prompts and an oracle to a guide that decodes, on a tiny target."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibfuse.calibrator import Calibrator
from calibfuse.cli.main import main as cli
from calibfuse.errors import CheckpointError, DataError
from calibfuse.processor import CalibFusion
from calibfuse.value import training
from calibfuse.value.auxiliary_training import AuxiliaryTrainingConfig
from calibfuse.value.oracle import FunctionOracle
from calibfuse.value.training import GuideConfig, train_guide

PROMPTS = ["the sun is", "a small house", "we went to the", "it was a"]
ORACLE_MODULE = """
def few_e(texts):
    return [1.0 - text.count("e") / max(1, len(text)) for text in texts]

def blind(texts):
    return [float("nan")] * len(texts)

def forgetful(texts):
    return [0.5]

def wordy(texts):
    return ["0.5"] * len(texts)

def excited(texts):
    return [2.0] * len(texts)

def raising(texts):
    raise KeyError("speech")
"""
QUICK = [
    "--samples",
    "3",
    "--max-new-tokens",
    "4",
    "--steps",
    "4",
    "--batch-size",
    "6",
    "--quiet",
    "--device",
    "cpu",
]
CONFIG = GuideConfig(
    per_prompt=3,
    max_new_tokens=4,
    training=AuxiliaryTrainingConfig(steps=4, batch_size=6),
)
ORACLE = FunctionOracle(lambda texts: [1.0 - text.count("e") / max(1, len(text)) for text in texts], "few e")


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory, tiny_llama, byte_level_tokenizer, wrap_tokenizer):
    folder = tmp_path_factory.mktemp("target")
    tokenizer = wrap_tokenizer(byte_level_tokenizer)
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def target(target_folder):
    return AutoModelForCausalLM.from_pretrained(target_folder).eval(), AutoTokenizer.from_pretrained(target_folder)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory with prompts and a module of oracles."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "guide_oracles.py").write_text(ORACLE_MODULE)
    return tmp_path


def command(target_folder, *extra, oracle="guide_oracles:few_e", prompts="prompts.txt"):
    arguments = ["train-guide", "--model", str(target_folder), "--oracle", oracle, "--prompts", str(prompts)]
    return [*arguments, "--output", "guide", *QUICK, *map(str, extra)]


def test_from_prompts_to_a_guide_that_decodes(workplace, target_folder, target, capsys):
    assert cli(command(target_folder, "--alpha", "2")) == 0
    out = capsys.readouterr().out
    assert "12 samples, mean C" in out
    assert 'Guide written to guide. Try: calibfuse generate "The new neighbour is" --model' in out
    model, tokenizer = target
    fusion = CalibFusion.from_pretrained("guide", tokenizer=tokenizer)
    assert (fusion.config.mode, fusion.config.alpha) == ("value", 2.0)
    inputs = tokenizer(PROMPTS[:2], return_tensors="pt", padding=True)
    with fusion.required():
        model.generate(**inputs, logits_processor=[fusion], max_new_tokens=3, do_sample=False)
    card = (workplace / "guide" / "README.md").read_text()
    assert "guide_oracles:few_e" in card
    facts = json.loads((workplace / "guide" / "config.json").read_text())["training"]["value_head"]
    assert facts["data"] == {"prompts": 4, "samples": 12, "without a label": 0}


def test_a_guide_still_contrasts(workplace, target_folder, target):
    assert cli(command(target_folder)) == 0
    options = {"mode": "contrast", "alpha": 1.0, "margin": 0.1, "max_shift": 4.0, "hold": False, "value_weight": 0.0}
    fusion = CalibFusion.from_pretrained("guide", tokenizer=target[1], **options)
    ids = torch.randint(3, 90, (1, 6))
    bundled = CalibFusion.from_pretrained(tokenizer=target[1], **options)
    scores = torch.randn(1, len(target[1]))
    torch.testing.assert_close(fusion(ids, scores), bundled(ids, scores))


def test_a_folder_with_work_in_it_needs_resume(workplace, target_folder, capsys):
    assert cli(command(target_folder)) == 0
    assert cli(command(target_folder)) == 2
    assert "holds the work of an earlier run: go on with --resume," in capsys.readouterr().err
    assert cli(command(target_folder, "--resume")) == 0
    assert cli(command(target_folder, "--resume", "--seed", "1")) == 2
    assert "was begun with other settings (begins_with, seed)" in capsys.readouterr().err


def test_a_killed_run_draws_no_sample_twice(target, tmp_path, monkeypatch):
    """Killed in the second of two parts: the first is read from the disk, and the guide is that of one whole run."""
    model, tokenizer = target
    monkeypatch.setattr(training, "_PROMPTS_PER_SHARD", 2)
    train_guide(model, tokenizer, PROMPTS, ORACLE, tmp_path / "whole", config=CONFIG, show_progress=False)

    asked = []

    def killed(texts):
        asked.append(len(texts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ORACLE.satisfaction(texts)

    class Killed:
        name = ORACLE.name
        satisfaction = staticmethod(killed)

    with pytest.raises(KeyboardInterrupt):
        train_guide(model, tokenizer, PROMPTS, Killed(), tmp_path / "killed", config=CONFIG, show_progress=False)
    assert [path.name for path in sorted((tmp_path / "killed" / "work").glob("samples-*"))] == ["samples-0000"]
    train_guide(
        model, tokenizer, PROMPTS, Killed(), tmp_path / "killed", config=CONFIG, resume=True, show_progress=False
    )
    assert asked == [6, 6, 6], "the first part, the second that was killed, the second again"
    one, other = (Calibrator.from_pretrained(tmp_path / name) for name in ("whole", "killed"))
    assert one.fingerprint == other.fingerprint


def test_unlabelled_samples_are_counted_on_the_card(target, tmp_path):
    def sometimes(texts):
        return [float("nan") if number % 4 == 0 else 0.5 for number in range(len(texts))]

    oracle = FunctionOracle(sometimes, "sometimes")
    figures = train_guide(*target, PROMPTS, oracle, tmp_path / "guide", config=CONFIG, show_progress=False)
    assert figures["left_out"] == 3
    assert (
        json.loads((tmp_path / "guide" / "config.json").read_text())["training"]["value_head"]["data"][
            "without a label"
        ]
        == 3
    )


def test_a_guide_that_learned_nothing_says_so(workplace, target_folder, capsys, caplog):
    assert cli(command(target_folder, "--learning-rate", "1e-12", oracle="guide_oracles:few_e")) == 0
    assert "The guide has learned nothing" in caplog.text
    assert "The guide has learned nothing" in (workplace / "guide" / "README.md").read_text()


def test_resuming_what_was_never_begun(target, tmp_path):
    with pytest.raises(CheckpointError, match="nothing to go on from in .*guide' yet: run it without resume"):
        train_guide(*target, PROMPTS, ORACLE, tmp_path / "guide", config=CONFIG, resume=True, show_progress=False)


def test_a_full_disk(target, tmp_path, monkeypatch):
    """One sentence, and what was complete before is kept."""
    import os

    train_guide(*target, PROMPTS, ORACLE, tmp_path / "guide", config=CONFIG, show_progress=False)
    before = (tmp_path / "guide" / "model.safetensors").read_bytes()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train_guide(*target, PROMPTS, ORACLE, tmp_path / "guide", config=CONFIG, resume=True, show_progress=False)
    assert (tmp_path / "guide" / "model.safetensors").read_bytes() == before


def test_no_prompts(target, tmp_path):
    with pytest.raises(DataError, match="needs prompts to draw samples from, got none"):
        train_guide(*target, [], ORACLE, tmp_path / "guide", config=CONFIG)


@pytest.mark.parametrize(
    ("oracle", "message"),
    [
        ("guide_oracles:blind", "could not label 12 of 12 texts"),
        ("guide_oracles:forgetful", "was given 12 texts and returned an array of shape (1,)"),
        ("guide_oracles:wordy", "returned something that is no list of numbers"),
        ("guide_oracles:excited", "returned 2.0 for text 0"),
        ("guide_oracles:raising", "failed on 12 texts with KeyError"),
        ("guide_oracles:missing", "has no 'missing' to use as oracle"),
        ("no_such_module:score", "needs a module 'no_such_module'"),
        ("no/such/folder/here", "no checkpoint folder"),
    ],
)
def test_an_oracle_that_fails_is_one_sentence(workplace, target_folder, capsys, oracle, message):
    assert cli(command(target_folder, oracle=oracle)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (workplace / "guide" / "config.json").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--alpha", "-1"], "alpha must be a number from 0"),
        (["--temperature", "0"], "temperature must be above 0"),
        (["--max-new-tokens", "400"], "has 256 positions; leave long prompts out"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--power", "2"], "power and threshold turn a toxicity into C"),
        (["--prompts", "nothing.txt"], "nothing.txt"),
        (["--prompts", "empty.txt"], "empty.txt"),
        (["--model", "no/such/model/here"], "no model folder"),
        (["--calibrator", "no/such/calibrator/here"], "no checkpoint folder"),
    ],
)
def test_bad_arguments_are_one_sentence(workplace, target_folder, capsys, extra, message):
    (workplace / "empty.txt").write_text("\n\n")
    assert cli([*command(target_folder), *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_target_without_a_tokenizer(workplace, tmp_path, tiny_llama, capsys):
    tiny_llama(96).save_pretrained(tmp_path / "bare")
    capsys.readouterr()  # transformers' progress bar
    assert cli(command(tmp_path / "bare")) == 2
    error = capsys.readouterr().err
    assert "Cannot load the tokenizer" in error
    assert error.count("\n") == 1


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli(["train-guide", "--help"])
    assert stopped.value.code == 0
    assert "calibfuse train-guide --model org/any-llm --oracle bundled" in capsys.readouterr().out
