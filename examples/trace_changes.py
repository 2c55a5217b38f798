"""See which tokens the calibrator lowered, step by step: `python trace_changes.py [MODEL]`."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from calibfuse import CalibFusion
from calibfuse.hub import resolve_checkpoint
from calibfuse.inspection import trace_generation

name = sys.argv[1] if len(sys.argv) > 1 else resolve_checkpoint(None, default="demo-target")
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
fusion = CalibFusion.from_pretrained(tokenizer=tokenizer)

steps = trace_generation(
    model, tokenizer, fusion, "My neighbour is such a", top=20, seed=0, max_new_tokens=12, do_sample=True
)
for step in steps:
    lowered = sorted(step.candidates, key=lambda candidate: candidate.shift)[:2]
    shown = ", ".join(f"{each.text!r} {each.shift:+.1f}" for each in lowered if each.shift < -0.5)
    print(f"{step.text!r:14} moved by {step.divergence:.3f} nats; lowered: {shown or 'nothing'}")
