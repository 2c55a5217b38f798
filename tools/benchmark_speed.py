"""What the fusion costs: speed kept, where the time goes, start-up, memory.

    make bench                                        # everything: about half an hour on a quiet machine
    python tools/benchmark_speed.py --quick        # a few minutes
    python tools/benchmark_speed.py --only speed --json results.json

The target is a random GPT-2 of 124M shape (12 layers x 768, 50,257 tokens): weights do not change the cost. All
variants run in one process on one thread, their repetitions interleaved. On a machine that others use as well, wall
time says little: `speed kept` is given by the thread's CPU time (and by wall time beside it), as the median over
repetitions of plain / variant within the same repetition.

Section `causal-lm` compares kinds of calibrators on one target vocabulary: the universal one, a causal LM of its shape
that shares the target's vocabulary (lock-step), and the bundled demo target, whose 8,192 tokens are projected onto it.

Left out: GPUs, several threads, and the time that binding takes to read a tokenizer's file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaModel

if TYPE_CHECKING:
    from calibfuse.calibrator import BoundCalibrator, Calibrator, CalibratorConfig
    from calibfuse.guides.causal_lm import CausalLMCalibrator
    from calibfuse.vocabulary import Vocabulary

    Makers = dict[str, Callable[[], Any]]

TARGET_VOCAB_SIZE = 50_257
PROMPT_LENGTH = 32
BIND_SIZES = (32_000, 128_256, 150_000, 200_000)
SECTIONS = ("speed", "causal-lm", "profile", "body", "bind", "memory")


# ---- what is measured


def make_target(positions: int = 2048) -> GPT2LMHeadModel:
    """A random GPT-2 with the shape of the 124M one; never ends a text by itself."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=positions, bos_token_id=None, eos_token_id=None)).eval()
    model.generation_config.pad_token_id = TARGET_VOCAB_SIZE - 1
    return model


def make_calibrator() -> Calibrator:
    """The bundled calibrator; a random one of the default shape where none is bundled."""
    from calibfuse.calibrator import Calibrator, CalibratorConfig
    from calibfuse.errors import CheckpointError

    try:
        return Calibrator.from_pretrained()
    except CheckpointError:
        torch.manual_seed(0)
        calibrator = Calibrator(CalibratorConfig()).eval()
        calibrator.lay_out_for_decoding()  # as from_pretrained does
        return calibrator


def make_vocabulary(size: int) -> Vocabulary:
    """Random words, as long as tokens of real vocabularies are (2 to 11 bytes); the last id is special."""
    from calibfuse.vocabulary import Vocabulary

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (size,), generator=generator).tolist()
    letters = bytes(torch.randint(97, 123, (sum(lengths),), generator=generator).tolist())
    tokens: list[bytes | None] = []
    start = 0
    for length in lengths:
        tokens.append(b" " + letters[start : start + length - 1])
        start += length
    tokens[-1] = None
    return Vocabulary.from_byte_strings(tokens, name=f"{size} random words")


def make_related_vocabulary(size: int) -> Vocabulary:
    """The demo target's tokens, then random pairs of them up to 16 bytes: as near to its own as real vocabularies are.

    A random word of `make_vocabulary` would take a language model several tokens more than a real one.
    """
    from calibfuse.vocabulary import Vocabulary

    own = Vocabulary.from_tokenizer(make_language_model().tokenizer)
    strings = [own.token_bytes(token_id) for token_id in range(len(own))]
    tokens: list[bytes | None] = list(dict.fromkeys(each for each in strings if each))
    starts = [each for each in tokens if each and len(each) > 2]
    ends = [each for each in starts if not each.startswith(b" ")]
    generator = torch.Generator().manual_seed(0)
    known = set(tokens)
    while len(tokens) < size - 1:
        for first, second in torch.randint(0, 1 << 30, (size, 2), generator=generator).tolist():
            pair = starts[first % len(starts)] + ends[second % len(ends)]
            if len(pair) <= 16 and pair not in known and len(tokens) < size - 1:
                known.add(pair)
                tokens.append(pair)
    return Vocabulary.from_byte_strings([*tokens[: size - 1], None], name=f"{size} related tokens")


def make_language_model(*, twin: bool = False) -> CausalLMCalibrator:
    """The bundled demo target (Llama-shaped, 2.7M, 8,192 tokens) as calibrator; its twin, for the cost, is itself."""
    from calibfuse.guides.causal_lm import CausalLMCalibrator
    from calibfuse.hub import resolve_checkpoint

    folder = resolve_checkpoint(None, default="demo-target")
    return CausalLMCalibrator.from_pretrained(folder, reference=folder if twin else None)


class Timed(transformers.LogitsProcessor):
    """Adds up the CPU time that another processor takes, per step."""

    def __init__(self, processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.processor = processor
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """One step."""
        start = time.thread_time()
        result = self.processor(input_ids, scores)
        self.seconds.append(time.thread_time() - start)
        return result


def variants(bound: BoundCalibrator, *, alternatives: bool) -> Makers:
    """Name -> maker of a fresh processor (None: plain decoding).

    Args:
        bound: the calibrator.
        alternatives: with what else one could do, beside plain decoding and the fusion.
    """
    from calibfuse.fusion import recommended_config
    from calibfuse.processor import CalibFusion

    config = recommended_config(bound.calibrator.config.fusion, {})  # as from_pretrained does
    every: Makers = {"plain": lambda: None, "fusion": lambda: CalibFusion(bound, config)}
    if not alternatives:
        return every
    calibrator_sized = _calibrator_sized_gpt2(bound.calibrator.config)
    return every | {
        "fusion, no cache (recompute)": lambda: lambda ids, scores: CalibFusion(bound, config)(ids, scores),
        "fusion, full head (candidates=0)": lambda: CalibFusion(bound, replace(config, candidates=0)),
        "transformers' CFG with a calibrator-sized model": lambda: (
            transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, calibrator_sized)
        ),
    }


def causal_lm_variants(calibrator: Calibrator, vocabulary: Vocabulary) -> Makers:
    """Calibrators of every kind for one vocabulary: name -> maker of a fresh processor (None: plain decoding)."""
    from calibfuse.fusion import recommended_config
    from calibfuse.guides.causal_lm import CausalLMCalibrator
    from calibfuse.processor import CalibFusion

    shape = calibrator.config
    same = [_calibrator_sized_gpt2(shape, start_id=len(vocabulary) - 1) for _ in range(2)]
    lock_step = f"causal LM of its shape ({shape.layer_count} x {shape.width}), lock-step"
    projected = "causal LM with 8,192 tokens (2.7M), projected"
    guides: dict[str, Any] = {
        "universal calibrator": calibrator.bind(vocabulary, use_disk_cache=False),
        lock_step: CausalLMCalibrator(same[0], vocabulary).bind(vocabulary),
        f"{lock_step}, with twin": CausalLMCalibrator(same[0], vocabulary, reference=same[1]).bind(vocabulary),
        projected: make_language_model().bind(vocabulary),
        f"{projected}, with twin": make_language_model(twin=True).bind(vocabulary),
    }

    def maker(guide: Any) -> Callable[[], Any]:  # noqa: ANN401
        config = recommended_config(guide.calibrator.config.fusion, {})
        return lambda: CalibFusion(guide, config)

    return {"plain": lambda: None} | {name: maker(guide) for name, guide in guides.items()}


def _calibrator_sized_gpt2(config: CalibratorConfig, start_id: int | None = None) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = GPT2Config(
        bos_token_id=start_id,
        eos_token_id=start_id,
        n_layer=config.layer_count,
        n_embd=config.width,
        n_head=config.head_count,
        n_inner=config.hidden_width,
        n_positions=2048,
    )
    return GPT2LMHeadModel(shape).eval()


# ---- speed


def measure_speed(
    target: GPT2LMHeadModel,
    makers: Makers,
    *,
    batch: int,
    new_tokens: int,
    repetitions: int,
) -> list[dict[str, Any]]:
    """Greedy generation with every variant, interleaved.

    Returns:
        One row per variant: tokens per second (wall and CPU, medians), speed kept (medians of ratios within a
        repetition), CPU milliseconds of the processor per step: median of all, of the first and of the last 16 steps.
    """
    torch.manual_seed(1)
    prompt = torch.randint(0, TARGET_VOCAB_SIZE - 1, (batch, PROMPT_LENGTH))
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    steps: dict[str, list[list[float]]] = {name: [] for name in makers}
    _generate(target, prompt, 4, None)  # warm up: allocator, kernels
    for repetition in range(repetitions):
        order = list(makers)
        for name in order if repetition % 2 == 0 else reversed(order):
            processor = makers[name]()
            timed = None if processor is None else Timed(processor)
            wall, cpu = _generate(target, prompt, new_tokens, timed)
            runs[name].append((wall, cpu))
            if timed is not None:
                steps[name].append(timed.seconds[1:])  # the first call reads the prompt
            _note(f"batch {batch}, {new_tokens} tokens, repetition {repetition + 1}: {name} {cpu:.1f} s CPU")
    rows = []
    tokens = batch * new_tokens
    for name, times in runs.items():
        every = [1e3 * second for run in steps[name] for second in run]
        rows.append(
            {
                "batch": batch,
                "new_tokens": new_tokens,
                "variant": name,
                "tokens_per_second": tokens / statistics.median(wall for wall, _ in times),
                "tokens_per_cpu_second": tokens / statistics.median(cpu for _, cpu in times),
                "kept_wall": _kept([wall for wall, _ in runs["plain"]], [wall for wall, _ in times]),
                "kept_cpu": _kept([cpu for _, cpu in runs["plain"]], [cpu for _, cpu in times]),
                "processor_ms": statistics.median(every) if every else None,
                "processor_ms_first": _median_of(steps[name], slice(None, 16)),
                "processor_ms_last": _median_of(steps[name], slice(-16, None)),
            }
        )
    return rows


def _kept(plain: list[float], variant: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(plain, variant, strict=True))


def _median_of(runs: list[list[float]], part: slice) -> float | None:
    values = [1e3 * second for run in runs for second in run[part]]
    return statistics.median(values) if values else None


def _generate(
    target: GPT2LMHeadModel, prompt: torch.Tensor, new_tokens: int, processor: Timed | None
) -> tuple[float, float]:
    """Wall seconds and CPU seconds of this thread."""
    wall, cpu = time.perf_counter(), time.thread_time()
    target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        logits_processor=[] if processor is None else [processor],
    )
    return time.perf_counter() - wall, time.thread_time() - cpu


# ---- where the time goes


def measure_profile(target: GPT2LMHeadModel, bound: BoundCalibrator, *, batch: int, steps: int) -> dict[str, Any]:
    """CPU time per step of the parts of the processor, inside a real generation (cold caches and all)."""
    from calibfuse import processor as processor_module
    from calibfuse.processor import CalibFusion

    fusion = CalibFusion(bound)
    spent: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        seconds = spent.setdefault(name, [])

        def run(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            start = time.thread_time()
            result = function(*arguments, **options)
            seconds.append(time.thread_time() - start)
            return result

        return run

    session = fusion._rows(fusion.guide)
    session.step = timed("guide: match prefixes, body", session.step)  # type: ignore[method-assign]
    fusion._readings = timed("checks of scores and ids", fusion._readings)  # type: ignore[method-assign]
    original = processor_module.fuse
    processor_module.fuse = timed("fusion: candidates, heads, arithmetic", original)
    whole = Timed(fusion)
    torch.manual_seed(1)
    prompt = torch.randint(0, TARGET_VOCAB_SIZE - 1, (batch, PROMPT_LENGTH))
    try:
        _, cpu = _generate(target, prompt, steps, whole)
    finally:
        processor_module.fuse = original
    parts = {name: 1e3 * statistics.median(seconds[1:]) for name, seconds in spent.items()}
    total = 1e3 * statistics.median(whole.seconds[1:])
    target_ms = 1e3 * (cpu - sum(whole.seconds)) / steps
    return {
        "batch": batch,
        "parts_ms": parts,
        "processor_ms": total,
        "target_ms": target_ms,
        "share": total / target_ms,
    }


def profile_operations(bound: BoundCalibrator, *, batch: int, steps: int, count: int = 12) -> list[dict[str, Any]]:
    """The operations that take the most time of the processor alone (warm caches), by torch's profiler."""
    from calibfuse.processor import CalibFusion

    torch.manual_seed(1)
    ids = torch.randint(0, TARGET_VOCAB_SIZE - 1, (batch, PROMPT_LENGTH + steps))
    scores = torch.randn(batch, TARGET_VOCAB_SIZE) * 3
    fusion = CalibFusion(bound)
    with torch.no_grad():
        fusion(ids[:, :PROMPT_LENGTH], scores)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for length in range(PROMPT_LENGTH + 1, PROMPT_LENGTH + steps):
                fusion(ids[:, :length], scores)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {
            "operation": event.key,
            "calls_per_step": event.count / (steps - 1),
            "share": event.self_cpu_time_total / total,
        }
        for event in events[:count]
    ]


# ---- the body against transformers' models


def measure_body(calibrator: Calibrator, *, batch: int, steps: int, repetitions: int) -> dict[str, Any]:
    """CPU milliseconds per decoding step of the own body and of transformers' models of the same shape."""
    from calibfuse.calibrator.body import KeyValueRing

    config = calibrator.config
    context = config.window - steps  # so that all of them attend to at most one window
    torch.manual_seed(0)
    inputs = torch.randn(batch, config.window, config.width)
    gpt2 = GPT2Model(
        GPT2Config(
            vocab_size=1,
            n_layer=config.layer_count,
            n_embd=config.width,
            n_head=config.head_count,
            n_inner=config.hidden_width,
            n_positions=config.window,
        )
    ).eval()
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=1,
            num_hidden_layers=config.layer_count,
            hidden_size=config.width,
            num_attention_heads=config.head_count,
            num_key_value_heads=config.head_count,
            intermediate_size=config.hidden_width * 2 // 3,  # three matrices instead of two
            max_position_embeddings=config.window,
            pad_token_id=None,
        )
    ).eval()

    def own() -> Iterator[None]:
        ring, rows = KeyValueRing(config.layer_count, config.window), range(batch)
        ring.resize(batch)
        calibrator.body.step(inputs[:, :context], ring, rows, [0] * batch, [context] * batch)
        for step in range(context, config.window):
            yield
            calibrator.body.step(inputs[:, step : step + 1], ring, rows, [step] * batch, [1] * batch)

    def theirs(model: GPT2Model | LlamaModel) -> Iterator[None]:
        cache = DynamicCache()
        model(inputs_embeds=inputs[:, :context], past_key_values=cache, use_cache=True)
        for step in range(context, config.window):
            yield
            model(inputs_embeds=inputs[:, step : step + 1], past_key_values=cache, use_cache=True)

    contestants: dict[str, Callable[[], Iterator[None]]] = {
        "own body": own,
        "GPT2Model": lambda: theirs(gpt2),
        "LlamaModel": lambda: theirs(llama),
    }
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.no_grad():
        for _ in range(repetitions):
            for name, make in contestants.items():
                runner = make()
                next(runner)
                start = time.thread_time()
                for _ in runner:
                    pass
                taken[name].append(1e3 * (time.thread_time() - start) / steps)
    return {"batch": batch, "ms": {name: statistics.median(values) for name, values in taken.items()}}


# ---- start and memory


def measure_bind(calibrator: Calibrator, size: int, *, repetitions: int) -> dict[str, Any]:
    """Seconds of `bind`, cold and from the disk cache (medians, wall and CPU), and the size of what was bound.

    Beside it one cold binding of a causal LM with other tokens, whose tables are not cached.
    """
    cold: list[tuple[float, float]] = []
    warm: list[tuple[float, float]] = []
    memory = 0
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CALIBFUSE_CACHE"] = folder
            try:
                for times in (cold, warm):
                    vocabulary = make_vocabulary(size)  # a new object: its fingerprint must be computed again
                    wall, cpu = time.perf_counter(), time.thread_time()
                    memory = calibrator.bind(vocabulary).memory_bytes
                    times.append((time.perf_counter() - wall, time.thread_time() - cpu))
            finally:
                del os.environ["CALIBFUSE_CACHE"]
    vocabulary, language_model = make_related_vocabulary(size), make_language_model()
    cpu = time.thread_time()
    projected = language_model.bind(vocabulary)
    row: dict[str, Any] = {"size": size, "megabytes": memory / 2**20, "projected_cpu": time.thread_time() - cpu}
    row["projected_megabytes"] = projected.memory_bytes / 2**20
    for name, times in (("cold", cold), ("cached", warm)):
        row[f"{name}_wall"] = statistics.median(wall for wall, _ in times)
        row[f"{name}_cpu"] = statistics.median(cpu for _, cpu in times)
    return row


def measure_memory(batch: int, new_tokens: int) -> list[dict[str, Any]]:
    """Peak resident memory of generating, plain and fused, each in its own process, counted from the loaded target."""
    rows = []
    for kind in ("plain", "fused", "fused, bfloat16 vectors"):
        command = [sys.executable, __file__, "--memory-child", kind, str(batch), str(new_tokens)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append({"kind": kind, "batch": batch, **json.loads(output.splitlines()[-1])})
    for row in rows:
        row["above_plain_mb"] = row["peak_mb"] - rows[0]["peak_mb"]
    return rows


def memory_child(kind: str, batch: int, new_tokens: int) -> None:
    """Print the peak memory of one process as JSON. The calibrator is loaded and bound while the target is there."""
    torch.set_num_threads(1)
    target = make_target()
    prompt = torch.randint(0, TARGET_VOCAB_SIZE - 1, (batch, PROMPT_LENGTH))
    loaded = _reset_peak_memory()
    processor = None
    if kind != "plain":
        from calibfuse.processor import CalibFusion

        dtype = torch.bfloat16 if "bfloat16" in kind else None
        bound = make_calibrator().bind(make_vocabulary(TARGET_VOCAB_SIZE), dtype=dtype, use_disk_cache=False)
        processor = Timed(CalibFusion(bound))
    _generate(target, prompt, new_tokens, processor)
    print(json.dumps({"peak_mb": _peak_memory_mb(), "target_mb": loaded}))


def _reset_peak_memory() -> float | None:
    """Forget the peak so far (Linux); returns the present memory in MiB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_mb("VmRSS")


def _peak_memory_mb() -> float:
    try:
        return _status_mb("VmHWM")
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _status_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 2**10


# ---- report


def describe_machine() -> dict[str, Any]:
    """What a number needs beside it."""
    name = platform.processor()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    return {
        "machine": f"{name or platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit or "unknown",
        "command": " ".join(["python", "tools/benchmark_speed.py", *sys.argv[1:]]),
    }


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    print(f"\n### {title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report_speed(rows: list[dict[str, Any]], title: str) -> None:
    """Print the rows of `measure_speed`."""
    print_table(
        title,
        ["batch", "new tokens", "variant", "tokens/s", "tokens/CPU-s", "kept (CPU)", "kept (wall)", "processor ms/step",
         "first 16", "last 16"],
        [
            [
                str(row["batch"]), str(row["new_tokens"]), row["variant"], _number(row["tokens_per_second"], 1),
                _number(row["tokens_per_cpu_second"], 1), _number(row["kept_cpu"], 3), _number(row["kept_wall"], 3),
                _number(row["processor_ms"], 2), _number(row["processor_ms_first"], 2),
                _number(row["processor_ms_last"], 2),
            ]
            for row in rows
        ],
    )  # fmt: skip


def report_profile(profiles: list[dict[str, Any]]) -> None:
    """Print the results of `measure_profile` and `profile_operations`."""
    rows = []
    for profile in profiles:
        batch = str(profile["batch"])
        rows += [[batch, name, _number(value, 2)] for name, value in profile["parts_ms"].items()]
        rows.append([batch, "**processor as a whole**", _number(profile["processor_ms"], 2)])
        rows.append([batch, "target (mean)", _number(profile["target_ms"], 1)])
    print_table("Where a step's time goes (CPU ms, medians, inside generate())", ["batch", "part", "ms"], rows)
    for profile in profiles:
        print_table(
            f"Operations of the processor alone, batch {profile['batch']} (torch profiler)",
            ["operation", "calls per step", "share of time"],
            [
                [f"`{item['operation']}`", _number(item["calls_per_step"], 0), f"{item['share']:.1%}"]
                for item in profile["operations"]
            ],
        )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print what was asked for."""
    quick, sections = arguments.quick, arguments.only or SECTIONS
    batches = (1, 8)
    results: dict[str, Any] = {"setting": describe_machine()}
    print_table("Setting", ["", ""], [[key, str(value)] for key, value in results["setting"].items()])
    calibrator = make_calibrator()
    if {"speed", "causal-lm", "profile"} & set(sections):
        target, bound = make_target(), calibrator.bind(make_vocabulary(TARGET_VOCAB_SIZE), use_disk_cache=False)
    if "speed" in sections:
        lengths = arguments.new_tokens or ((16,) if quick else (64, 1024))
        rows = []
        for new_tokens in lengths:
            for batch in batches:
                rows += measure_speed(
                    target,
                    variants(bound, alternatives=new_tokens <= 128),
                    batch=batch,
                    new_tokens=new_tokens,
                    repetitions=arguments.repetitions or (2 if quick else 5 if new_tokens <= 128 else 2),
                )
        results["speed"] = rows
        report_speed(rows, "Speed kept with fusion (124M-shaped target, greedy)")
    if "causal-lm" in sections:
        kinds = causal_lm_variants(calibrator, make_related_vocabulary(TARGET_VOCAB_SIZE))
        rows = []
        for batch in batches:
            rows += measure_speed(
                target,
                kinds,
                batch=batch,
                new_tokens=min(arguments.new_tokens or (12 if quick else 64,)),
                repetitions=arguments.repetitions or (2 if quick else 5),
            )
        results["causal-lm"] = rows
        report_speed(rows, "Speed kept by kind of calibrator (124M-shaped target, greedy)")
    if "profile" in sections:
        steps = 16 if quick else 64
        results["profile"] = [
            {
                **measure_profile(target, bound, batch=batch, steps=steps),
                "operations": profile_operations(bound, batch=batch, steps=steps),
            }
            for batch in batches
        ]
        report_profile(results["profile"])
    if "body" in sections:
        repetitions = 4 if quick else 15
        results["body"] = [
            measure_body(calibrator, batch=batch, steps=32, repetitions=repetitions) for batch in batches
        ]
        names = list(results["body"][0]["ms"])
        rows_text = [[str(row["batch"]), *(_number(row["ms"][name], 2) for name in names)] for row in results["body"]]
        print_table("One decoding step of the body alone (CPU ms, within one window)", ["batch", *names], rows_text)
    if "bind" in sections:
        results["bind"] = [
            measure_bind(calibrator, size, repetitions=arguments.repetitions or (2 if quick else 3))
            for size in (BIND_SIZES[:2] if quick else BIND_SIZES)
        ]
        columns = (
            "cold_wall", "cold_cpu", "cached_wall", "cached_cpu", "megabytes", "projected_cpu", "projected_megabytes",
        )  # fmt: skip
        print_table(
            "Start: bind (seconds)",
            [
                "vocabulary",
                "cold, wall",
                "cold, CPU",
                "disk cache, wall",
                "disk cache, CPU",
                "bound MiB",
                "projected LM, CPU",
                "its tables, MiB",
            ],
            [
                [str(row["size"]), *(_number(row[key], 1 if "megabytes" in key else 3) for key in columns)]
                for row in results["bind"]
            ],
        )
    if "memory" in sections:
        rows = [row for batch in batches for row in measure_memory(batch, 8 if quick else 64)]
        results["memory"] = rows
        print_table(
            "Peak memory while binding 50,257 tokens and generating (MiB; limit 150 above plain)",
            ["batch", "decoding", "peak", "above plain"],
            [
                [str(row["batch"]), row["kind"], _number(row["peak_mb"], 0), _number(row["above_plain_mb"], 0)]
                for row in rows
            ],
        )
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What the fusion costs: speed, profile, body, bind, memory.")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repetitions")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections to run; default all")
    parser.add_argument(
        "--new-tokens", nargs="+", type=int, metavar="N", help="lengths of generations; default 64 1024"
    )
    parser.add_argument("--repetitions", type=int, metavar="N", help="of every generation; default 5 (2 for long ones)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here as well")
    parser.add_argument("--memory-child", nargs=3, metavar=("KIND", "BATCH", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_child:
        kind, batch, new_tokens = arguments.memory_child
        memory_child(kind, int(batch), int(new_tokens))
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results = run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
