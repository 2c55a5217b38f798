"""`calibfuse align`: binding fills the cache, and the report counts what is there."""

import base64
import io
import json
import math
import re

import pytest
import torch
from tiny_calibrators import make_calibrator

from calibfuse.bits_per_byte import measure_fidelity
from calibfuse.errors import DataError
from calibfuse.inspection import report_text, report_vocabulary
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


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, sample_lines):
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text("\n\n".join(sample_lines), encoding="utf-8")
    return path


# ---- the counts


def test_the_vocabulary_is_counted_as_by_hand():
    """Ids: two special, " a" twice, a lone continuation byte, "bc"."""
    vocabulary = Vocabulary.from_byte_strings([None, b" a", b" a", b"\x80", b"bc", None], name="six")
    report = report_vocabulary(vocabulary)
    assert (report.size, report.covered, report.special, report.duplicates, report.partial) == (6, 4, 2, 1, 1)
    assert report.longest == 2
    assert report.coverage == pytest.approx(4 / 6)
    assert report.to_dict()["coverage"] == report.coverage


@pytest.mark.parametrize("heads", [("calibrator", "reference"), ("calibrator",)])
def test_bits_per_byte_are_those_of_the_fidelity_measure(heads, tokenizer, sample_lines):
    bound = make_calibrator(heads=heads).bind(tokenizer, use_disk_cache=False)
    sequences = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in sample_lines[:20]]
    report = report_text(bound, [*sequences, []])
    assert set(report.bits_per_byte) == set(heads)
    for head in heads:
        expected = measure_fidelity(bound, sequences, head=head)
        assert report.bits_per_byte[head] == pytest.approx(expected.bits_per_byte, rel=1e-4)
        assert (report.tokens, report.bytes, report.skipped) == (expected.tokens, expected.bytes, expected.skipped)
    assert report.passages == 20


@pytest.mark.parametrize("block", [4_000_000, 1])
def test_the_sums_are_those_of_a_slow_loop(block, tokenizer, sample_lines, monkeypatch):
    monkeypatch.setattr("calibfuse.inspection.coverage._BLOCK_ELEMENTS", block)
    bound = make_calibrator().bind(tokenizer, use_disk_cache=False)
    sequences = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in sample_lines[:12]]
    nats, scored, special = 0.0, [], 0
    for ids in sequences:
        following = bound.log_probs(torch.tensor([ids]))[0]
        for place, token_id in enumerate(ids):
            if bound.vocabulary.is_special[token_id]:
                special += 1
                continue
            log_probs = bound.first_log_probs() if place == 0 else following[place - 1]
            nats -= float(log_probs[token_id])
            scored.append(token_id)
    report = report_text(bound, sequences)
    size = sum(len(bound.vocabulary.token_bytes(token_id)) for token_id in scored)
    assert (report.tokens, report.skipped, report.distinct) == (len(scored), special, len(set(scored)))
    assert report.bytes == size
    assert report.bits_per_byte["calibrator"] == pytest.approx(nats / size / math.log(2), rel=1e-4)


def test_unknown_marks_are_counted_and_left_out(tokenizer):
    bound = make_calibrator().bind(tokenizer, use_disk_cache=False)
    known = tokenizer("the river", add_special_tokens=False)["input_ids"]
    report = report_text(bound, [[*known, tokenizer.unk_token_id]])
    assert report.skipped == 1
    assert report.covered_mass == pytest.approx(len(known) / (len(known) + 1))


def test_a_text_without_a_covered_token_is_refused(tokenizer):
    bound = make_calibrator().bind(tokenizer, use_disk_cache=False)
    for sequences in ([], [[]], [[tokenizer.unk_token_id]]):
        with pytest.raises(DataError, match="no text to measure"):
            report_text(bound, sequences)


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


def test_a_folder_and_its_tokenizer_file_give_the_same_report(run, bundle, text_file):
    folder = bundle / "demo-target"
    records = []
    for tokenizer in (folder, folder / "tokenizer.json"):
        code, out, err = run("--tokenizer", str(tokenizer), "--text", str(text_file), "--json", "--max-bytes", "3000")
        assert (code, err) == (0, "")
        records.append(json.loads(out))
    assert records[0]["text"] == records[1]["text"]
    assert records[0]["vocabulary"]["fingerprint"] == records[1]["vocabulary"]["fingerprint"]
    assert 3000 <= records[0]["text"]["bytes"] < 4000
    assert records[0]["vocabulary"]["special"] == 3


def test_the_report_is_printed(run, bundle, text_file):
    code, out, _ = run("--tokenizer", str(bundle / "demo-target"), "--text", str(text_file), "--max-bytes", "2000")
    assert code == 0
    assert re.search(r"covered \(have text\) +597 +99.50 %", out)
    assert "bits per byte, head 'reference'" in out
    short = run("--tokenizer", str(bundle / "demo-target"), "--report")[1]
    assert "--text FILE" in short


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--tokenizer"),
        (["--tokenizer", "./no/such/thing"], "./no/such/thing"),
        (["--tokenizer", "TARGET", "--text", "./no-such-file.txt"], "No such file"),
        (["--tokenizer", "TARGET", "--text", __file__], "Unknown file extension"),
        (["--tokenizer", "TARGET", "--max-bytes", "0"], "--max-bytes"),
        (["--tokenizer", "TARGET", "--device", "toaster"], "device must be one of torch's"),
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


def test_text_is_cut_with_a_word_piece_list_as_with_the_whole_tokenizer(run, tmp_path, text_file, wordpiece_tokenizer):
    words = sorted(wordpiece_tokenizer.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in words), encoding="utf-8")
    wordpiece_tokenizer.save(str(tmp_path / "tokenizer.json"))
    reports = []
    for name in ("vocab.txt", "tokenizer.json"):
        code, out, err = run("--tokenizer", str(tmp_path / name), "--text", str(text_file), "--json")
        assert (code, err) == (0, "")
        reports.append(json.loads(out)["text"])
    assert reports[0] == reports[1]


def test_text_is_cut_with_a_sentencepiece_model(run, tmp_path, text_file, sample_lines):
    library = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_lines), model_writer=made, vocab_size=400, byte_fallback=True, minloglevel=2
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(made.getvalue())
    code, out, err = run("--tokenizer", str(path), "--text", str(text_file), "--json", "--max-bytes", "3000")
    assert (code, err) == (0, "")
    report = json.loads(out)["text"]
    assert report["skipped"] == 0
    assert report["bytes"] >= 3000


def test_a_tokenizer_that_cannot_cut_text_is_told_so(run, tmp_path, text_file):
    path = tmp_path / "ranks.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
    assert run("--tokenizer", str(path))[0] == 0
    code, _, err = run("--tokenizer", str(path), "--text", str(text_file))
    assert code == 2
    assert "does not say how a text is cut" in err
    assert err.count("\n") == 1


def test_a_projected_language_model_is_reported_on(run, bundle, text_file, tmp_path, unigram_tokenizer):
    path = tmp_path / "tokenizer.json"
    unigram_tokenizer.save(str(path))
    model = str(bundle / "demo-target")  # a byte-level model projected onto a unigram vocabulary
    code, out, err = run(
        "--calibrator", model, "--tokenizer", str(path), "--text", str(text_file), "--max-bytes", "150", "--json"
    )
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["vocabulary"]["unspelled"] == 0
    assert record["text"]["bits_per_byte"]["calibrator"] > 0
    assert run("--calibrator", model, "--tokenizer", str(path))[0] == 2
