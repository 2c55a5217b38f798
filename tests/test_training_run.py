"""Training end to end on a few kilobytes: same result after a kill, on two processes, and clear refusals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from calibfuse import Calibrator
from calibfuse.calibrator.model import CalibratorConfig
from calibfuse.errors import CheckpointError, DataError, InputError
from calibfuse.training.config import TrainingConfig, TrainingText
from calibfuse.training.data import PassageStore
from calibfuse.training.loop import learning_rate
from calibfuse.training.run import run_training
from calibfuse.training.tokenizers.pool import PoolSpec
from calibfuse.training.words.balance import TERMS
from calibfuse.training.words.protected import LISTED_SHIFT

SHAPE = CalibratorConfig(
    bucket_count=1024, token_width=16, composer_hidden_width=16, width=16, layer_count=1, head_count=2, hidden_width=32,
    window=16, adapter_width=8,
)  # fmt: skip
POOL = (PoolSpec(style="byte-level", vocab_size=400), PoolSpec(style="metaspace-bytes", vocab_size=500))
QUICK = {
    "batch_size": 4,
    "sequence_length": 32,
    "candidate_count": 256,
    "vocabulary_size": 800,
    "save_every": 5,
    "validate_every": 0,
}


@pytest.fixture
def text(tmp_path: Path, sample_lines: list[str]) -> TrainingText:
    half = len(sample_lines) // 2
    (tmp_path / "clean.txt").write_text("\n\n".join(sample_lines[:half]), encoding="utf-8")
    (tmp_path / "web.txt").write_text("\n\n".join(sample_lines[half:]), encoding="utf-8")
    return TrainingText(wanted=[str(tmp_path / "clean.txt")], unwanted=[str(tmp_path / "web.txt")])


def train(text: TrainingText, output: Path, **options) -> Path | None:
    training = TrainingConfig(**{**QUICK, "steps": 20, "precision": "fp32", **options.pop("training", {})})
    return run_training(
        text, output, training=training, shape=SHAPE, pool_specs=POOL, device="cpu", show_progress=False, **options
    )


def history(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "work" / "checkpoint" / "state.json").read_text())["history"]


def test_training_lowers_the_loss_and_writes_a_loadable_calibrator_with_its_facts(text, tmp_path):
    output = train(text, tmp_path / "out", training={"steps": 60})
    rows = history(output)
    # single batches differ much in what they hold
    for figure, least in (("reference_nats", 0.5), ("bits_per_byte", 0.0)):
        first, last = (sum(row[figure] for row in part) / 5 for part in (rows[:5], rows[-5:]))
        assert last < first - least, figure
    calibrator = Calibrator.from_pretrained(output)
    facts = calibrator.config.training
    assert set(facts["data"]["files"]) == {"clean.txt", "web.txt"}
    assert facts["settings"]["steps"] == 60
    for row in facts["bits_per_byte"].values():
        assert 1.0 < row["reference"] < 8.0
    card = (output / "README.md").read_text()
    assert "clean.txt" in card
    assert "bits per byte" in card.lower()


def test_words_of_the_reference_alone_are_minded(text, tmp_path):
    Path(text.unwanted[0]).write_text("\n\n".join(f"What a nitwit number {i} is." for i in range(200)), "utf-8")
    minded = Calibrator.from_pretrained(train(text, tmp_path / "on", training={"steps": 2})).config.words
    assert minded["nitwit"] < -1.9
    assert "the" not in minded
    assert min(minded[term] for term in TERMS) >= LISTED_SHIFT  # groups of people are spared, whatever the text says
    off = train(text, tmp_path / "off", training={"steps": 2, "word_table": False})
    assert Calibrator.from_pretrained(off).config.words == {}


def test_a_resumed_run_ends_with_the_same_weights(text, tmp_path):
    whole = train(text, tmp_path / "whole")
    # 10 of 20 steps, then on: the schedule is that of 20 steps in both, so the first half is cut by a signal
    code = (
        "import sys, signal, os\n"
        "from calibfuse.training.trainer import Trainer\n"
        "original = Trainer.take_step\n"
        "def step(self):\n"
        "    if self.step == 11: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return original(self)\n"
        "Trainer.take_step = step\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_training_run import train, TrainingText\n"
        "from pathlib import Path\n"
        "text = TrainingText(wanted=[sys.argv[2]], unwanted=[sys.argv[3]])\n"
        "assert train(text, Path(sys.argv[4])) is None\n"
    )
    halves = tmp_path / "halves"
    arguments = [str(Path(__file__).parent), text.wanted[0], text.unwanted[0], str(halves)]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert len(history(halves)) == 12
    assert not (halves / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="go on with resume"):
        train(text, halves)
    assert train(text, halves, resume=True) == halves
    assert history(halves) == history(whole)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, halves))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_can_start_from_an_earlier_calibrator(text, tmp_path):
    first = train(text, tmp_path / "first", training={"steps": 60})
    pool = next((first / "work").glob("pool-*"))
    training = TrainingConfig(**{**QUICK, "steps": 5, "precision": "fp32"})
    second = run_training(
        text,
        tmp_path / "second",
        training=training,
        init_from=first,
        pool_folder=pool,
        device="cpu",
        show_progress=False,
    )
    assert history(second)[0]["reference_nats"] < history(first)[0]["reference_nats"] - 0.3


def test_the_word_table_of_the_calibrator_to_start_from_is_kept(text, tmp_path):
    """A short run counts few words; those of the base must not be lost with it."""
    Path(text.unwanted[0]).write_text("\n\n".join(f"What a nitwit number {i} is." for i in range(200)), "utf-8")
    base = train(text, tmp_path / "base", training={"steps": 2}, facts={"name": "mine", "license": "mit"})
    Path(text.unwanted[0]).write_text("\n\n".join(f"Such a dimwit number {i} is." for i in range(200)), "utf-8")
    options = {"pool_folder": next((base / "work").glob("pool-*")), "init_from": base, "device": "cpu"}
    training = TrainingConfig(**{**QUICK, "steps": 2, "precision": "fp32"})
    config = Calibrator.from_pretrained(
        run_training(text, tmp_path / "next", training=training, show_progress=False, **options)
    ).config
    assert config.words["nitwit"] < -1.9
    assert config.words["dimwit"] < -1.9
    told = config.training["base"]
    assert (told["name"], told["license"]) == ("mine", "mit")
    assert told["data"]["files"] == ["clean.txt", "web.txt"]
    assert told["inherited"][-1].endswith("words of its word table")


def test_bad_options_are_found_before_the_text_is_read(text, tmp_path, monkeypatch):
    monkeypatch.setattr(PassageStore, "build", None)
    with pytest.raises(InputError, match="either a shape or init_from"):
        train(text, tmp_path / "out", init_from="bundled")
    missing = replace(text, wanted=[str(tmp_path / "none.txt")])
    with pytest.raises(DataError, match="No such file"):
        train(missing, tmp_path / "out")
    with pytest.raises(InputError, match="device must be one of torch's, such as 'cpu' or 'cuda:0', got 'abacus'"):
        run_training(text, tmp_path / "out", device="abacus", show_progress=False)


def test_the_losses_are_drawn(text, tmp_path):
    picture = (train(text, tmp_path / "out", training={"steps": 3}) / "training.svg").read_text()
    assert picture.startswith("<?xml")
    assert "</svg>" in picture


def test_heads_alone_leave_body_and_token_vectors_as_they_are(text, tmp_path):
    first = train(text, tmp_path / "first", training={"steps": 20})
    options = {"init_from": first, "pool_folder": next((first / "work").glob("pool-*"))}

    def run(output, steps, resume=False):
        training = TrainingConfig(**{**QUICK, "steps": steps, "precision": "fp32", "heads_only": True, "decay": 0.0})
        return run_training(
            text, output, training=training, device="cpu", show_progress=False, resume=resume, **options
        )

    whole, halves = run(tmp_path / "whole", 10), tmp_path / "halves"
    run(halves, 5)
    assert run(halves, 10, resume=True) == halves
    before = {name: tensor.float() for name, tensor in load_file(first / "model.safetensors").items()}
    after, resumed = (load_file(folder / "work" / "checkpoint" / "model.safetensors") for folder in (whole, halves))
    width = SHAPE.token_width
    for name, tensor in before.items():
        assert torch.equal(after[name], resumed[name]), name
        if name.startswith("heads."):
            assert not torch.equal(tensor, after[name]), name
        elif name == "composer.table":
            assert torch.equal(tensor[:, :width], after[name][:, :width])
            assert not torch.equal(tensor[:, width:], after[name][:, width:])  # the heads' biases
        else:
            assert torch.equal(tensor, after[name]), name
    with pytest.raises(InputError, match="init_from"):
        train(text, tmp_path / "none", training={"heads_only": True})


def test_resuming_with_other_text_is_refused(text, tmp_path):
    train(text, tmp_path / "out", training={"steps": 5})
    (tmp_path / "web.txt").write_text("Something else entirely, and quite a bit of it.\n\n" * 200, encoding="utf-8")
    with pytest.raises(CheckpointError, match="another text"):
        train(text, tmp_path / "out", resume=True, training={"steps": 6})


def test_resuming_without_a_checkpoint_is_refused(text, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint yet in .*out: run it without resume"):
        train(text, tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()  # it is said before the text is read


def test_a_finished_calibrator_is_not_overwritten(text, tmp_path):
    output = train(text, tmp_path / "out", training={"steps": 2})
    shutil.rmtree(output / "work")
    with pytest.raises(CheckpointError, match="holds a finished calibrator"):
        train(text, output)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"unwanted": ["a"]}, "needs wanted"),
        ({"unfiltered": ["a"], "unwanted": ["b"]}, "not both"),
        ({"unfiltered": ["a"]}, "scorer"),
    ],
)
def test_sources_that_make_no_sense_are_refused(sources, message):
    with pytest.raises(InputError, match=message):
        TrainingText(**sources)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("steps", 0), ("learning_rate", float("nan")), ("decay", 1.5), ("precision", "int3"), ("flagged_share", 1.0)],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(InputError, match=setting):
        TrainingConfig(**{setting: value})


def test_the_rate_rises_stays_and_falls():
    rates = [learning_rate(step, 100, peak=1.0, warmup=0.1, decay=0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[30] == rates[49] == 1.0
    assert rates[99] == pytest.approx(0.02)


def test_a_loss_that_is_no_number_stops_the_run(text, tmp_path):
    with pytest.raises(InputError, match="diverged"):
        train(text, tmp_path / "out", training={"learning_rate": 1e30, "steps": 30})


@pytest.mark.slow
def test_the_command_stops_cleanly_on_ctrl_c_and_resumes(text, tmp_path):
    command = [
        sys.executable, "-m", "calibfuse", "train-calibrator", "--wanted", text.wanted[0], "--unwanted",
        text.unwanted[0], "--output", str(tmp_path / "out"), "--steps", "100000", "--batch-size", "4",
        "--sequence-length", "32",
        "--layers", "1", "--width", "16", "--token-width", "16", "--buckets", "512", "--validate-every", "0",
        "--save-every", "20", "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180
    while not (tmp_path / "out" / "work" / "checkpoint").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no checkpoint within three minutes"
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in output
    steps = len(history(tmp_path / "out"))
    command[command.index("--steps") + 1] = str(steps + 2)
    result = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    assert len(history(tmp_path / "out")) == steps + 2


@pytest.mark.slow
def test_two_processes_follow_the_loss_curve_of_one(text, tmp_path):
    """Every process packs the same batch and trains on half of its rows.

    The mean of the means differs by rounding and by unequal token counts of the halves: a few thousandths of a nat.
    """
    pytest.importorskip("accelerate")
    single = train(text, tmp_path / "single", training={"steps": 15})
    script = tmp_path / "two.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_training_run import train, TrainingText\n"
        "from pathlib import Path\n"
        f"text = TrainingText(wanted=[{text.wanted[0]!r}], unwanted=[{text.unwanted[0]!r}])\n"
        f"train(text, Path({str(tmp_path / 'double')!r}), training={{'steps': 15}})\n"
    )
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(launch, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = history(single), history(tmp_path / "double")
    assert len(one) == len(two) == 15
    for first, second in zip(one, two, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=0.05)


def test_the_command_explains_itself_quickly():
    result = subprocess.run(
        [sys.executable, "-m", "calibfuse", "train-calibrator", "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    assert re.search(r"--unwanted", result.stdout)
    assert "accelerate launch" in result.stdout
