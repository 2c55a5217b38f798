"""`calibfuse serve`: the command line that it makes for vLLM; the server itself is tests/test_vllm.py's."""

import json
import shlex

import pytest

from calibfuse.cli.main import main


def command(capsys, *arguments):
    assert main(["serve", *arguments, "--print-command"]) == 0
    return shlex.split(capsys.readouterr().out)


def after(words, flag):
    return words[words.index(flag) + 1]


def test_the_processor_and_its_options_are_set_up(capsys):
    words = command(capsys, "org/llm", "--alpha", "1.5", "--calibrator", "mine", "--log-requests")
    assert words[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "org/llm"]
    assert after(words, "--logits-processors") == "calibfuse.vllm:CalibFusionProcessor"
    options = {"calibrator": "mine", "alpha": 1.5, "log_requests": True}
    assert json.loads(after(words, "--additional-config")) == {"calibfuse": options}


def test_strength_zero_is_an_option_like_any_other(capsys):
    assert json.loads(after(command(capsys, "m", "--alpha", "0"), "--additional-config")) == {
        "calibfuse": {"alpha": 0.0}
    }


def test_every_other_option_goes_to_the_server(capsys):
    words = command(capsys, "org/llm", "--port", "8001", "--tensor-parallel-size=2")
    assert after(words, "--port") == "8001"
    assert "--tensor-parallel-size=2" in words


def test_the_model_may_stand_behind_a_flag_as_in_other_commands(capsys):
    words = command(capsys, "--model", "org/llm", "--port", "8001")
    assert words.count("--model") == 1
    assert after(words, "--model") == "org/llm"
    assert after(words, "--port") == "8001"
    for arguments in (["--port", "8001", "--model", "org/llm"], ["org/llm", "--model", "m"], ["m", "--model=n"]):
        assert main(["serve", *arguments, "--print-command"]) == 2
        assert "the model first" in capsys.readouterr().err


def test_other_processors_and_configuration_are_kept(capsys):
    words = command(
        capsys, "m", "--alpha", "1", "--logits-processors", "a.b:C", "--additional-config", '{"other": {"x": 1}}'
    )
    place = words.index("--logits-processors")
    assert words[place + 1 : place + 3] == ["calibfuse.vllm:CalibFusionProcessor", "a.b:C"]
    assert words.count("--additional-config") == 1
    assert json.loads(after(words, "--additional-config")) == {"other": {"x": 1}, "calibfuse": {"alpha": 1.0}}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("m", "--alpha", "-1"), "alpha"),
        (("m", "--mode", "nope"), "mode"),
        (("m", "--additional-config", "{"), "JSON object behind --additional-config"),
        (("m", "--alpha", "1", "--additional-config", '{"calibfuse": {}}'), "give one"),
    ],
)
def test_bad_options_are_refused_before_the_server_starts(arguments, sentence, capsys):
    assert main(["serve", *arguments, "--print-command"]) == 2
    assert sentence in capsys.readouterr().err


def test_a_missing_engine_is_named_with_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("calibfuse.cli.commands.serve.util.find_spec", lambda name: None)
    assert main(["serve", "org/llm"]) == 2
    assert "calibfuse[vllm]" in capsys.readouterr().err


def test_other_commands_still_refuse_what_they_do_not_know(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--nonsense"])
    assert "nonsense" in capsys.readouterr().err
