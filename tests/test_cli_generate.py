"""`calibfuse generate` on tiny random models: what it prints, streams and compares, and how it refuses bad input."""

import io
import json
import shutil
import sys

import pytest
import torch
from tiny_calibrators import make_calibrator

from calibfuse.cli.prompts import read_prompts_file
from calibfuse.cli.terminal import Terminal, display_width, printable, wants_colour, wrap
from calibfuse.errors import CheckpointError, DataError, FusionNotAppliedError, InputError
from calibfuse.generation.decoding import Decoding, continue_prompts, decode_continuation
from calibfuse.generation.language_model import load_language_model
from calibfuse.processor import CalibFusion


@pytest.fixture
def run(bundle, monkeypatch, command_line):
    """A function: arguments of the command line -> (exit code, standard output, standard error)."""
    monkeypatch.setattr("calibfuse.hub._BUNDLED", bundle)

    return command_line


@pytest.fixture(scope="module")
def target(bundle):
    return load_language_model(str(bundle / "demo-target"))


@pytest.fixture(scope="module")
def fusion(target):
    return CalibFusion(make_calibrator().bind(target.tokenizer))


PROMPTS = ["The river", "A long walk through the town and then", "She said"]


def rows(output):
    return [json.loads(line) for line in output.splitlines()]


def test_without_a_model_the_demo_target_continues_and_a_note_says_so(run):
    code, out, err = run("generate", "The river", "--max-new-tokens", "5", "--greedy")
    assert code == 0
    assert out.startswith("The river")
    assert "demo target" in err


def test_prompts_in_one_batch_are_continued_as_one_by_one(run, bundle):
    """Left padding changes nothing, with and without fusion."""
    arguments = ["--model", str(bundle / "demo-target"), "--greedy", "--max-new-tokens", "6", "--compare", "--json"]
    code, out, err = run("generate", *PROMPTS, *arguments)
    assert (code, err) == (0, "")
    together = rows(out)
    assert [row["prompt"] for row in together] == PROMPTS
    for number, prompt in enumerate(PROMPTS):
        (alone,) = rows(run("generate", prompt, *arguments)[1])
        for way in ("plain", "fused"):
            assert [each["text"] for each in alone[way]] == [each["text"] for each in together[number][way]]


def test_the_fused_text_is_what_three_lines_of_python_give(run, target, bundle, fusion):
    ids = target.tokenizer("The river", return_tensors="pt")["input_ids"]
    torch.manual_seed(3)
    loaded = CalibFusion.from_pretrained(bundle / "default-calibrator", tokenizer=target.tokenizer)
    output = target.model.generate(
        ids, max_new_tokens=8, do_sample=True, top_p=0.9, top_k=0, pad_token_id=2, logits_processor=[loaded]
    )
    expected = decode_continuation(target.tokenizer, ids[0].tolist(), output[0, ids.shape[1] :].tolist())
    out = run("generate", "The river", "--seed", "3", "--max-new-tokens", "8", "--json")[1]
    assert rows(out)[0]["fused"][0]["text"] == expected


def test_the_same_seed_repeats_and_another_does_not(run):
    def text(seed):
        out = run("generate", "The river", "--seed", seed, "--json", "--max-new-tokens", "12")[1]
        return rows(out)[0]["fused"][0]["text"]

    assert text("1") == text("1")
    assert text("1") != text("2")


def test_with_alpha_0_plain_and_fused_are_equal(run):
    out = run("generate", *PROMPTS, "--compare", "--json", "--alpha", "0", "--samples", "2")[1]
    for row in rows(out):
        assert row["plain"] == row["fused"]
        assert len(row["fused"]) == 2
        assert row["fusion"]["alpha"] == 0.0


def test_json_tells_tokens_and_toxicity(run):
    (row,) = rows(run("generate", "The river", "--compare", "--json", "--max-new-tokens", "4")[1])
    for way in ("plain", "fused"):
        (sample,) = row[way]
        assert 1 <= sample["tokens"] <= 4
        assert 0.0 <= sample["toxicity"] <= 1.0
    (row,) = rows(run("generate", "The river", "--json", "--max-new-tokens", "4")[1])
    assert "plain" not in row
    assert "toxicity" not in row["fused"][0]


def test_words_and_names_come_from_files(run, tmp_path, bundle, monkeypatch):
    (tmp_path / "words.txt").write_text("river\nwalk -2\n")
    (tmp_path / "names.txt").write_text("Ann\n")
    files = ("--words", str(tmp_path / "words.txt"), "--protect-names", str(tmp_path / "names.txt"))
    seen = []
    add = CalibFusion.add_words
    monkeypatch.setattr(CalibFusion, "add_words", lambda self, words: seen.append(words) or add(self, words))
    for command in (("generate", "The river", "--max-new-tokens", "2"), ("inspect", "The", "--max-new-tokens", "1")):
        code, _, err = run(*command, *files)
        assert code == 0, err
    assert seen == [{"river": -6.0, "walk": -2.0, "ann": 1.0}] * 2
    causal = shutil.copytree(bundle / "demo-target", tmp_path / "causal")
    code, _, err = run("generate", "a", "--calibrator", str(causal), "--mode", "geometric", *files)
    assert code == 2
    assert "Words are a part of universal calibrators" in err


def test_compare_shows_both_with_their_toxicity(run, monkeypatch):
    for columns in ("70", "120"):  # one after the other, side by side
        monkeypatch.setenv("COLUMNS", columns)
        out = run("generate", "The river", "--compare", "--greedy", "--max-new-tokens", "4")[1]
        assert "plain (toxicity 0." in out
        assert "fused (toxicity 0." in out


@pytest.mark.parametrize("options", [["--greedy"], ["--temperature", "0.7"]])
def test_each_way_of_decoding_applies_the_fusion(run, options):
    code, out, err = run("generate", *PROMPTS, "--max-new-tokens", "6", "--compare", "--json", *options)
    assert code == 0, err
    assert any(row["plain"] != row["fused"] for row in rows(out))


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback", "unigram", "wordpiece"])
def test_streamed_text_is_the_text(family, request, wrap_tokenizer, tiny_gpt2, tmp_path, run, bundle, monkeypatch):
    """Also where a tokenizer would drop the first word's space."""
    tokenizer = wrap_tokenizer(request.getfixturevalue(f"{family}_tokenizer"))
    tiny_gpt2(len(tokenizer), eos_token_id=None).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--calibrator", str(bundle / "default-calibrator"), "--max-new-tokens", "12"]
    prompt = "we walked along the river"
    printed = run("generate", prompt, *arguments)[1]
    monkeypatch.setattr(Terminal, "is_interactive", True)
    streamed = run("generate", prompt, *arguments)[1]
    assert streamed.strip() == printed.strip()
    assert streamed.startswith(prompt)


def test_a_continuation_keeps_its_leading_space(wrap_tokenizer, byte_fallback_tokenizer):
    tokenizer = wrap_tokenizer(byte_fallback_tokenizer)
    ids = tokenizer("the river and the town", add_special_tokens=False)["input_ids"]
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut], clean_up_tokenization_spaces=False)
        whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert before + decode_continuation(tokenizer, ids[:cut], ids[cut:]) == whole


def test_an_engine_that_drops_the_processor_is_noticed(target, fusion, monkeypatch):
    plain_generate = type(target.model).generate

    def dropping(self, *args, logits_processor, **options):
        return plain_generate(self, *args, **options)

    monkeypatch.setattr(type(target.model), "generate", dropping)
    ids = target.tokenizer("The river")["input_ids"]
    with pytest.raises(FusionNotAppliedError, match="without one step of CalibFusion"), fusion.required():
        continue_prompts(target, [ids], Decoding(max_new_tokens=3), [fusion])
    continue_prompts(target, [ids], Decoding(max_new_tokens=3))


def test_the_end_mark_ends_a_continuation_and_is_not_part_of_it(target, monkeypatch):
    monkeypatch.setattr(target.model.generation_config, "eos_token_id", list(range(3, 300)))
    ids = target.tokenizer("The river")["input_ids"]
    ((sample,),) = continue_prompts(target, [ids], Decoding(max_new_tokens=30))
    assert sample.is_finished
    assert not set(sample.token_ids) & set(range(3, 300))


def test_a_chat_template_is_applied(target, bundle, run, tmp_path):
    code, _, err = run("generate", "Hello", "--chat")
    assert code == 2
    assert "no chat template" in err
    target.model.save_pretrained(tmp_path)
    tokenizer = type(target.tokenizer).from_pretrained(bundle / "demo-target")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}reply:"
    tokenizer.save_pretrained(tmp_path)
    chat = run("generate", "--model", str(tmp_path), "Hello", "--chat", "--greedy", "--json")
    same = run("generate", "--model", str(tmp_path), "[user] Hello reply:", "--greedy", "--json")
    assert chat[0] == 0, chat[2]
    assert rows(chat[1])[0]["fused"] == rows(same[1])[0]["fused"]


# ---- prompts


def test_prompts_come_from_files_and_standard_input(tmp_path, run, monkeypatch):
    text = tmp_path / "prompts.txt"
    text.write_text("The river\r\n\nShe said\n", encoding="utf-8")
    assert read_prompts_file(str(text)) == ["The river", "She said"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "The river"}\n{"prompt": {"text": "She"}}\n{"text": "said"}\n', encoding="utf-8")
    assert read_prompts_file(str(lines)) == ["The river", "She", "said"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The river\nShe said\n")))
    out = run("generate", "--greedy", "--json", "--max-new-tokens", "2", "-")[1]
    assert [row["prompt"] for row in rows(out)] == ["The river", "She said"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "is empty"),
        ("p.txt", b"\n \n", "it has none"),
        ("p.txt", b"ab\0cd", "is a binary file"),
        ("p.txt", b"fine\n\xff\xfe\xfa", "line 2: expected UTF-8 text"),
        ("p.jsonl", b'{"prompt": "a"}\nnonsense\n', "line 2: expected one JSON object per line"),
        ("p.jsonl", b'{"question": "a"}\n', "line 1 of .* found none"),
        ("p.jsonl", b"[1]\n", "line 1: expected a JSON object"),
    ],
)
def test_a_bad_prompts_file_is_refused_in_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts_file(str(path))


def test_a_missing_prompts_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"No such file .*none\.txt"):
        read_prompts_file(str(tmp_path / "none.txt"))


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one source of prompts, got none"),
        (["a", "--prompts", "b"], "got several"),
        (["  "], "Prompt 1 is blank"),
        (["a", "--alpha", "nan"], "alpha must be a number"),
        (["a", "--alpha", "-1"], "alpha must be a number"),
        (["a", "--alpha", "much"], "invalid float value"),
        (["a", "--mode", "magic"], "Unknown fusion mode 'magic'"),
        (["a", "--mode", "value"], "needs the head 'value'"),
        (["a", "--greedy", "--top-k", "3"], "--greedy and --top-k exclude"),
        (["a", "--greedy", "--samples", "2"], "only 1 different"),
        (["a", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["a", "--max-new-tokens", "400"], "256 positions"),
        (
            ["a", "--temperature", "0"],
            "--temperature must be above 0, got 0.0; for no randomness decode greedily",
        ),
        (["a", "--temperature", "nan"], "--temperature"),
        (["a", "--top-p", "1.5"], "--top-p must be above 0"),
        (["a", "--top-k", "-1"], "--top-k must be at least 0"),
        (["a", "--seed", "-1"], "--seed must lie"),
        (["a", "--words", "./no-such-words.txt"], "Cannot read words"),
        (["a", "--device", "toaster"], "device must be one of torch's, such as 'cpu' or 'cuda:0', got 'toaster'"),
        (["a", "--model", "./no/such/folder"], "no model folder"),
        (["a", "--model", "no-one/nothing"], "Cannot load the tokenizer of 'no-one/nothing'"),
        (["a", "--model", " "], "empty name"),
        (["a", "--model", __file__], "is a file"),
        (["a", "--calibrator", "./no/such/folder"], "no checkpoint folder"),
    ],
    ids=lambda value: " ".join(value[2:] or value) if isinstance(value, list) else "",
)
def test_bad_input_gives_one_sentence_and_exit_code_2(run, arguments, message):
    code, out, err = run("generate", *arguments)
    assert code == 2
    assert message in err
    assert err.strip().count("\n") <= 1  # the note on the demo target may stand before it
    assert out == ""


def test_folders_that_hold_no_target_are_refused(bundle, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_language_model(str(tmp_path))
    with pytest.raises(CheckpointError, match="is it the calibrator"):
        load_language_model(str(bundle / "default-calibrator"))
    with pytest.raises(InputError, match="local folder"):
        load_language_model(str(bundle / "demo-target"), revision="main")


def test_a_truncated_model_is_refused_in_one_sentence(bundle, tmp_path):
    for path in (bundle / "demo-target").iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    with pytest.raises(CheckpointError, match="Cannot load the model") as caught:
        load_language_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_model_of_another_kind_is_refused(tmp_path, bundle):
    for path in (bundle / "demo-target").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="Cannot load"):
        load_language_model(str(tmp_path))


# ---- the terminal


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


def test_colour_needs_a_terminal_and_no_veto(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert wants_colour(FakeTerminal())
    assert not wants_colour(io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(FakeTerminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour(FakeTerminal())


def test_a_model_cannot_command_the_terminal():
    assert printable("\x1b]0;title\x07a\rb\u202ec\u200bd") == "]0;titleabcd"
    assert printable("a\tb\nc", keep_lines=True) == "a b\nc"


@pytest.mark.parametrize("text", ["plain words in a row", "一二三四五六七八九十", "a" * 50, "e\u0301 " * 20, ""])
@pytest.mark.parametrize("width", [7, 20])
def test_wrapped_text_fits_and_loses_nothing(text, width):
    lines = wrap(text, width)
    assert all(display_width(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_columns_and_tables_line_up():
    stream = io.StringIO()
    terminal = Terminal(stream, width=40, colour=False)
    terminal.side_by_side(["left", "some words that need two lines"], ["right", "short"])
    terminal.table(("name", "value"), [("一", "1"), ("abc", "1000")])
    lines = stream.getvalue().splitlines()
    assert len({line.index("|") for line in lines[:3]}) == 1
    assert {display_width(line) for line in lines[-3:]} == {11}
    assert "\x1b" not in stream.getvalue()


def test_coloured_cells_keep_their_width():
    plain, coloured = io.StringIO(), io.StringIO()
    for stream, colour in ((plain, False), (coloured, True)):
        Terminal(stream, colour=colour).table(("a", "b"), [("x", "1")], styles=[["red", None]])
    text = coloured.getvalue()
    for code in ("\x1b[0m", "\x1b[31m", "\x1b[4m"):
        assert code in text
        text = text.replace(code, "")
    assert text == plain.getvalue()
