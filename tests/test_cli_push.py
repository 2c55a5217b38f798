"""`calibfuse push` as a user runs it: a folder goes to a Hub on the loopback interface and comes back the same."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from loopback_hub import TOKEN, LoopbackHub

from calibfuse import Calibrator
from calibfuse.calibrator import CalibratorConfig
from calibfuse.cli.main import main

SMALL = {"bucket_count": 64, "token_width": 8, "composer_hidden_width": 8, "width": 16, "layer_count": 1}
SMALL |= {"head_count": 2, "hidden_width": 16, "adapter_width": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("calibrator")
    torch.manual_seed(0)
    Calibrator(CalibratorConfig(**SMALL)).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def server():
    with LoopbackHub() as server:
        yield server


# The command line in a process that knows the loopback Hub (huggingface_hub reads its address when it is imported): one
# for all tests, since it takes seconds to start.
COMMAND_LINE = """
import contextlib, io, json, os, sys
from calibfuse.cli.main import main
for line in sys.stdin:
    arguments, token = json.loads(line)
    os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def process(server, tmp_path_factory):
    variables = {**os.environ, **server.environment(tmp_path_factory.mktemp("home"))}
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND_LINE], env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def push(server, process):
    server.clear()

    def run(*arguments, token=TOKEN):
        print(json.dumps([["push", *map(str, arguments)], token]), file=process.stdin, flush=True)
        return SimpleNamespace(
            **dict(zip(("returncode", "stdout", "stderr"), json.loads(process.stdout.readline()), strict=True))
        )

    return run


def test_a_folder_is_published_whole(push, server, folder, tmp_path):
    result = push(folder, "org/quiet", "--private", "--message", "first try")
    assert result.returncode == 0, result.stderr
    assert f"{server.address}/org/quiet" in result.stdout
    repository = server.repositories["org/quiet"]
    assert repository.private
    assert repository.messages[-1] == "first try"
    for name, data in repository.files().items():
        (tmp_path / name).write_bytes(data)
    published, original = Calibrator.from_pretrained(tmp_path), Calibrator.from_pretrained(folder)
    assert published.config == original.config
    for name, tensor in original.state_dict().items():
        assert torch.equal(published.state_dict()[name], tensor), name


def test_the_card_names_the_repository_and_keeps_what_the_user_wrote(push, server, folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    card = (copy / "README.md").read_text() + "\nMy own words.\n"
    (copy / "README.md").write_text(card)
    assert push(copy, "org/quiet").returncode == 0
    published = server.repositories["org/quiet"].files()["README.md"].decode()
    assert 'from_pretrained("org/quiet"' in published
    assert published == card.replace("your-name/your-calibrator", "org/quiet")
    (copy / "README.md").write_text("# Mine\n")
    assert push(copy, "org/quiet").returncode == 0
    published = server.repositories["org/quiet"].files()["README.md"].decode()
    assert 'library_name: "calibfuse"' in published
    assert published.endswith("---\n\n# Mine\n")
    (copy / "README.md").unlink()
    assert push(copy, "org/other").returncode == 0
    assert 'from_pretrained("org/other"' in server.repositories["org/other"].files()["README.md"].decode()


def test_a_causal_language_model_is_not_published_here(tmp_path, capsys):
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert main(["push", str(tmp_path), "org/quiet"]) == 2
    assert "causal language model of transformers" in capsys.readouterr().err


def test_a_branch_can_be_chosen(push, server, folder):
    result = push(folder, "org/quiet", "--revision", "dev")
    assert result.returncode == 0, result.stderr
    assert "model.safetensors" in server.repositories["org/quiet"].files("dev")
    assert "model.safetensors" not in server.repositories["org/quiet"].files("main")


@pytest.mark.parametrize("problem", ["empty", "foreign", "newer", "truncated"])
def test_a_folder_that_is_no_calibrator_is_not_published(folder, tmp_path, problem, capsys):
    """In this process, which is offline: another error than the one of the folder would show that it tried."""
    bad = tmp_path / "bad"
    bad.mkdir()
    config = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    if problem != "empty":
        changes = {"foreign": {"format": "llama"}, "newer": {"format_version": 99}}
        (bad / "config.json").write_text(json.dumps(config | changes.get(problem, {})))
        (bad / "model.safetensors").write_bytes(weights[: -100 if problem == "truncated" else None])
    assert main(["push", str(bad), "org/quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("calibfuse: error: ")
    assert str(bad) in error
    assert error.count("\n") == 1


def test_a_hub_that_refuses_is_one_sentence(push, server, folder):
    result = push(folder, "org/quiet", token="hf_of_somebody_else")
    assert result.returncode == 2
    assert result.stderr.startswith("calibfuse: error: Cannot push to 'org/quiet': the Hub refused access")
    assert result.stderr.count("\n") == 1
