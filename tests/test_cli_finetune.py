"""`calibfuse finetune` and `run_finetuning` from text files to a checkpoint, on a tiny model."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from calibfuse.cli import main as cli
from calibfuse.errors import CheckpointError, DataError, InputError, MissingDependencyError, ScorerError
from calibfuse.finetune import run
from calibfuse.finetune.roles import RoleRunner
from calibfuse.finetune.run import run_finetuning
from calibfuse.finetune.settings import FinetuneConfig, ModelSource, OracleSource
from calibfuse.finetune.tuning import TuningConfig
from calibfuse.value.auxiliary_training import AuxiliaryTrainingConfig
from calibfuse.value.samples import SamplingPlan

PROMPTS = ["the sun is", "a small house", "we went to the"]


class NoLetterE:
    """C of a text is the share of its letters that are no e."""

    name = "no-letter-e"

    def satisfaction(self, texts):
        import numpy as np

        return np.asarray([1.0 - text.count("e") / max(1, len(text)) for text in texts])


ORACLE_MODULE = """
def no_letter_e(texts):
    return [1.0 - text.count("e") / max(1, len(text)) for text in texts]

def broken(texts):
    return [float("nan")] * len(texts)

def wrong_length(texts):
    return [0.5]

def strings(texts):
    return ["0.5"] * len(texts)

def raising(texts):
    raise KeyError("speech")
"""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tiny_llama, byte_level_tokenizer, wrap_tokenizer):
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_llama(byte_level_tokenizer.get_vocab_size()).save_pretrained(folder)
    wrap_tokenizer(byte_level_tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path, sample_lines):
    (tmp_path / "corpus.txt").write_text("\n\n".join(sample_lines), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (tmp_path / "letter_oracle.py").write_text(ORACLE_MODULE, encoding="utf-8")
    return tmp_path


def make_config(model_folder, **changes):
    settings = {
        "model": ModelSource(name=str(model_folder)),
        "oracle": OracleSource(spec="letter_oracle:no_letter_e"),
        "iterations": 2,
        "tuning": TuningConfig(steps=2, batch_size=2, sample_batch_size=4, learning_rate=1e-3),
        "sampling": SamplingPlan(per_prompt=4, max_new_tokens=5),
        "auxiliary": AuxiliaryTrainingConfig(steps=2, batch_size=4),
        "block_length": 16,
        "held_out_share": 0.1,
        "held_out_blocks": 4,
    } | changes
    return FinetuneConfig(**settings)


def arguments(model_folder, texts, *more):
    return [
        "finetune", "--model", str(model_folder), "--corpus", str(texts / "corpus.txt"),
        "--prompts", str(texts / "prompts.txt"), "--iterations", "2", "--steps", "2", "--batch-size", "2",
        "--sample-batch-size", "4", "--samples", "4", "--max-new-tokens", "5", "--auxiliary-steps", "2",
        "--auxiliary-batch-size", "4", "--block-length", "16", "--held-out-share", "0.1", "--device", "cpu",
        "--quiet", *more,
    ]  # fmt: skip


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- plain fine-tuning


def test_plain_fine_tuning_from_the_command_line(model_folder, texts, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = texts / "plain"
    assert cli.main(arguments(model_folder, texts, "--kl-weight", "0", "--output", str(output))) == 0
    printed = capsys.readouterr().out
    assert "Corpus perplexity on held-out documents" in printed
    assert str(output) in printed
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model(**tokenizer("the sun", return_tensors="pt", return_token_type_ids=False)).logits.isfinite().all()
    assert not torch.equal(model.get_input_embeddings().weight, weights(model_folder)["model.embed_tokens.weight"])
    report = json.loads((output / "finetune.json").read_text())
    assert report["corpus_perplexity"]["before"] > 0
    assert [list(step["roles"]) for step in report["steps"]] == [["model"], ["model"]]
    assert all(step["roles"]["model"]["seconds"] > 0 for step in report["steps"])
    assert not (output / "role.json").exists()
    assert not (output / "optimizer.safetensors").exists()
    assert not (output / "work" / "step-1" / "model" / "optimizer.safetensors").exists()


def test_weight_zero_is_the_same_with_and_without_oracle_and_schedule(model_folder, sample_lines, tmp_path):
    tuning = TuningConfig(steps=2, batch_size=2, kl_weight=0.0)
    one = make_config(model_folder, tuning=tuning, oracle=None)
    other = make_config(model_folder, tuning=tuning, schedule="parallel")
    run_finetuning(one, sample_lines, [], tmp_path / "one", device="cpu")
    run_finetuning(other, sample_lines, PROMPTS, tmp_path / "other", device="cpu")
    assert_same_weights(tmp_path / "one", tmp_path / "other")


def test_filtered_corpus_leaves_the_held_out_text_alone(model_folder, texts):
    options = ["--kl-weight", "0", "--oracle", "bundled"]
    assert cli.main(arguments(model_folder, texts, *options, "--output", str(texts / "all"))) == 0
    options += ["--filter-corpus", "0.9"]
    assert cli.main(arguments(model_folder, texts, *options, "--output", str(texts / "some"))) == 0
    whole, part = (json.loads((texts / name / "finetune.json").read_text()) for name in ("all", "some"))
    assert part["corpus"]["dropped_documents"] > 0
    assert part["corpus_perplexity"]["before"] == whole["corpus_perplexity"]["before"]


# ---- under a constraint


def test_sequential_run_leaves_products_and_report(model_folder, sample_lines, tmp_path):
    report = run_finetuning(
        make_config(model_folder, oracle=None), sample_lines, PROMPTS, tmp_path, oracle=NoLetterE(), device="cpu"
    )
    for step in (1, 2):
        for role in ("samples", "auxiliary", "model"):
            assert (tmp_path / "work" / f"step-{step}" / role / "role.json").is_file()
    figures = report["steps"][1]["roles"]
    assert 0 < figures["samples"]["figures"]["mean_satisfaction"] < 1
    assert figures["samples"]["reads"] == {"model": 1}
    assert figures["model"]["figures"]["kl_nats"] is not None
    assert report["corpus_perplexity"]["after"] == figures["model"]["figures"]["corpus_perplexity"]
    assert not list((tmp_path / "work").rglob("*.tmp"))


def test_a_run_stopped_in_the_middle_gives_the_same_as_one_that_was_not(model_folder, sample_lines, tmp_path):
    config = make_config(model_folder, oracle=None)
    run_finetuning(config, sample_lines, PROMPTS, tmp_path / "whole", oracle=NoLetterE(), device="cpu")

    class Interrupting(NoLetterE):
        calls = 0

        def satisfaction(self, texts):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().satisfaction(texts)

    with pytest.raises(KeyboardInterrupt):
        run_finetuning(config, sample_lines, PROMPTS, tmp_path / "cut", oracle=Interrupting(), device="cpu")
    assert (tmp_path / "cut" / "work" / "step-1" / "model" / "config.json").is_file()
    assert not (tmp_path / "cut" / "work" / "step-2" / "samples").exists()
    assert not list((tmp_path / "cut" / "work").rglob("*.tmp"))
    run_finetuning(config, [], PROMPTS, tmp_path / "cut", oracle=NoLetterE(), resume=True, device="cpu")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_lora_run_gives_a_merged_checkpoint_and_the_adapter(model_folder, texts):
    pytest.importorskip("peft", reason="needs the extra lora")
    output = texts / "lora"
    options = ["--lora", "2", "--kl-weight", "0", "--output", str(output)]
    assert cli.main(arguments(model_folder, texts, *options)) == 0
    before, after = weights(model_folder), weights(output)
    assert set(before) == set(after)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert (output / "adapter" / "adapter_model.safetensors").is_file()


# ---- what is refused, each in a sentence


def failing(model_folder, texts, capsys, *options, output="out"):
    code = cli.main(arguments(model_folder, texts, "--output", str(texts / output), *options))
    message = capsys.readouterr().err.strip()
    assert code == 2, message
    assert message.startswith("calibfuse: error: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "--kl-weight above 0 needs --oracle"),
        (("--oracle", "bundled", "--kl-weight", "-1"), "must be at least 0, got -1.0"),
        (("--kl-weight", "0", "--filter-corpus", "0.5"), "--filter-corpus needs an oracle"),
        (("--oracle", "bundled", "--filter-corpus", "2"), "--filter-corpus must be above 0 and at most 1"),
        (("--kl-weight", "0", "--lora", "0"), "lora must be at least 1"),
        (("--kl-weight", "0", "--iterations", "0"), "iterations must be at least 1"),
        (("--kl-weight", "0", "--model", "no/such/folder"), "There is no model folder 'no/such/folder'"),
        (("--kl-weight", "0", "--batch-size", "5000"), "fewer than one batch of 5000"),
        (("--kl-weight", "0", "--block-length", "100000"), "fewer than one block of 100000"),
        (("--kl-weight", "0", "--corpus", "missing.txt"), "No such file or folder: missing.txt"),
        (("--oracle", "letter_oracle:nothing"), "nothing"),
        (("--oracle", "bundled", "--max-new-tokens", "300"), "but the model has 256 positions"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments_give_one_sentence(model_folder, texts, capsys, monkeypatch, options, expected):
    monkeypatch.syspath_prepend(str(texts))
    assert expected in failing(model_folder, texts, capsys, *options)
    assert not list(texts.glob("out/*.safetensors"))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("broken", "could not label"),
        ("wrong_length", "returned an array of shape"),
        ("strings", "no list of numbers"),
        ("raising", "KeyError: 'speech'"),
    ],
)
def test_bad_oracles_give_one_sentence(model_folder, texts, capsys, monkeypatch, function, expected):
    monkeypatch.syspath_prepend(str(texts))
    assert expected in failing(model_folder, texts, capsys, "--oracle", f"letter_oracle:{function}")
    assert not (texts / "out" / "work" / "step-1" / "samples").exists()
    assert not list((texts / "out").rglob("*.tmp"))


def test_products_of_another_run_are_not_mixed_in(model_folder, sample_lines, tmp_path):
    tuning = TuningConfig(steps=1, batch_size=2, kl_weight=0.0)
    config = make_config(model_folder, tuning=tuning, oracle=None, iterations=1)
    run_finetuning(config, sample_lines, [], tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match="holds the work of an earlier run: go on with resume"):
        run_finetuning(config, sample_lines, [], tmp_path, device="cpu")
    other = make_config(model_folder, tuning=tuning, oracle=None, iterations=2)
    with pytest.raises(CheckpointError, match=r"begun with other settings \(iterations\)"):
        run_finetuning(other, sample_lines, [], tmp_path, resume=True, device="cpu")
    with pytest.raises(CheckpointError, match=r"other settings \(corpus, prompts\)"):
        run_finetuning(config, sample_lines, ["x"], tmp_path, corpus_name="y", resume=True, device="cpu")


def test_objects_and_missing_texts_are_refused_before_any_work(model_folder, sample_lines, tmp_path, monkeypatch):
    parallel = make_config(model_folder, schedule="parallel")
    with pytest.raises(InputError, match="loads the oracle in another process"):
        run_finetuning(parallel, sample_lines, PROMPTS, tmp_path / "a", oracle=NoLetterE())
    with pytest.raises(InputError, match="needs an oracle"):
        run_finetuning(make_config(model_folder, oracle=None), sample_lines, PROMPTS, tmp_path / "a")
    with pytest.raises(DataError, match="needs prompts to draw samples from, got none"):
        run_finetuning(make_config(model_folder), sample_lines, [], tmp_path / "a")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match="LoRA needs the package peft"):
        run_finetuning(make_config(model_folder, lora=8), sample_lines, PROMPTS, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_full_disk_loses_nothing(model_folder, sample_lines, tmp_path, monkeypatch):
    """The second iteration's checkpoint cannot be written; the first one stays and the run can go on."""
    from calibfuse.finetune import roles

    tuning = TuningConfig(steps=1, batch_size=2, kl_weight=0.0)
    config = make_config(model_folder, tuning=tuning, oracle=None)
    save, calls = roles.save_model, []

    def full(model, tokenizer, folder):
        calls.append(folder)
        if len(calls) == 2:
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(model, tokenizer, folder)

    monkeypatch.setattr(roles, "save_model", full)
    with pytest.raises(CheckpointError, match=r"Cannot write the product of role 'model' .* No space left .* resume"):
        run_finetuning(config, sample_lines, [], tmp_path, device="cpu")
    assert (tmp_path / "work" / "step-1" / "model" / "config.json").is_file()
    assert not (tmp_path / "work" / "step-2" / "model").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    run_finetuning(config, [], [], tmp_path, resume=True, device="cpu")
    assert (tmp_path / "config.json").is_file()


def test_thinned_samples_stand_for_those_that_were_left_out():
    """The weighted mean is within 5 standard deviations of the whole's: wrong once in a million seeds.

    About k = 900 of 3,600 are kept, with a deviation of 26; 4 k / (4 k + 400) then has one of 0.0026.
    """
    from calibfuse.finetune.roles import thin_satisfied
    from calibfuse.value.samples import SampleSet

    labels = (torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.9).float()
    labels[0] = torch.nan
    ones = torch.ones(4000, dtype=torch.int64)
    samples = SampleSet(ones[:, None], ones, ones, torch.zeros(4000), labels)
    kept = thin_satisfied(samples, 0.25, seed=0)
    assert int((kept.satisfaction == 0).sum()) == int((labels == 0).sum())
    assert int(kept.satisfaction.isnan().sum()) == 1
    weights = kept.log_weights.exp()
    assert set(weights.tolist()) == {1.0, 4.0}
    good = kept.satisfaction == 1
    estimate = float(weights[good].sum() / weights[~kept.satisfaction.isnan()].sum())
    assert estimate == pytest.approx(0.9, abs=5 * 0.0026)
    assert thin_satisfied(samples, 1.0, seed=0) is samples


# ---- real processes


@pytest.mark.slow
def test_parallel_run_trains_all_roles_in_processes(model_folder, texts, monkeypatch):
    monkeypatch.syspath_prepend(str(texts))
    report = run_finetuning(
        make_config(model_folder, schedule="parallel"),
        (texts / "corpus.txt").read_text().split("\n\n"),
        PROMPTS,
        texts / "out",
        device="cpu",
    )
    steps = report["steps"]
    assert [step["step"] for step in steps] == [0, 1, 2]
    for step in steps[1:]:
        assert set(step["roles"]) == {"samples", "auxiliary", "model"}
    roles = steps[2]["roles"].values()  # all processes have started by then
    begins, ends = [r["began"] for r in roles], [r["began"] + r["seconds"] for r in roles]
    assert max(begins) < min(ends), "all three were at work at the same time"
    assert steps[2]["roles"]["auxiliary"]["reads"] == {"samples": 1, "model": 0, "auxiliary": 1}


@pytest.mark.slow
def test_one_failing_role_stops_a_parallel_run_with_its_message(model_folder, texts, monkeypatch):
    monkeypatch.syspath_prepend(str(texts))
    config = make_config(model_folder, schedule="parallel", oracle=OracleSource(spec="letter_oracle:wrong_length"))
    with pytest.raises(ScorerError, match="Role 'samples' failed in step 0: .*returned an array of shape"):
        run_finetuning(config, ["some text " * 50] * 20, PROMPTS, texts / "out", device="cpu")
    assert not list((texts / "out").rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "mark"), [("sequential", "step-1/samples"), ("parallel", "step-0/samples")])
def test_a_killed_run_resumes_and_gives_the_same(model_folder, texts, monkeypatch, schedule, mark):
    """SIGKILL in the middle, then --resume: the same weights as a run that was never killed, all in one process."""
    more = ("--schedule", schedule, "--oracle", "letter_oracle:no_letter_e", "--iterations", "1")

    def command(output, *others):
        return arguments(model_folder, texts, *more, "--output", str(texts / output), *others)

    with start(command("killed"), texts) as killed:
        wait_for(texts / "killed" / "work" / mark, killed)
        killed.send_signal(signal.SIGKILL)
    assert not (texts / "killed" / "config.json").exists()
    monkeypatch.syspath_prepend(str(texts))
    assert cli.main(command("killed", "--resume")) == 0

    @contextlib.contextmanager
    def in_this_process(config, prompts, work, devices):
        yield RoleRunner(config, prompts, work, "cpu").run

    monkeypatch.setattr(run, "in_processes", in_this_process)
    assert cli.main(command("whole")) == 0
    assert_same_weights(texts / "whole", texts / "killed")
    assert not list((texts / "killed").rglob("*.tmp"))


@pytest.mark.slow
def test_interrupt_ends_a_parallel_run_in_order(model_folder, texts):
    command = arguments(model_folder, texts, "--schedule", "parallel", "--oracle", "letter_oracle:no_letter_e")
    command += ["--output", str(texts / "out"), "--iterations", "50"]
    with start(command, texts) as process:
        wait_for(texts / "out" / "work" / "step-0" / "samples", process)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[0]
        assert process.returncode == 130
    assert "Go on with the same command and --resume" in printed
    assert not list((texts / "out").rglob("*.tmp"))


def start(command, folder):
    """The command line in a process of its own."""
    paths = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "calibfuse", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        # a job that a shell started in the background ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(path, process):
    deadline = time.monotonic() + 600
    while not path.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
