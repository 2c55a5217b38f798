"""The script that made the demo target: what it reads, what it writes, and that a killed run loses nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def script(load_tool):
    return load_tool("train_target_lm")


@pytest.fixture(scope="module")
def text_files(tmp_path_factory, sample_lines):
    """A plain file and a .jsonl file of documents of a few sentences."""
    folder = tmp_path_factory.mktemp("text")
    plain, rows = folder / "plain.txt", folder / "rows.jsonl"
    plain.write_text("\n".join(f"{a} {b}" for a, b in zip(sample_lines, sample_lines[1:], strict=False)))
    with rows.open("w") as file:
        for number, line in enumerate(sample_lines):
            file.write(json.dumps({"text": f"{number}: {line}", "split": "train"}) + "\n")
        file.write(json.dumps({"text": "never read this", "split": "jigsaw_test"}) + "\n")
    return plain, rows


def options(text_files, output, *more):
    plain, rows = text_files
    return [
        *("--text", f"{plain}=3", f"{rows}=1", "--output", str(output), "--held-out-every", "20", "--quiet"),
        *("--vocab-size", "400", "--width", "32", "--layers", "2", "--heads", "2", "--sequence-length", "32"),
        *("--batch-size", "4", "--threads", "1", "--device", "cpu", "--precision", "fp32", *more),
    ]


TOKENS = 12 * 4 * 32  # twelve steps


class Killed(Exception):
    """Stands for a kill in a test that does not start a process."""


# ---- reading


def test_mixture_keeps_the_sources_at_their_shares(script, text_files):
    sources = [script.Source("plain", text_files[0], 3.0), script.Source("rows", text_files[1], 1.0)]
    mixture = script.Mixture(sources, script.Shard())
    for _ in range(500):
        source, document = mixture.next_document()
        mixture.count(source, len(document))
    assert mixture.tokens[0] / sum(mixture.tokens) == pytest.approx(0.75, abs=0.01)


def test_mixture_continues_where_its_state_was_taken(script, text_files):
    sources = [script.Source("plain", text_files[0], 3.0), script.Source("rows", text_files[1], 1.0)]

    def take(mixture, count):
        taken = []
        for _ in range(count):
            source, document = mixture.next_document()
            mixture.count(source, len(document))
            taken.append(document)
        return taken

    first, second = script.Mixture(sources, script.Shard()), script.Mixture(sources, script.Shard())
    take(first, 400)  # beyond the end of both files, so the second pass counts too
    second.restore(first.state())
    assert take(first, 30) == take(second, 30)


def test_changed_shares_hold_from_the_change_on(script, text_files):
    def mixture_of(plain, rows):
        sources = [script.Source("plain", text_files[0], plain), script.Source("rows", text_files[1], rows)]
        return script.Mixture(sources, script.Shard())

    before, after = mixture_of(3.0, 1.0), mixture_of(1.0, 1.0)
    for mixture in (before, after):
        if mixture is after:
            after.restore(before.state())
        start = list(mixture.tokens)
        for _ in range(500):
            source, document = mixture.next_document()
            mixture.count(source, len(document))
        gained = [end - begin for begin, end in zip(start, mixture.tokens, strict=True)]
        expected = 0.75 if mixture is before else 0.5
        assert gained[0] / sum(gained) == pytest.approx(expected, abs=0.01)


def test_shards_and_held_out_documents_are_disjoint_and_complete(script):
    documents = [str(number) for number in range(1000)]
    parts = [
        list(script.Shard(index, 3, 10).select(iter(documents), held_out=held_out))
        for index in range(3)
        for held_out in (True, False)
    ]
    assert sorted(sum(parts, []), key=int) == documents
    assert len(parts[0]) == pytest.approx(1000 / 3 / 10, abs=1)


def test_rows_of_a_test_split_are_skipped(script, text_files):
    assert "never read this" not in list(script.read_documents(text_files[1]))


# ---- tokenizers


@pytest.mark.parametrize("family", ["bpe-byte-fallback", "byte-level"])
@pytest.mark.parametrize("text", ["Don't go,  she said.", "日本 naïve 🙂", "one\n\ntwo\n three", "a literal <0x41>"])
def test_trained_tokenizers_give_text_back(script, sample_lines, family, text):
    tokenizer = script.make_tokenizer(family, iter(sample_lines), 500)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_tokenizer_can_be_loaded_from_a_file(script, byte_level_tokenizer, tmp_path):
    byte_level_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = script.make_tokenizer(str(tmp_path / "tokenizer.json"), iter(()), 0)
    encoder = script.Encoder(loaded)
    assert (encoder.bos_token, encoder.eos_token) == ("<s>", "</s>")
    assert encoder.encode("Hi")[0] == encoder.bos
    assert encoder.encode("Hi")[-1] == encoder.eos


# ---- pure functions


def test_orthogonalise_brings_all_singular_values_near_one(script):
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 8)
    update = script.orthogonalise(matrices).float()
    assert update.shape == matrices.shape
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.4  # the published coefficients trade exactness for speed
    assert singular.max() < 1.4
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.cosine_similarity(update.flatten(1), (left @ right).flatten(1))
    assert cosine.min() > 0.97


def test_schedule_rises_then_falls_to_zero(script):
    factors = [script.schedule(step / 100, 0.1) for step in range(101)]
    assert factors[0] == 0
    assert factors[10] == 1
    assert factors[-1] == pytest.approx(0, abs=1e-12)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_held_out_loss_equals_one_document_at_a_time(script, text_files, tmp_path, sample_lines):
    """Windows are scored without knowledge of the one before, and every token of the text exactly once."""
    args = script.build_parser().parse_args(options(text_files, tmp_path, "--tokens", "1"))
    encoder = script.Encoder(script.make_tokenizer("byte-level", iter(sample_lines), 300))
    model = script.build_model(args, encoder)
    shard = script.Shard(0, 1, 20)
    source = script.Source("plain", text_files[0], 1.0)
    held_out = script.held_out_text([source], shard, encoder, 32, 10_000)
    loss, bits_per_byte = script.evaluate(model, held_out, 4, script.nullcontext())

    documents = list(script.source_documents(source, shard, held_out=True))
    total, count = 0.0, 0
    for document in documents:
        ids = [encoder.bos, *encoder.tokenizer.encode(document).ids]
        for start in range(0, len(ids) - 1, 32):
            window = torch.tensor([ids[start : start + 33]])
            log_probs = model(window[:, :-1]).logits.detach().log_softmax(-1)
            total -= float(log_probs.gather(-1, window[:, 1:, None]).sum())
            count += window.shape[1] - 1
    assert count == sum(len(encoder.tokenizer.encode(document).ids) for document in documents)
    assert held_out.text_bytes == sum(len(document.encode()) for document in documents)
    assert loss == pytest.approx(total / count, rel=1e-5)
    assert bits_per_byte == pytest.approx(total / math.log(2) / held_out.text_bytes, rel=1e-5)


# ---- whole runs


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    script, text_files, tmp_path, monkeypatch, architecture, optimizer
):
    common = ("--tokens", str(TOKENS), "--architecture", architecture, "--optimizer", optimizer)
    assert script.main(options(text_files, tmp_path / "whole", *common)) == 0

    train_step = script.train_step

    def killed_in_step_eight(run):
        if run.progress.step == 7:
            raise Killed
        return train_step(run)

    monkeypatch.setattr(script, "train_step", killed_in_step_eight)
    with pytest.raises(Killed):
        script.main(options(text_files, tmp_path / "parts", *common, "--checkpoint-steps", "5"))
    monkeypatch.undo()
    assert script.main(options(text_files, tmp_path / "parts", *common, "--resume")) == 0

    whole, parts = (load_file(tmp_path / name / script.STATE_FILE) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_result_is_an_ordinary_checkpoint(script, text_files, tmp_path, architecture):
    output = tmp_path / "model"
    tokenizer_family = "byte-level" if architecture == "gpt2" else "bpe-byte-fallback"
    more = ("--tokens", "256", "--architecture", architecture, "--tokenizer", tokenizer_family)
    assert script.main(options(text_files, output, *more)) == 0

    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors", script.STATE_FILE}
    assert {path.name for path in output.iterdir()} == expected | {"tokenizer.json", "tokenizer_config.json"}
    model = AutoModelForCausalLM.from_pretrained(output)
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(output)
    text = "The boat was small."
    assert tokenizer(text).input_ids == Tokenizer.from_file(str(output / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    inputs = tokenizer(["The", "A small boat"], padding=True, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert generated.shape[0] == 2
    card = (output / "README.md").read_text()
    assert "bits per byte" in card
    assert "on purpose" in card
    assert str(tmp_path) not in card


def test_a_budget_in_minutes_also_ends_with_a_learning_rate_near_zero(script, text_files, tmp_path, monkeypatch):
    factors = []
    schedule = script.schedule
    monkeypatch.setattr(script, "schedule", lambda *args: factors.append(schedule(*args)) or factors[-1])
    assert script.main(options(text_files, tmp_path / "model", "--minutes", "0.02")) == 0
    assert max(factors) > 0.9
    assert factors[-1] < 0.2


def test_a_stop_signal_saves_and_the_run_can_be_resumed(script, text_files, tmp_path, monkeypatch):
    train_step = script.train_step

    def interrupted_in_step_three(run):
        if run.progress.step == 2:
            signal.raise_signal(signal.SIGINT)
        return train_step(run)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(script, "train_step", interrupted_in_step_three)
    assert script.main(options(text_files, tmp_path / "model", "--tokens", str(TOKENS))) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "model" / "model.safetensors").exists()
    monkeypatch.undo()
    assert script.main(options(text_files, tmp_path / "model", "--tokens", str(TOKENS), "--resume")) == 0


@pytest.mark.slow
def test_a_killed_process_can_be_resumed(script, repository, text_files, tmp_path):
    command = [sys.executable, str(repository / "tools" / "train_target_lm.py")]
    common = ("--tokens", str(8 * TOKENS), "--checkpoint-steps", "4")
    arguments = [*command, *options(text_files, tmp_path / "parts", *common)]
    killed = subprocess.Popen(arguments, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "parts" / "training-state.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    for output, more in (("parts", ["--resume"]), ("whole", [])):
        assert script.main(options(text_files, tmp_path / output, *common, *more)) == 0
    files = [(tmp_path / output / "model.safetensors").read_bytes() for output in ("parts", "whole")]
    assert files[0] == files[1]


# ---- bad input


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("text", "realtoxicityprompts.jsonl", "benchmark"),
        ("text", "wikitext2-valid.txt", "benchmark"),
        (None, "absent.txt", "does not exist"),
        ("", "empty.txt", "holds no document"),
        ('{"text": "fine"}\n{"title": 1}\n', "rows.jsonl", "line 2 of"),
        ("not json\n", "rows.jsonl", "line 1 of"),
    ],
    ids=["benchmark", "validation-text", "missing", "empty", "no-text-field", "no-json"],
)
def test_unusable_text_is_one_sentence_and_exit_2(script, tmp_path, caplog, content, name, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    code = script.main(["--text", str(tmp_path / name), "--output", str(tmp_path / "model"), "--tokens", "100"])
    assert code == 2
    assert message in caplog.text
    assert "Traceback" not in caplog.text


def test_no_text_at_all_is_refused(script, tmp_path, caplog):
    assert script.main(["--output", str(tmp_path / "model"), "--tokens", "100"]) == 2
    assert "give --data DIR or --text FILE=WEIGHT" in caplog.text


def test_a_resumed_run_must_have_the_same_settings(script, text_files, tmp_path, caplog):
    assert script.main(options(text_files, tmp_path / "model", "--tokens", "256")) == 0
    assert script.main(options(text_files, tmp_path / "model", "--tokens", "256", "--resume", "--seed", "7")) == 2
    assert "another seed" in caplog.text


def test_a_finished_run_is_not_overwritten(script, text_files, tmp_path, caplog):
    assert script.main(options(text_files, tmp_path / "model", "--tokens", "256")) == 0
    assert script.main(options(text_files, tmp_path / "model", "--tokens", "256")) == 2
    assert "give --resume or another --output" in caplog.text


@pytest.mark.parametrize("damage", ["absent", "cut", "foreign"])
def test_an_unusable_state_is_one_sentence(script, text_files, tmp_path, caplog, damage):
    arguments = options(text_files, tmp_path / "model", "--tokens", "256", "--resume")
    state = tmp_path / "model" / script.STATE_FILE
    state.parent.mkdir()
    if damage == "cut":
        assert script.main(options(text_files, tmp_path / "other", "--tokens", "256")) == 0
        state.write_bytes((tmp_path / "other" / script.STATE_FILE).read_bytes()[:-100])
    elif damage == "foreign":
        script.save_file({"weight": torch.zeros(2)}, state)
    assert script.main(arguments) == 2
    assert "expected a training state to resume from" in caplog.text


@pytest.mark.parametrize("value", ["2/2", "-1/2", "half"])
def test_a_shard_that_does_not_exist_is_refused(script, tmp_path, capsys, value):
    with pytest.raises(SystemExit):
        script.main(["--output", str(tmp_path), "--tokens", "1", f"--shard={value}"])
    assert "expected i/n" in capsys.readouterr().err
