"""llama-cpp-python's side of the fusion: NumPy arrays in and out, and its own tokens where it is installed."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import add_gguf_shape
from transformers import AutoModelForCausalLM, AutoTokenizer

import calibfuse
from calibfuse import CalibFusion
from calibfuse.errors import FusionNotAppliedError, VocabularyMismatchError
from calibfuse.llama_cpp import logits_processor

TARGET = Path(calibfuse.__file__).parent / "pretrained" / "demo-target"
PROMPT = "You are such a stupid"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()


def fused_by_transformers(model, tokenizer, ids, count):
    fusion = CalibFusion.from_pretrained(tokenizer=tokenizer, alpha=3.0)
    given = torch.tensor([ids])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "logits_processor": [fusion]}
    return model.generate(given, attention_mask=torch.ones_like(given), **options)[0, len(ids) :].tolist()


def test_arrays_are_fused_as_tensors_are(tokenizer, model):
    process = logits_processor(CalibFusion.from_pretrained(tokenizer=tokenizer, alpha=3.0))
    reference = CalibFusion.from_pretrained(tokenizer=tokenizer, alpha=3.0)
    ids = tokenizer(PROMPT)["input_ids"]
    records = np.recarray((model.config.vocab_size,), dtype=[("id", np.intc), ("logit", np.single), ("p", np.single)])
    for _ in range(4):  # as the bindings do it: a column of records, written over with what comes back
        logits = model(torch.tensor([ids])).logits[:, -1].detach()
        records.logit[:] = logits[0].numpy()
        records.logit[7], logits[0, 7] = -np.inf, -torch.inf
        before = records.logit.copy()
        fused = process(np.array(ids, dtype=np.intc), records.logit)
        assert (records.logit == before).all()
        assert (fused.dtype, fused.shape) == (np.float32, before.shape)
        assert fused[7] == -np.inf
        wanted = reference(torch.tensor([ids]), logits)[0]
        found = torch.from_numpy(fused)
        torch.testing.assert_close(found.log_softmax(-1), wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.logsumexp(-1), logits[0].logsumexp(-1))
        assert not np.allclose(fused, before, atol=1e-3)
        ids = [*ids, int(fused.argmax())]


def test_an_error_that_the_bindings_swallow_is_told_by_required(tokenizer):
    fusion = CalibFusion.from_pretrained(tokenizer=tokenizer)
    process = logits_processor(fusion)
    with pytest.raises(FusionNotAppliedError), fusion.required(), contextlib.suppress(VocabularyMismatchError):
        process(np.array([99_999], dtype=np.intc), np.zeros(8192, dtype=np.float32))


BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(path, model, tokenizer):
    """A Llama with a byte-level tokenizer as a GGUF file in float32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    add_gguf_shape(writer, config, context_length=512, rope_base=config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    state = tokenizer.backend_tokenizer.to_str()
    merges = json.loads(state)["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config.vocab_size)))
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_token_types([kinds[number in tokenizer.all_special_ids] for number in range(config.vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for theirs, ours in BLOCK.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem not in names:
            continue  # the head is the embedding
        if count := heads.get(names[stem].rpartition(".")[2]):  # llama.cpp turns neighbours, not halves
            tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{names[stem]}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama_cpp_says_the_tokens_that_transformers_says(tokenizer, model, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "target.gguf", model, tokenizer)
    llm = llama_cpp.Llama(str(tmp_path / "target.gguf"), n_ctx=256, n_threads=1, verbose=False)
    fusion = CalibFusion.from_pretrained(tokenizer=tokenizer, alpha=3.0)

    def tokens(ids, *processors):
        guided = llama_cpp.LogitsProcessorList(list(processors))
        said = []
        for token in llm.generate(ids, temp=0.0, repeat_penalty=1.0, logits_processor=guided):
            said.append(token)
            if token == tokenizer.eos_token_id or len(said) == 16:
                return said

    changed = 0
    for prompt in (PROMPT, "My neighbour is a", "She told him that", "What the hell"):
        ids = tokenizer(prompt)["input_ids"]
        with fusion.required():
            guided = tokens(ids, logits_processor(fusion))
        assert guided == fused_by_transformers(model, tokenizer, ids, 16)
        changed += guided != tokens(ids)
    assert changed
