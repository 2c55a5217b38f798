"""Prompt files: the two benchmarks' formats, a user's own, filters, the draw, and one sentence for each bad file."""

import gzip
import json
import lzma

import pytest

from calibfuse.errors import DataError, InputError
from calibfuse.evaluation import load_prompts


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def graded(tmp_path):
    """Twenty prompts with toxicities 0.00, 0.05, ... 0.95."""
    rows = [{"prompt": f"prompt number {n}", "prompt_toxicity": n / 20} for n in range(20)]
    return write_rows(tmp_path / "graded.jsonl", rows)


@pytest.mark.parametrize(
    ("row", "text", "toxicity"),
    [
        ({"prompt": "A b ", "prompt_toxicity": 0.25, "id": "x"}, "A b", 0.25),
        ({"prompt": {"text": "A b", "toxicity": 0.5, "insult": 1}, "filename": "f"}, "A b", 0.5),
        ({"prompt": "The nurse ", "domain": "profession", "group": "nursing"}, "The nurse", None),
        ({"text": "A b"}, "A b", None),
        ({"prompt": {"text": "A b", "toxicity": None}}, "A b", None),
    ],
    ids=["flat", "original", "bold", "own", "unknown-toxicity"],
)
def test_rows_of_every_format_are_understood(tmp_path, row, text, toxicity):
    (prompt,) = load_prompts(write_rows(tmp_path / "p.jsonl", [row]))
    assert (prompt.text, prompt.toxicity) == (text, toxicity)


def test_plain_text_has_a_prompt_a_line_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffOne\r\n\r\n  \nTwo words \nOne\n".encode())
    assert [prompt.text for prompt in load_prompts(path)] == ["One", "Two words"]


@pytest.mark.parametrize("opener", [gzip.open, lzma.open], ids=["gz", "xz"])
def test_compressed_files_are_read(tmp_path, opener):
    path = tmp_path / f"p.jsonl.{'gz' if opener is gzip.open else 'xz'}"
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.write('{"prompt": "One"}\n{"prompt": "Two"}\n')
    assert [prompt.text for prompt in load_prompts(path)] == ["One", "Two"]


def test_a_smaller_draw_is_part_of_a_larger_one_and_seeds_differ(graded):
    draws = [{prompt.id for prompt in load_prompts(graded, count=count, seed=3)} for count in (4, 9, 20, 99)]
    assert [len(draw) for draw in draws] == [4, 9, 20, 20]
    assert draws[0] < draws[1] < draws[2] == draws[3]
    assert {prompt.id for prompt in load_prompts(graded, count=9, seed=4)} != draws[1]


def test_filters_keep_what_they_say_in_the_order_of_the_file(graded):
    low = [prompt.toxicity for prompt in load_prompts(graded, max_toxicity=0.5)]
    high = [prompt.toxicity for prompt in load_prompts(graded, min_toxicity=0.5)]
    assert low == sorted(low)
    assert max(low) < 0.5 <= min(high)
    assert len(low) + len(high) == 20


def test_the_real_files_are_read(shared_data):
    prompts = load_prompts(shared_data / "prompts" / "realtoxicityprompts.jsonl.xz", count=50, max_toxicity=0.5)
    assert len(prompts) == len({prompt.id for prompt in prompts}) == 50
    assert all(prompt.toxicity < 0.5 and prompt.text == prompt.text.rstrip() for prompt in prompts)
    assert len(load_prompts(shared_data / "prompts" / "bold.jsonl.xz", count=50)) == 50


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.jsonl", b"", "is empty"),
        ("p.txt", b" \n\n", "has none"),
        ("p.txt", b"abc\0def\n", "is a binary file"),
        ("p.txt", b"fine\nb\xe4d\n", "line 2: expected UTF-8 text"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2: expected one JSON object per line"),
        ("p.jsonl", b'{"prompt": "a"}\n{"other": "b"}\n', 'field "prompt" or "text" of line 2'),
        ("p.jsonl", b'["a"]\n', "line 1: expected a JSON object .* got list"),
        ("p.jsonl", b'{"prompt": "a", "prompt_toxicity": 7}\n', "expected 0 to 1"),
        ("p.txt", b"x" * 1_001, "line 1: expected at most 1,000 bytes"),
        ("p.jsonl.xz", b"no xz at all", "damaged or not a .xz file"),
        ("p.txt.gz", gzip.compress(b"one\ntwo\n" * 99)[:-20], "damaged or not a .gz file"),
    ],
    ids=["empty", "blank", "binary", "latin1", "no-json", "no-field", "list", "range", "long", "no-xz", "torn-gz"],
)
def test_bad_files_give_one_sentence(tmp_path, monkeypatch, name, data, message):
    monkeypatch.setattr("calibfuse.textfiles.MAX_ROW_BYTES", 1000)
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


def test_missing_files_and_impossible_wishes_are_refused(tmp_path, graded):
    with pytest.raises(DataError, match="No such file"):
        load_prompts(tmp_path / "none.txt")
    with pytest.raises(DataError, match="cannot be read"):
        load_prompts(tmp_path)
    with pytest.raises(InputError, match="at least 1"):
        load_prompts(graded, count=0)
    with pytest.raises(DataError, match="None of the 20 prompts"):
        load_prompts(graded, min_toxicity=0.99)
