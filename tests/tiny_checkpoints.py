"""Tiny random checkpoints on disk, laid out as calibfuse/pretrained is, for tests of the command line."""

import shutil
from pathlib import Path

import numpy as np
import torch
from tiny_calibrators import make_calibrator

from calibfuse.scorers import LinearScorer
from calibfuse.scorers.linear import FeatureConfig

BUNDLED = Path(__file__).resolve().parent.parent / "calibfuse" / "pretrained"
BUNDLED_CHECKPOINTS = ("demo-target", "default-calibrator", "default-scorer")


def save_bundle(folder, model, tokenizer):
    """A stand-in for calibfuse/pretrained: the given target, a random calibrator and scorer, and the real prompts."""
    folder = Path(folder)
    model.save_pretrained(folder / "demo-target")
    tokenizer.save_pretrained(folder / "demo-target")
    calibrator = make_calibrator(training={"name": "tiny", "settings": {"steps": 0}}, words={})
    calibrator.save_pretrained(folder / "default-calibrator", dtype=torch.float32)
    weights = np.random.default_rng(0).normal(size=256)
    LinearScorer(weights, FeatureConfig(bucket_bits=8), name="tiny").save(folder / "default-scorer")
    shutil.copy(BUNDLED / "demo-prompts.json", folder)
    return folder


def add_gguf_shape(writer, config, *, context_length, rope_base):
    """The sizes of a Llama-like model, as a GGUF file's header names them."""
    writer.add_context_length(context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope_base)
    writer.add_vocab_size(config.vocab_size)
