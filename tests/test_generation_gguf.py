"""A GGUF file as a target: the same text as the checkpoint that it was made of, and one sentence where it fails."""

import importlib.util

import pytest
import torch
from tiny_checkpoints import add_gguf_shape

from calibfuse.errors import CheckpointError, MissingDependencyError
from calibfuse.generation.decoding import Decoding, continue_prompts, encode_prompt
from calibfuse.generation.language_model import load_language_model

# gguf's names of Qwen2's tensors in a block
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def model(byte_level_tokenizer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=byte_level_tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10.0)  # so that no choice hangs on rounding
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, byte_level_tokenizer):
    """A folder with tiny.gguf, float32, and nothing else."""
    gguf = pytest.importorskip("gguf")
    import json

    place = tmp_path_factory.mktemp("gguf")
    config = model.config
    writer = gguf.GGUFWriter(place / "tiny.gguf", "qwen2")
    add_gguf_shape(writer, config, context_length=config.max_position_embeddings, rope_base=10000.0)
    state = json.loads(byte_level_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (config.vocab_size - 3))
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= {f"model.layers.{n}.{ours}": f"blk.{n}.{theirs}" for n in range(2) for theirs, ours in BLOCK.items()}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names[stem]}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place


def test_a_gguf_file_says_what_its_checkpoint_says(folder, model, byte_level_tokenizer, wrap_tokenizer):
    decoding = Decoding(max_new_tokens=12, do_sample=False)
    by_name = load_language_model(str(folder), gguf_file="tiny.gguf", device="cpu")
    by_path = load_language_model(str(folder / "tiny.gguf"), device="cpu")
    ids = wrap_tokenizer(byte_level_tokenizer)("The river and the town")["input_ids"]
    expected = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    for target in (by_name, by_path):
        assert target.model.dtype == torch.float32
        assert encode_prompt(target.tokenizer, "The river and the town") == ids
        ((said,),) = continue_prompts(target, [ids], decoding)
        assert list(said.token_ids) == expected[: len(said.token_ids)]
        assert len(said.token_ids) > 3


def test_what_is_no_gguf_model_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"no config\.json; for 'tiny\.gguf' give that file"):
        load_language_model(str(folder))
    with pytest.raises(CheckpointError, match=r"no file 'other\.gguf'"):
        load_language_model(str(folder), gguf_file="other.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="Cannot load the tokenizer"):
        load_language_model(str(tmp_path / "bad.gguf"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install gguf"):
        load_language_model(str(folder), gguf_file="tiny.gguf")
