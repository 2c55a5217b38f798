"""vLLM's server with the fusion inside, over HTTP on this machine: streams, strengths per request, bad options.

Skipped where vLLM is not installed; see test_vllm.py.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: pip install 'calibfuse[vllm]'")
httpx = pytest.importorskip("httpx")

import calibfuse  # noqa: E402

TARGET = str(Path(calibfuse.__file__).parent / "pretrained" / "demo-target")
REQUESTS, BAD = 200, 20
PROMPTS = ["You are such a", "My neighbour is a", "What the", "I hate", "She told him that"]
STRENGTHS = [None, 0, 0.5, 1.0, 5.0]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    counters = tmp_path_factory.mktemp("counters")
    log = tmp_path_factory.mktemp("log") / "server.txt"
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", "256", "--max-num-seqs", "16", "--served-model-name", "demo"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "calibfuse", "serve", TARGET, "--log-requests", *options],
            env=os.environ | ENVIRONMENT | {"PROMETHEUS_MULTIPROC_DIR": str(counters)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{address}/health", timeout=2).status_code == 200:
                break
        except httpx.HTTPError:
            time.sleep(1)
    yield address, log
    process.terminate()
    process.wait(timeout=60)


def body(prompt, alpha, *, tokens=12, stream=True):
    extra = {} if alpha is None else {"vllm_xargs": {"calibfuse_alpha": alpha}}
    return {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream, **extra}


async def stream(client, prompt, alpha):
    """Status, and the text of a stream."""
    async with client.stream("POST", "/v1/completions", json=body(prompt, alpha)) as answer:
        if answer.status_code != 200:
            return answer.status_code, (await answer.aread()).decode()
        pieces = []
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return event["error"]["code"], event["error"]["message"]
                pieces.append(event["choices"][0]["text"])
        return 200, "".join(pieces)


def test_many_streams_at_once_with_strengths_of_their_own(server):
    """200 at once, 20 of them with bad options: 180 as if each were alone, 20 times HTTP 400, and the server lives."""
    address, log = server
    alone = {
        (prompt, alpha): httpx.post(f"{address}/v1/completions", json=body(prompt, alpha, stream=False), timeout=60)
        .raise_for_status()
        .json()["choices"][0]["text"]
        for prompt in PROMPTS
        for alpha in STRENGTHS
    }
    assert any(alone[prompt, 0] != alone[prompt, 5.0] for prompt in PROMPTS)
    wanted = [
        (PROMPTS[number % 5], "much" if number % 10 == 9 else STRENGTHS[number // 5 % 5]) for number in range(REQUESTS)
    ]

    async def run():
        limits = httpx.Limits(max_connections=REQUESTS)
        async with httpx.AsyncClient(base_url=address, timeout=180, limits=limits) as client:
            return await asyncio.gather(*(stream(client, *each) for each in wanted))

    answers = asyncio.run(run())
    bad = [answer for (_, alpha), answer in zip(wanted, answers, strict=True) if alpha == "much"]
    assert len(bad) == BAD
    assert all(status == 400 and "calibfuse_alpha must be a number" in text for status, text in bad)
    good = [(each, answer) for each, answer in zip(wanted, answers, strict=True) if each[1] != "much"]
    assert all(answer == (200, alone[each]) for each, answer in good)
    assert httpx.get(f"{address}/health").status_code == 200
    counters = httpx.get(f"{address}/metrics/", follow_redirects=True).text
    assert "calibfuse:failed_steps_total 0" in counters
    assert "calibfuse:steps_total" in counters
    assert "of the probability moved" in log.read_text()


def test_a_client_that_leaves_leaves_nothing(server):
    address, _ = server

    async def leave():
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            request = body("What the", 1.0, tokens=200)
            async with client.stream("POST", "/v1/completions", json=request) as answer:
                async for _ in answer.aiter_lines():
                    return

    asyncio.run(leave())
    answer = httpx.post(f"{address}/v1/completions", json=body("What the", 1.0, stream=False), timeout=60)
    assert answer.status_code == 200
