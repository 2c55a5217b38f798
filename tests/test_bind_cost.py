"""What binding a large vocabulary costs in memory and time, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

SIZE = 150_000

MEASURE = """
import gc, json, os, time
import tokenizers, torch
from tokenizers import decoders, models, pre_tokenizers

torch.set_num_threads(1)
from calibfuse import Calibrator

def bytes_in_use(which):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(which))

def tokenizer(size):
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    while len(vocab) < size:
        vocab[f"\u0120w{len(vocab):x}"] = len(vocab)
    made = tokenizers.Tokenizer(models.BPE(vocab, []))
    made.decoder = decoders.ByteLevel()
    return made

calibrator = Calibrator.from_pretrained()
calibrator.bind(tokenizer(1000))
large = tokenizer(SIZE)
result = {}
for name in ("cold", "cached"):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before, began = bytes_in_use("VmRSS"), time.process_time()
    bound = calibrator.bind(large)
    result[name] = {
        "seconds": time.process_time() - began,
        "peak": (bytes_in_use("VmHWM") - before) / bound.memory_bytes,
    }
    del bound
print(json.dumps(result))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
def test_binding_takes_less_than_twice_the_memory_of_the_bound_matrices(tmp_path):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of memory cannot be reset here")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.replace("SIZE", str(SIZE))],
        env={**os.environ, "CALIBFUSE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["cold"]["peak"] < 2.0
    assert result["cached"]["peak"] < 1.3
    # The goals are 1 s and 0.1 s; a shared machine gets room, a regression of the whole method does not.
    assert result["cold"]["seconds"] < 3.0
    assert result["cached"]["seconds"] < 0.5
