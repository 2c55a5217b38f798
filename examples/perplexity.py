"""Perplexity of a text with and without the calibrator: `python perplexity.py [MODEL]`."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibfuse import CalibFusion
from calibfuse.hub import resolve_checkpoint

TEXT = "The library opens at nine. Children can borrow five books, and nobody pays for a card."

name = sys.argv[1] if len(sys.argv) > 1 else resolve_checkpoint(None, default="demo-target")
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
fusion = CalibFusion.from_pretrained(tokenizer=tokenizer)

ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
with torch.inference_mode():
    logits = model(ids).logits  # [1, length, vocabulary]; position i scores token i + 1
    for title, log_probs in (("plain", logits.log_softmax(-1)), ("fused", fusion.fuse_logits(ids, logits))):
        nats = -log_probs[:, :-1].gather(-1, ids[:, 1:, None]).mean()
        print(f"{title}: perplexity {nats.exp():.2f}")
