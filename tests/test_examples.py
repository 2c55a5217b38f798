"""Every program in examples/ runs as a user would run it, is short enough to copy, and shows what it says it shows."""

import re
import runpy
import sys

import pytest
from conftest import REPOSITORY

PROGRAMS = sorted((REPOSITORY / "examples").glob("*.py"))


@pytest.fixture
def shown(monkeypatch, capsys):
    """A function: the name of a program -> the lines that it prints."""

    def run(name):
        path = REPOSITORY / "examples" / name
        monkeypatch.setattr(sys, "argv", [str(path)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_program_is_at_most_40_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


def test_every_program_is_run_here():
    assert [path.name for path in PROGRAMS] == [
        "decoding_loop.py",
        "detoxify.py",
        "perplexity.py",
        "sweep_strength.py",
        "trace_changes.py",
    ]


def test_detoxify_continues_the_prompt_in_two_ways(shown):
    plain, fused = shown("detoxify.py")
    assert plain.startswith("plain: I think that you are a")
    assert fused.startswith("fused: I think that you are a")
    assert plain[7:] != fused[7:]


@pytest.mark.slow
def test_a_strength_removes_what_no_strength_leaves(shown):
    rows = [line.split() for line in shown("sweep_strength.py")[1:]]
    assert [float(row[0]) for row in rows] == [0.0, 1.0, 2.25, 5.0]
    assert float(rows[0][2]) > max(float(row[2]) for row in rows[1:])


def test_the_trace_lowers_something(shown):
    lines = shown("trace_changes.py")
    assert len(lines) == 12
    assert any(re.search(r"'.*' -\d", line) for line in lines)


def test_the_loop_continues_the_prompt(shown):
    (text,) = shown("decoding_loop.py")
    assert text.startswith("The new neighbour is")
    assert len(text) > len("The new neighbour is") + 10


def test_a_harmless_text_keeps_its_perplexity(shown):
    plain, fused = (float(line.split()[-1]) for line in shown("perplexity.py"))
    assert plain != fused
    assert plain == pytest.approx(fused, rel=0.05)
