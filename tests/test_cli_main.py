"""The command line as a user meets it: in a subprocess; quick help, one sentence per error, exit codes."""

import argparse
import dataclasses
import importlib
import re
import subprocess
import sys

import pytest

from calibfuse.cli import main as cli
from calibfuse.cli.options import Fields, _read_fields
from calibfuse.errors import DataError

COMMANDS = [name for name, _ in cli.COMMANDS]
HEAVY = ("torch", "transformers", "huggingface_hub", "numpy", "safetensors", "tokenizers", "sklearn", "matplotlib")


def run(*arguments, interpreter=()):
    return subprocess.run(
        [sys.executable, *interpreter, "-m", "calibfuse", *arguments], capture_output=True, text=True, timeout=60
    )


def imported(result):
    """The modules that `python -X importtime` reports on standard error."""
    return {match[1] for match in re.finditer(r"^import time:.*\| +(\S+)$", result.stderr, re.M)}


@pytest.mark.parametrize("command", [None, *COMMANDS], ids=lambda command: command or "calibfuse")
def test_help_is_complete_and_imports_nothing_heavy(command):
    result = run(*([command] if command else []), "--help", interpreter=("-X", "importtime"))
    assert result.returncode == 0, result.stderr
    assert "usage: calibfuse" in result.stdout
    assert "examples:" in result.stdout
    modules = imported(result)
    assert "argparse" in modules, "the list of imported modules was not read"
    assert not {module for module in modules if module.split(".")[0] in HEAVY}


def test_version_is_that_of_the_package():
    import calibfuse

    assert run("--version").stdout == f"calibfuse {calibfuse.__version__}\n"


def test_without_arguments_the_help_is_shown():
    result = run()
    assert result.returncode == 0
    assert "commands:" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["no-such-command"], "invalid choice: 'no-such-command'"),
        (["--no-such-option"], "unrecognized arguments|no command"),
        (["push"], "required: folder, repo_id"),
        (["push", "no-such-folder", "someone/something"], "'no-such-folder' is none"),
    ],
    ids=["command", "option", "missing-argument", "missing-folder"],
)
def test_bad_input_gives_one_sentence_and_exit_code_2(arguments, expected):
    result = run(*arguments)
    assert result.returncode == 2
    assert re.search(expected, result.stderr)
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.fixture
def command_that(monkeypatch):
    """Make the first command do what the given function does."""

    def install(action):
        def build_parser(command=None):
            parser = argparse.ArgumentParser(prog="calibfuse")
            parser.add_argument("command")
            parser.set_defaults(run=action)
            return parser

        monkeypatch.setattr(cli, "build_parser", build_parser)

    return install


def raising(error):
    def action(args):
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("expected text,\n  found none"), 2, "calibfuse: error: expected text, found none\n"),
        (OSError(28, "No space left on device"), 2, "calibfuse: error: [Errno 28] No space left on device\n"),
        (FileNotFoundError(), 2, "calibfuse: error: FileNotFoundError\n"),
        (KeyboardInterrupt(), 130, "calibfuse: interrupted\n"),
    ],
    ids=["our-error", "disk-full", "no-message", "interrupt"],
)
def test_expected_failures_become_one_line(command_that, capsys, error, code, message):
    command_that(raising(error))
    assert cli.main(["anything"]) == code
    assert capsys.readouterr().err == message


def test_a_defect_keeps_its_traceback(command_that):
    command_that(raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["anything"])


def test_the_commands_own_exit_code_is_passed_on(command_that):
    command_that(lambda args: 7)
    assert cli.main(["anything"]) == 7


def test_a_closed_pipe_is_quiet():
    """Help of every length goes into a pipe that nobody reads."""
    program = (
        "import sys; from calibfuse.cli import main as cli\n"
        "import argparse\n"
        "def build(command=None):\n"
        "    parser = argparse.ArgumentParser(); parser.add_argument('command')\n"
        "    parser.set_defaults(run=lambda args: print('x' * 1_000_000) or 0); return parser\n"
        "cli.build_parser = build; sys.exit(cli.main(['anything']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert error == b""


# ---- one table of options


def parsers():
    for name in COMMANDS:
        parser = cli.build_parser(name)
        (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
        yield name, commands.choices[name]


def test_help_begins_with_the_first_call():
    for name, parser in parsers():
        assert parser.format_help().startswith(f"first call:  calibfuse {name}")


def test_one_option_means_one_thing_everywhere():
    """The same spelling fills the same destination in every command, and no shown option is spelled in two ways."""
    meaning = {}
    for name, parser in parsers():
        for action in parser._actions:
            for spelling in action.option_strings if action.help != argparse.SUPPRESS else ():
                assert meaning.setdefault(spelling, action.dest) == action.dest, f"{spelling} of {name}"


def test_defaults_and_fields_are_those_of_the_settings_classes():
    """`Fields` reads them from the source; here the classes themselves say."""
    checked = 0
    for name in COMMANDS:
        module = importlib.import_module(f"calibfuse.cli.commands.{name.replace('-', '_')}")
        for fields in (each for each in vars(module).values() if isinstance(each, Fields)):
            place, _, title = fields.source.partition(":")
            known = {each.name: each for each in dataclasses.fields(getattr(importlib.import_module(place), title))}
            read = _read_fields(fields.source)
            for field in fields.options:
                default = None if known[field].default is dataclasses.MISSING else known[field].default
                # None: the source gives a name, not a value; the help says no default then
                assert read[field].default in (None, default), f"{fields.source}.{field}"
                assert read[field].help or field == "samples", f"{fields.source}.{field} has no help"
                checked += 1
    assert checked > 60


def test_the_default_of_a_field_is_the_one_that_the_help_names():
    """Options of other commands have the same names and defaults of their own, --batch-size for one."""
    checked = 0
    for name, parser in parsers():
        module = importlib.import_module(f"calibfuse.cli.commands.{name.replace('-', '_')}")
        of_fields = {
            each for fields in vars(module).values() if isinstance(fields, Fields) for each in fields.options.values()
        }
        for action in parser._actions:
            if action.dest in of_fields and action.help != argparse.SUPPRESS:
                assert not action.default or f"(default: {action.default})" in action.help, f"{name}: {action.dest}"
                checked += 1
    assert checked > 60


def test_messages_name_the_flag_of_a_field(capsys):
    assert cli.main(["generate", "a", "--max-new-tokens", "0"]) == 2
    assert capsys.readouterr().err == "calibfuse: error: --max-new-tokens must be at least 1, got 0.\n"
    assert cli.main(["train-guide", "--oracle", "o", "--prompts", "p", "--output", "d", "--samples", "0"]) == 2
    assert capsys.readouterr().err == "calibfuse: error: --samples must be at least 1, got 0.\n"


def test_an_unknown_option_points_to_the_help_of_its_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["push", "a", "b", "c"])
    assert "see `calibfuse push --help`" in capsys.readouterr().err
