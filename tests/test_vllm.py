"""The fusion inside vLLM: the same tokens as in transformers, whatever else is in the batch.

Skipped where vLLM is not installed; .ci/run installs it into an environment of its own. The engine runs in this
process (first model runner, CPU, float32, one thread), so that its processor can be looked at.
"""

import os

import pytest

pytest.importorskip("vllm", reason="needs vLLM: pip install 'calibfuse[vllm]'")

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

import calibfuse
from calibfuse import CalibFusion
from calibfuse.errors import InputError
from calibfuse.vllm import CalibFusionProcessor, ServerOptions

TARGET = str(Path(calibfuse.__file__).parent / "pretrained" / "demo-target")
NEW_TOKENS = 16
STRENGTHS = {
    "on": [None] * 16,
    "off": [0] * 16,
    "every second": [None, 0] * 8,
    "mixed": [0, 0.5, 1, 2.25, 5, 1.5, 0, 3] * 2,
}


class Watched(CalibFusionProcessor):
    """Keeps its instances, so that a test can look at the one inside the engine."""

    made = []

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.made.append(self)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """16 requests of 3 to 442 tokens."""
    starts = ["You are such a", "My neighbour is a", "What the", "I hate", "She told him that", "They said he"] * 2
    text = "The river rose in the night, and the bridge that the old men had built was closed to all. " * 40
    long = tokenizer(text)["input_ids"]
    return [tokenizer(each)["input_ids"] for each in starts] + [long[:count] for count in (60, 150, 300, 442)]


@pytest.fixture(scope="module")
def expected(tokenizer, prompts):
    """Greedy tokens of transformers with CalibFusion, per strength and prompt."""
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    known = {}

    def tokens(strengths):
        for number, alpha in enumerate(strengths):
            if (number, alpha) not in known:
                fusion = [] if alpha == 0 else [CalibFusion.from_pretrained(tokenizer=tokenizer, alpha=alpha)]
                ids = torch.tensor([prompts[number]])
                mask = torch.ones_like(ids)
                options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
                new = model.generate(ids, attention_mask=mask, logits_processor=fusion, **options)[0, ids.shape[1] :]
                known[number, alpha] = without_end(new.tolist(), tokenizer)
        return [known[number, alpha] for number, alpha in enumerate(strengths)]

    return tokens


def without_end(ids, tokenizer):
    return ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids


def start(**options):
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "distributed_executor_backend": "uni",
        "logits_processors": [Watched],
    }
    return LLM(model=TARGET, **(settings | options))


@pytest.fixture(scope="module")
def engine():
    return start()


def run(engine, prompts, strengths, tokenizer, **options):
    settings = {"temperature": 0, "max_tokens": NEW_TOKENS, **options}
    params = [
        SamplingParams(extra_args={} if alpha is None else {"calibfuse_alpha": alpha}, **settings)
        for alpha in strengths
    ]
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [without_end(list(each.outputs[0].token_ids), tokenizer) for each in outputs]


@pytest.mark.parametrize("kind", STRENGTHS)
def test_tokens_equal_transformers(engine, prompts, expected, tokenizer, kind):
    found = run(engine, prompts, STRENGTHS[kind], tokenizer)
    assert found == expected(STRENGTHS[kind])
    if kind == "on":
        assert found != expected(STRENGTHS["off"])  # the fusion does something on these prompts


def test_nothing_is_left_of_requests_that_ended(engine, prompts, tokenizer):
    processor = Watched.made[0]
    for _ in range(12):
        run(engine, prompts, STRENGTHS["mixed"], tokenizer, max_tokens=2)
    run(engine, prompts[:1], [None], tokenizer, max_tokens=2)
    # the engine tells of an ended request at the next step, so the last one may still be known
    assert len(processor._served) <= 1
    assert len(processor._session.keys) <= 1
    assert processor._session.memory_bytes < 4_000_000


def test_a_request_that_is_broken_off_leaves_nothing(engine, prompts):
    inner, processor, ended = engine.llm_engine, Watched.made[0], []
    for name in ("broken off", "other"):
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        inner.add_request(name, {"prompt_token_ids": prompts[0]}, params)
    for step in range(30):
        ended += [each.request_id for each in inner.step() if each.finished]
        if step == 5:
            assert len(processor._served) == len(processor._session.keys) == 2
            inner.abort_request(["broken off"])
        if step == 7:
            assert len(processor._served) == len(processor._session.keys) == 1
    assert ended == ["other"]


def test_bad_options_of_a_request_are_refused_in_one_sentence(engine, prompts, tokenizer):
    for options, sentence in (
        ({"calibfuse_alpha": -1}, "from 0"),
        ({"calibfuse_alpha": "much"}, "must be a number"),
        ({"calibfuse_alpha": float("nan")}, "must be a number"),
        ({"calibfuse_alhpa": 1}, "Unknown option 'calibfuse_alhpa'"),
        ({"calibfuse_report": "yes"}, "true or false"),
    ):
        with pytest.raises(VLLMValidationError, match=sentence):
            engine.generate("Hello", SamplingParams(extra_args=options), use_tqdm=False)
    assert run(engine, prompts[:2], [0, 0], tokenizer)  # the engine lives


def test_an_error_in_a_step_does_not_end_the_engine(engine, prompts, expected, tokenizer, monkeypatch):
    processor = Watched.made[0]
    monkeypatch.setattr(processor._session, "step", lambda requests: 1 / 0)
    before = processor._failures
    assert run(engine, prompts, [None] * 16, tokenizer) == expected([0] * 16)  # left unfused, counted and logged
    assert processor._failures > before
    monkeypatch.undo()
    assert run(engine, prompts, [None] * 16, tokenizer) == expected([None] * 16)


def test_excluded_tokens_stay_excluded(engine, tokenizer):
    allowed = tokenizer(" yes no maybe", add_special_tokens=False)["input_ids"]
    params = SamplingParams(temperature=1.0, max_tokens=20, allowed_token_ids=allowed, seed=0)
    output = engine.generate("Is it so?", params, use_tqdm=False)[0].outputs[0]
    assert set(output.token_ids) <= set(allowed)


def test_repetition_penalty_sees_logits_of_the_usual_scale(engine, prompts, tokenizer):
    """Penalties come after the fusion and depend on the sign of a logit: a tiny strength must change nothing."""
    options = {"repetition_penalty": 1.3}
    plain = run(engine, prompts, [0] * 16, tokenizer, **options)
    assert run(engine, prompts, [1e-6] * 16, tokenizer, **options) == plain


def test_options_of_the_server_come_from_its_configuration_or_the_environment(monkeypatch):
    assert ServerOptions.of({"calibfuse": {"alpha": 1.0}}).alpha == 1.0
    monkeypatch.setenv("CALIBFUSE_VLLM", '{"alpha": 2.0}')
    assert ServerOptions.of({}).alpha == 2.0
    with pytest.raises(InputError, match="alhpa"):
        ServerOptions.of({"calibfuse": {"alhpa": 1.0}})


@pytest.mark.parametrize(
    "options",
    [{"max_num_seqs": 5, "max_num_batched_tokens": 64}, {"num_gpu_blocks_override": 24, "block_size": 32}],
    ids=["prompts in chunks", "too little memory for all"],
)
def test_tokens_are_the_same_however_the_engine_schedules(prompts, expected, tokenizer, options):
    # last in this file: an engine that ends takes the process's distributed state with it
    assert run(start(**options), prompts, STRENGTHS["mixed"], tokenizer) == expected(STRENGTHS["mixed"])
