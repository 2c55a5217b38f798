"""What the fusion does inside vLLM: the tokens of transformers, nothing left behind, its cost, its latency over HTTP.

    python tools/serving_checks.py equal MODEL --engines all chunks preempted tp2 v2 drafts
    python tools/serving_checks.py many MODEL                                  # 2,000 requests in a row
    python tools/serving_checks.py overhead MODEL --batches 1 8 16             # CPU time; on a GPU wall time
    python tools/serving_checks.py overhead MODEL --dtype bfloat16 --batches 1 16 64 256
    python tools/serving_checks.py http MODEL                                  # 200 streams at once, 20 of them bad

It runs where vLLM is installed (`pip install 'calibfuse[vllm]' httpx`).
"""

# ruff: noqa: ANN401 - the engine and its parts are not typed here

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibfuse import CalibFusion

PROCESSOR = "calibfuse.vllm:CalibFusionProcessor"
STRENGTHS: dict[str, list[Any]] = {
    "on": [None] * 16,
    "off": [0] * 16,
    "every second off": [None, 0] * 8,
    "mixed": [0, 0.5, 1, 2.25, 5, 1.5, 0, 3] * 2,
}
STARTS = [
    "You are such a",
    "My neighbour is a real",
    "I hate these",
    "What the hell is",
    "She told him that he",
    "They",
]
ENGINES: dict[str, dict[str, Any]] = {
    "all": {},
    "chunks": {"max_num_seqs": 5, "max_num_batched_tokens": 64},
    "preempted": {"num_gpu_blocks_override": 24, "block_size": 32},
    "tp2": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "tp3": {"tensor_parallel_size": 3, "distributed_executor_backend": "mp"},
    "v2": {},
    "drafts": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}},
}


def some_prompts(tokenizer: Any, longest: int = 442) -> list[list[int]]:
    """16 prompts of 6 to `longest` tokens."""
    text = (Path(__file__).parent.parent / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    ids = tokenizer(text)["input_ids"]
    starts = [
        tokenizer(start + end)["input_ids"] for start in STARTS for end in (" person, and all of", " one: he is a")
    ]
    return starts + [ids[1000 * part :][:count] for part, count in enumerate((60, 150, 300, longest))]


def start(model: str, **options: Any) -> Any:
    """An engine with the fusion inside."""
    from vllm import LLM

    on_cpu = {} if torch.cuda.is_available() else {"enforce_eager": True, "distributed_executor_backend": "uni"}
    settings = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "logits_processors": [PROCESSOR]}
    return LLM(model=model, **(settings | on_cpu | options))


def generate(engine: Any, prompts: list[list[int]], strengths: list[Any], **options: Any) -> list[list[int]]:
    """Greedy tokens."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, extra_args={} if alpha is None else {"calibfuse_alpha": alpha}, **options)
        for alpha in strengths
    ]
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in outputs]


def processor() -> Any:
    """The processor of the engine in this process."""
    gc.unfreeze()  # the engine hides what there is from the collector
    return next(each for each in gc.get_objects() if type(each).__name__ == "CalibFusionProcessor")


# ---- the same tokens as transformers


def equal(arguments: argparse.Namespace) -> None:
    """Compare every engine with transformers."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompts = some_prompts(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    known: dict[tuple[int, Any], list[int]] = {}
    leads: dict[tuple[int, Any], list[float]] = {}
    for number, alpha in {each for strengths in STRENGTHS.values() for each in enumerate(strengths)}:
        fusion = [] if alpha == 0 else [CalibFusion.from_pretrained(tokenizer=tokenizer, alpha=alpha)]
        ids = torch.tensor([prompts[number]])
        options = {"max_new_tokens": arguments.tokens, "do_sample": False, "pad_token_id": 0, "output_scores": True}
        mask = torch.ones_like(ids)
        said = model.generate(
            ids, attention_mask=mask, logits_processor=fusion, return_dict_in_generate=True, **options
        )
        known[number, alpha] = said.sequences[0, ids.shape[1] :].tolist()
        best = torch.cat(said.scores).topk(2).values
        leads[number, alpha] = (best[:, 0] - best[:, 1]).tolist()
    for name in arguments.engines:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(
            target=_tokens_of_engine, args=(sender, name, arguments.model, prompts, arguments.tokens)
        )
        if name in ("v2", "drafts") and not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # its kernels are written for GPUs; read when triton is imported
        child.start()
        sender.close()
        try:
            while (found := receiver.recv()) is not None:
                case, tokens = found
                wanted = [known[each] for each in enumerate(STRENGTHS[case])]
                plain = [known[number, 0] for number in range(16)]
                same, moved = (sum(a == b for a, b in zip(wanted, other, strict=True)) for other in (tokens, plain))
                print(f"{name}: {case}: {same} of 16 equal, {16 - moved} differ from the plain model's", flush=True)
                for row, alpha in enumerate(STRENGTHS[case]):
                    ours, theirs = known[row, alpha], tokens[row]
                    if ours != theirs:
                        place = next(n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
                        lead = f"{leads[row, alpha][place]:.5f} nats between the two best"
                        print(f"    row {row} ({len(prompts[row])} tokens), new token {place}: {lead}", flush=True)
        except EOFError:
            print(f"{name}: did not run, see above", flush=True)
        child.join()


def _tokens_of_engine(sender: Any, name: str, model: str, prompts: list[list[int]], tokens: int) -> None:
    if name in ("v2", "drafts"):
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        if not torch.cuda.is_available():
            from triton.backends import backends
            from triton.runtime.interpreter import InterpreterBuilder

            backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
            load = InterpreterBuilder.create_masked_load

            def load_by_bool(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
                mask.data = mask.data.astype(bool)  # n-gram drafts mask by 0 and 1, which the interpreter refuses
                return load(self, pointers, mask, *rest)

            InterpreterBuilder.create_masked_load = load_by_bool
    if not name.startswith("tp"):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = start(model, disable_log_stats=False, **ENGINES[name])
    for case, strengths in STRENGTHS.items():
        sender.send((case, generate(engine, prompts, strengths, max_tokens=tokens)))
    counted = {each.name: each.value for each in engine.get_metrics() if hasattr(each, "value")}
    told = {each: counted[each] for each in counted if "preempt" in each or "spec_decode" in each}
    print(f"{name}: {told}", flush=True)
    if not name.startswith("tp"):
        print(f"{name}: {processor()._failures} failed steps", flush=True)
    sender.send(None)


# ---- nothing is left


def many(arguments: argparse.Namespace) -> None:
    """2,000 requests in a row."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    prompts = some_prompts(AutoTokenizer.from_pretrained(arguments.model), longest=60)
    engine = start(arguments.model, enable_prefix_caching=False)

    def left() -> str:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        session = processor()._session
        rings = f"{session.memory_bytes / 1e6:.1f} MB of keys and values"
        resident = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        return (
            f"{resident:.0f} MB resident, {len(processor()._served)} in the table, {len(session.keys)} texts, {rings}"
        )

    for number in range(1, 2001):
        generate(engine, [prompts[number % 16]], [STRENGTHS["mixed"][number % 16]], max_tokens=2)
        if number in (1, 100, 500, 1000, 1500, 2000):
            print(f"after {number} requests: {left()}", flush=True)


# ---- what it costs


def overhead(arguments: argparse.Namespace) -> None:
    """On against off in one engine, taking turns; the engine runs in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    clock = time.perf_counter if on_gpu else time.process_time
    prompts = some_prompts(AutoTokenizer.from_pretrained(arguments.model), longest=100)
    engine = start(arguments.model, dtype=arguments.dtype, max_num_seqs=max(arguments.batches))
    for batch in arguments.batches:
        texts = (prompts * batch)[:batch]
        costs: dict[Any, list[float]] = {0: [], None: []}
        for turn in range(arguments.turns + 1):
            for alpha in (0, None) if turn % 2 else (None, 0):
                generate(engine, texts, [alpha] * batch, max_tokens=1, ignore_eos=True)
                begin = clock()
                generate(engine, texts, [alpha] * batch, max_tokens=arguments.tokens, ignore_eos=True)
                if turn:  # the first one warms up
                    costs[alpha].append((clock() - begin) / arguments.tokens * 1000)
        more = statistics.median(on / off - 1 for on, off in zip(costs[None], costs[0], strict=True))
        off, on = (statistics.median(costs[alpha]) for alpha in (0, None))
        print(f"batch {batch}: {off:.2f} ms a step without, {on:.2f} with: {more:+.1%}", flush=True)
    if arguments.profile:
        import cProfile
        import pstats

        inside = processor()
        profile, apply = cProfile.Profile(), inside.apply
        inside.apply = lambda *given: profile.runcall(apply, *given)
        generate(engine, texts, [None] * batch, max_tokens=arguments.tokens, ignore_eos=True)
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)


# ---- over HTTP


def http(arguments: argparse.Namespace) -> None:
    """200 streams at once, with the fusion and without."""
    import httpx

    address = "http://127.0.0.1:18765"
    options = ["--host", "127.0.0.1", "--port", "18765", "--dtype", arguments.dtype, "--max-model-len", "256"]
    options += ["--max-num-seqs", "16", "--enforce-eager", "--served-model-name", "served"]
    server = subprocess.Popen([sys.executable, "-m", "calibfuse", "serve", arguments.model, *options])
    try:
        while server.poll() is None:
            try:
                httpx.get(f"{address}/health", timeout=2).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(1)
        for turn in range(arguments.turns):
            for kind in ("off", "on") if turn % 2 else ("on", "off"):
                asyncio.run(_streams(address, kind, arguments.tokens))
        print(f"health afterwards: {httpx.get(f'{address}/health').status_code}")
    finally:
        server.terminate()
        server.wait()


async def _streams(address: str, kind: str, tokens: int) -> None:
    import httpx

    gaps: list[float] = []
    texts: dict[tuple[str, Any], set[str]] = {}

    async def stream(client: Any, number: int) -> int:
        prompt, alpha = STARTS[number % 6], (0 if kind == "off" else (0.5, 1, 2.25, 3, 5)[number // 6 % 5])
        options = {"calibfuse_alpha": "much" if number % 10 == 9 else alpha}
        body = {"model": "served", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        async with client.stream("POST", "/v1/completions", json={**body, "vllm_xargs": options}) as answer:
            pieces, last = [], 0.0
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event, now = json.loads(line[6:]), time.perf_counter()
                if "error" in event:
                    return int(event["error"]["code"])
                if last:
                    gaps.append(now - last)
                last = now
                pieces.append(event["choices"][0]["text"])
            if answer.status_code == 200:
                texts.setdefault((prompt, alpha), set()).add("".join(pieces))
            return int(answer.status_code)

    async with httpx.AsyncClient(base_url=address, timeout=600, limits=httpx.Limits(max_connections=200)) as client:
        codes = await asyncio.gather(*(stream(client, number) for number in range(200)))
    same = sum(len(each) == 1 for each in texts.values())
    percentiles = statistics.quantiles(gaps, n=100)
    print(
        f"{kind}: {codes.count(200)} streams, {codes.count(400)} times HTTP 400, {same} of {len(texts)} pairs of "
        f"prompt and strength always the same text, {1000 * percentiles[49]:.0f} ms a token at p50, "
        f"{1000 * percentiles[98]:.0f} at p99",
        flush=True,
    )


def main() -> None:
    """Run one check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["equal", "many", "overhead", "http"])
    parser.add_argument("model")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=["all", "chunks", "preempted", "tp2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--profile", action="store_true", help="overhead: where the time of the last batch goes")
    arguments = parser.parse_args()
    {"equal": equal, "many": many, "overhead": overhead, "http": http}[arguments.check](arguments)


if __name__ == "__main__":
    main()
