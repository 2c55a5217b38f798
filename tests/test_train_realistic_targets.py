"""The script that trains the targets of the evaluation: its settings, that it runs, and that it repeats nothing."""

import importlib
import json
import lzma
import sys

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def script(repository):
    """The example as a module, beside the one it stands on."""
    sys.path.insert(0, str(repository / "tools"))
    try:
        yield importlib.import_module("train_realistic_targets")
    finally:
        sys.path.remove(str(repository / "tools"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, script, sample_lines, byte_level_tokenizer):
    """A data folder in the layout of the shared data, and a folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    for path, _, _ in script.train_target_lm.SOURCES.values():
        (folder / path).parent.mkdir(exist_ok=True)
        with lzma.open(folder / path, "wt") as file:
            file.writelines(json.dumps({"text": line}) + "\n" for line in sample_lines)
    tokenizer = Tokenizer.from_str(byte_level_tokenizer.to_str())
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "gpt2.json"))
    return folder


def arguments(inputs, output, *more):
    return [
        *("--data", str(inputs), "--tokenizers", str(inputs), "--output", str(output), "--quiet"),
        *("--minutes", "0.02", "--only", "gpt2", *more),
    ]


def test_a_target_is_trained_measured_and_not_trained_again(script, inputs, tmp_path):
    assert script.main(arguments(inputs, tmp_path)) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "gpt2"))
    measure = json.loads((tmp_path / script.SUMMARY).read_text())["targets"]["gpt2"]
    assert measure["share_of_budget"] == 1.0
    assert measure["bits_per_byte"] > 0.0
    written = (tmp_path / "gpt2" / "model.safetensors").stat().st_mtime_ns
    assert script.main(arguments(inputs, tmp_path)) == 0
    assert (tmp_path / "gpt2" / "model.safetensors").stat().st_mtime_ns == written


def test_a_missing_tokenizer_is_one_sentence(script, inputs, tmp_path, caplog):
    assert script.main([*arguments(inputs, tmp_path), "--only", "pythia"]) == 2
    assert "expected one of pythia.json" in caplog.text


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_settings_are_options_of_the_script_below(script, inputs, tmp_path, size):
    args = script.build_parser().parse_args([*arguments(inputs, tmp_path), "--size", size])
    parsed = script.train_target_lm.build_parser().parse_args(script.training_arguments("gpt2", args))
    assert parsed.layers == (6 if size == "cpu" else 12)
    assert parsed.shard == (0, 1)


def test_a_softmax_over_all_other_tokens_is_the_full_one(script, tiny_llama):
    model = tiny_llama(100)
    rows = torch.randint(100, (3, 7), generator=torch.Generator().manual_seed(0))
    full = script.train_target_lm.token_losses(model, rows).view(3, -1)
    assert torch.allclose(script.train_target_lm.sampled_losses(model, rows, 1000), full, atol=1e-4)


def test_a_sampled_softmax_estimates_the_partition_function_without_bias(script, tiny_llama):
    """exp(loss) times the label's exp(logit) is the partition function; its mean over draws meets the full one.

    Of 400 draws the mean lies within 4 standard errors with a probability above 0.9999 at each of 18 positions.
    """
    model = tiny_llama(100)
    rows = torch.randint(100, (3, 7), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        full = script.train_target_lm.token_losses(model, rows).view(3, -1)
        ratios = torch.stack(
            [(script.train_target_lm.sampled_losses(model, rows, 20) - full).exp() for _ in range(400)]
        )
    error = ratios.std(dim=0) / 20
    assert (ratios.mean(dim=0) - 1).abs().le(4 * error).all()
    assert ratios.std() > 0
