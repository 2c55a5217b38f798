"""`calibfuse align`: binding fills the cache, and the report counts what is there."""

import json
import re

import pytest

from calibfuse.inspection import report_vocabulary
from calibfuse.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def tokenizer(wordpiece_tokenizer, wrap_tokenizer):
    return wrap_tokenizer(wordpiece_tokenizer)


@pytest.fixture
def run(bundle, monkeypatch, command_line, tmp_path):
    """A function: arguments -> (exit code, standard output, standard error)."""
    monkeypatch.setattr("calibfuse.hub._BUNDLED", bundle)
    monkeypatch.setenv("CALIBFUSE_CACHE", str(tmp_path / "cache"))

    return lambda *arguments: command_line("align", *arguments)


# ---- the counts


def test_the_vocabulary_is_counted_as_by_hand():
    """Ids: two special, " a" twice, a lone continuation byte, "bc"."""
    vocabulary = Vocabulary.from_byte_strings([None, b" a", b" a", b"\x80", b"bc", None], name="six")
    report = report_vocabulary(vocabulary)
    assert (report.size, report.covered, report.special, report.duplicates, report.partial) == (6, 4, 2, 1, 1)
    assert report.longest == 2
    assert report.coverage == pytest.approx(4 / 6)
    assert report.to_dict()["coverage"] == report.coverage


# ---- the command


def test_binding_fills_the_cache(run, bundle, tmp_path):
    folder = tmp_path / "cache" / "bound"
    code, out, err = run("--tokenizer", str(bundle / "demo-target"))
    assert (code, err) == (0, "")
    assert "600 ids" in out
    (cached,) = folder.iterdir()
    written = cached.stat().st_mtime_ns
    assert run("--tokenizer", str(bundle / "demo-target"), "--calibrator", str(bundle / "default-calibrator"))[0] == 0
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == [written]


def test_a_folder_and_its_tokenizer_file_give_the_same_report(run, bundle):
    folder = bundle / "demo-target"
    records = []
    for tokenizer in (folder, folder / "tokenizer.json"):
        code, out, err = run("--tokenizer", str(tokenizer), "--json")
        assert (code, err) == (0, "")
        records.append(json.loads(out))
    assert records[0]["vocabulary"]["fingerprint"] == records[1]["vocabulary"]["fingerprint"]
    assert records[0]["vocabulary"]["special"] == 3


def test_the_report_is_printed(run, bundle):
    code, out, _ = run("--tokenizer", str(bundle / "demo-target"), "--report")
    assert code == 0
    assert re.search(r"covered \(have text\) +597 +99.50 %", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "./no/such/thing"], "./no/such/thing"),
        (["--tokenizer", "TARGET", "--calibrator", "TARGET"], "calibfuse-calibrator"),
        (["--tokenizer", __file__], "no tokenizer"),
        (["--tokenizer", "nowhere"], "the Hub was not reached"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_input_gives_one_sentence_and_exit_code_2(run, bundle, arguments, message):
    code, out, err = run(*(str(bundle / "demo-target") if each == "TARGET" else each for each in arguments))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_projected_language_model_is_reported_on(run, bundle, tmp_path, unigram_tokenizer):
    path = tmp_path / "tokenizer.json"
    unigram_tokenizer.save(str(path))
    model = str(bundle / "demo-target")  # a byte-level model projected onto a unigram vocabulary
    code, out, err = run("--calibrator", model, "--tokenizer", str(path), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["vocabulary"]["unspelled"] == 0
    assert run("--calibrator", model, "--tokenizer", str(path))[0] == 2
