"""Use the fusion in a decoding loop of your own, without `generate`: `python decoding_loop.py [MODEL]`."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibfuse import CalibFusion
from calibfuse.hub import resolve_checkpoint

name = sys.argv[1] if len(sys.argv) > 1 else resolve_checkpoint(None, default="demo-target")
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
fusion = CalibFusion.from_pretrained(tokenizer=tokenizer)

torch.manual_seed(0)
ids = tokenizer("The new neighbour is", return_tensors="pt")["input_ids"]  # [1, length]
cache, unread = None, ids
with torch.inference_mode():
    for _ in range(20):
        output = model(input_ids=unread, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        # The processor wants all ids so far and the last position's scores; it keeps a cache of its own.
        log_probs = fusion(ids, output.logits[:, -1])  # [1, vocabulary], nats
        unread = torch.multinomial(log_probs.exp(), num_samples=1)
        ids = torch.cat([ids, unread], dim=1)
        if unread.item() == tokenizer.eos_token_id:
            break
print(tokenizer.decode(ids[0], skip_special_tokens=True))
