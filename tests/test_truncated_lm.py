"""Calibrators from the first layers of a language model: the same states, exact resume, reference models, refusals."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from calibfuse import CalibFusion, Calibrator
from calibfuse.cli.main import main
from calibfuse.errors import CheckpointError, DataError, InputError, VocabularyError
from calibfuse.training.config import TrainingConfig, TrainingText
from calibfuse.training.data import PassageStore, TextSource
from calibfuse.training.lm_trainer import LMBatches, LMTrainer, bits_per_byte
from calibfuse.training.truncated_lm import run_lm_training, truncate_model

QUICK = {
    "batch_size": 4,
    "sequence_length": 32,
    "save_every": 5,
    "validate_every": 0,
    "learning_rate": 3e-3,
    "precision": "fp32",
}
FAMILIES = {
    "gpt2": (transformers.GPT2Config, {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 64}),
    "llama": (
        transformers.LlamaConfig,
        {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48},
    ),
    "gpt_neox": (
        transformers.GPTNeoXConfig,
        {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48},
    ),
    "qwen2": (
        transformers.Qwen2Config,
        {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 48, "tie_word_embeddings": True},
    ),
    "opt": (
        transformers.OPTConfig,
        {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
}  # fmt: skip


def build(kind, **more):
    config, shape = FAMILIES[kind]
    settings = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2} | shape | more
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config(**settings)).eval()


def final_norm(model):
    """The norm between the last layer and the head."""
    names = [name for name, _ in model.named_modules() if name.split(".")[-1] in ("ln_f", "norm", "final_layer_norm")]
    return model.get_submodule(min(names, key=lambda name: name.count(".")))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_truncation_gives_the_states_of_the_model_stopped_after_so_many_layers(kind, count, tmp_path):
    model, ids = build(kind), torch.arange(12)[None] * 5 % 60
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        last = states[count] if count == 3 else final_norm(model)(states[count])  # transformers norms the last of them
        expected = model.get_output_embeddings()(last)
        cut = truncate_model(model, count)
        assert torch.allclose(cut(ids).logits, expected, atol=1e-5)
        cut.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)
        assert loaded.config.num_hidden_layers == count
        assert torch.equal(loaded.generate(ids, max_new_tokens=4), cut.generate(ids, max_new_tokens=4))  # its cache


@pytest.mark.parametrize("count", [0, 4, -1])
def test_more_layers_than_there_are_cannot_be_kept(count):
    with pytest.raises(InputError, match=r"has 3 layers; 1 to 3 of them can be kept, got"):
        truncate_model(build("gpt2"), count)


def test_models_whose_layers_are_in_no_list_are_refused():
    model = build("gpt2")
    model.transformer.h = torch.nn.Sequential(*model.transformer.h)
    with pytest.raises(InputError, match="cannot be cut: expected one list of 3 layers in it, found 0"):
        truncate_model(model, 2)


# ---- whole runs


@pytest.fixture
def start(tmp_path, tokenizer):
    build("llama", vocab_size=len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def files(tmp_path, sample_lines):
    half = len(sample_lines) // 2
    (tmp_path / "clean.txt").write_text("\n\n".join(sample_lines[:half]), encoding="utf-8")
    (tmp_path / "web.txt").write_text("\n\n".join(sample_lines[half:]), encoding="utf-8")
    return tmp_path


@pytest.fixture
def text(files):
    return TrainingText(wanted=[str(files / "clean.txt")], unwanted=[str(files / "web.txt")])


def train(text, output, start, *, steps=12, resume=False, **more):
    training = TrainingConfig(**{**QUICK, "steps": steps, **more})
    return run_lm_training(
        text, output, init_from=start, layer_count=2, training=training, resume=resume, device="cpu",
        show_progress=False,
    )  # fmt: skip


def losses(output, head="calibrator"):
    state = json.loads((output / "work" / head / "checkpoint" / "state.json").read_text())
    return [row["loss"] for row in state["history"]]


def test_a_run_gives_a_calibrator_and_its_reference_model(text, tmp_path, start, tokenizer):
    output = train(text, tmp_path / "out", start, steps=40)
    assert np.mean(losses(output)[-5:]) < losses(output)[0] - 0.5
    model = transformers.AutoModelForCausalLM.from_pretrained(output)  # an ordinary checkpoint
    assert model.config.num_hidden_layers == 2
    assert len(transformers.AutoTokenizer.from_pretrained(output)) == len(tokenizer)
    calibrator = Calibrator.from_pretrained(output)
    assert calibrator.heads == ("calibrator", "reference")
    figures = calibrator.config.training["bits_per_byte"]
    for head in calibrator.heads:
        assert figures["its own, at the end"][head] < figures["its own, at the start"][head] - 0.3
    assert "first 2 of 3 layers of start" in (output / "README.md").read_text()
    fusion = CalibFusion.from_pretrained(output, tokenizer=tokenizer)
    assert fusion.config.mode == "contrast"
    assert not torch.equal(*(each.get_output_embeddings().weight for each in calibrator.models.values()))


def test_without_unfiltered_text_there_is_no_reference_model(files, tmp_path, start):
    output = train(TrainingText(wanted=[str(files / "clean.txt")]), tmp_path / "out", start, steps=2)
    calibrator = Calibrator.from_pretrained(output)
    assert calibrator.heads == ("calibrator",)
    assert calibrator.config.fusion == {"mode": "geometric"}


@pytest.mark.parametrize("head", ["calibrator", "reference"])
def test_a_resumed_run_ends_with_the_same_weights(head, text, tmp_path, start, monkeypatch):
    whole = train(text, tmp_path / "whole", start)
    original, halves = LMTrainer.take_step, tmp_path / "halves"

    def step(self):
        if self.step == 6 and self.label.endswith(head):
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(LMTrainer, "take_step", step)
    assert train(text, halves, start) is None
    monkeypatch.setattr(LMTrainer, "take_step", original)
    assert len(losses(halves, head)) == 7
    assert not (halves / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="go on with resume"):
        train(text, halves, start)
    assert train(text, halves, start, resume=True) == halves
    for place in ("", "reference"):
        first, second = (load_file(each / place / "model.safetensors") for each in (whole, halves))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_resumes_exactly_too(tmp_path, sample_lines, tokenizer):
    (tmp_path / "text.txt").write_text("\n\n".join(sample_lines), encoding="utf-8")
    source = TextSource(str(tmp_path / "text.txt"), is_non_toxic=True)
    store = PassageStore.build([source], tmp_path, show_progress=False)
    config = TrainingConfig(steps=6, **QUICK)

    def trainer(folder):
        def encode(texts):
            return tokenizer(list(texts), add_special_tokens=False)["input_ids"]

        model = build("gpt2", vocab_size=len(tokenizer), resid_pdrop=0.3)
        batches = LMBatches(store, store.train_indices, encode, start_id=0, end_id=1, config=config)
        return LMTrainer(
            model, batches, config, tmp_path / folder, identity={"a": 1}, device="cpu", show_progress=False
        )

    whole, half = trainer("whole"), trainer("half")
    assert whole.train()
    for _ in range(3):
        half.take_step()
    half.save_checkpoint()
    rest = trainer("half")
    rest.resume()
    assert rest.step == 3
    assert rest.train()
    assert rest.history == whole.history
    other = trainer("half")
    other.identity = {"a": 2}
    with pytest.raises(CheckpointError, match="was made with another a"):
        other.resume()


def test_every_passage_stands_behind_a_start_mark(tmp_path, sample_lines, tokenizer):
    (tmp_path / "text.txt").write_text("\n\n".join(sample_lines), encoding="utf-8")
    store = PassageStore.build([TextSource(str(tmp_path / "text.txt"), True)], tmp_path, show_progress=False)
    config = TrainingConfig(batch_size=2, sequence_length=64, steps=1)

    def encode(texts):
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    batches = LMBatches(store, store.train_indices, encode, start_id=0, end_id=1, config=config)
    ids = batches.next()
    flat = ids.flatten().tolist()
    assert flat[0] == 0
    assert all(flat[at - 1] == 1 for at, each in enumerate(flat) if each == 0 and at)
    labels = batches.labels(ids)
    assert (labels == -100).equal(ids[:, 1:] == 0)
    same = LMBatches(store, store.train_indices, encode, start_id=0, end_id=None, config=config)
    assert (same.labels(same.next()) >= 0).all()
    again = LMBatches(store, store.train_indices, encode, start_id=0, end_id=1, config=config)
    again.cursor = batches.cursor
    assert torch.equal(again.next(), batches.next())


def test_bits_per_byte_is_that_of_texts_one_by_one(tokenizer):
    model = build("llama", vocab_size=len(tokenizer))

    def encode(texts):
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    texts = ["The weather.", "A dog and a cat, é", "One"]
    whole = bits_per_byte(model, texts, encode, start_id=0, sequence_length=64)
    nats = 0.0
    for ids in encode(texts):
        with torch.no_grad():
            logs = model(torch.tensor([[0, *ids]])).logits[0].log_softmax(-1)
        nats -= sum(float(logs[at, each]) for at, each in enumerate(ids))
    assert whole == pytest.approx(nats / sum(len(each.encode()) for each in texts) / np.log(2), rel=1e-5)
    with pytest.raises(DataError, match="no text"):
        bits_per_byte(model, [], encode, start_id=0, sequence_length=64)


# ---- refusals, and the command line


def test_bad_starts_are_one_sentence(text, tmp_path, start):
    transformers.T5Config(vocab_size=99).save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="encoder-decoder"):
        train(text, tmp_path / "out", tmp_path / "t5")
    with pytest.raises(InputError, match="has 3 layers; 1 to 3 of them can be kept, got 9"):
        run_lm_training(text, tmp_path / "out", init_from=start, layer_count=9, show_progress=False)
    with pytest.raises(InputError, match="reads at most 64 tokens, but rows have 65"):
        train(text, tmp_path / "out", start, sequence_length=65)
    with pytest.raises(InputError, match="flagged_share"):
        train(text, tmp_path / "out", start, flagged_share=0.2)
    (start / "tokenizer.json").unlink()
    (start / "tokenizer_config.json").unlink()
    with pytest.raises(VocabularyError, match="came without a tokenizer"):
        train(text, tmp_path / "out", start)


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


def test_the_command_trains_from_unfiltered_text(files, tmp_path, start, capsys):
    arguments = ["train-calibrator", str(files / "web.txt"), "--init-from", str(start)]
    arguments += [
        "--keep-layers",
        "1",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--sequence-length",
        "16",
        "--device",
        "cpu",
        "--quiet",
    ]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--name", "Mine"]) == 0
    assert "Calibrator written to" in capsys.readouterr().out
    assert Calibrator.from_pretrained(tmp_path / "out").heads == ("calibrator", "reference")
    assert main([*arguments, "--output", str(tmp_path / "out2"), "--width", "64"]) != 0
    assert "leave out --layers" in capsys.readouterr().err
    without = [each for each in arguments if each not in ("--init-from", str(start))]
    assert main([*without, "--output", str(tmp_path / "out3")]) != 0
    assert "--keep-layers needs --init-from" in capsys.readouterr().err
