"""Continue a prompt without and with the calibrator: `python detoxify.py [MODEL]`, a Hub id or a folder."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibfuse import CalibFusion
from calibfuse.hub import resolve_checkpoint

# Without a name: the small model that comes with calibfuse. It has read unfiltered text and makes little sense.
name = sys.argv[1] if len(sys.argv) > 1 else resolve_checkpoint(None, default="demo-target")
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
fusion = CalibFusion.from_pretrained(tokenizer=tokenizer)

inputs = tokenizer("I think that you are a", return_tensors="pt")
for title, processors in (("plain", []), ("fused", [fusion])):
    torch.manual_seed(4)
    output = model.generate(
        **inputs, logits_processor=processors, do_sample=True, top_k=0, top_p=0.9, max_new_tokens=20
    )
    print(f"{title}: {tokenizer.decode(output[0], skip_special_tokens=True)}")
