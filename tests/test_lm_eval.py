"""calibfuse in lm-evaluation-harness, on tasks in local files; skipped where the harness is not installed."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'calibfuse[lm-eval]'")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import calibfuse
from calibfuse.lm_eval import CalibFusionLM

TARGET = Path(calibfuse.__file__).parent / "pretrained" / "demo-target"
CHOICES = [
    {"question": "The capital of France is", "choices": [" Paris", " London"], "gold": 0},
    {"question": "You are such a", "choices": [" friend", " bitch"], "gold": 0},
    {"question": "My neighbour is a", "choices": [" doctor", " moron"], "gold": 0},
]
TEXTS = [{"text": "The river rose in the night, and the bridge was closed."}, {"text": "She wrote to him every day."}]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")

    def write(name, rows, **settings):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **settings}))

    write(
        "choice",
        CHOICES,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="choices",
        doc_to_target="gold",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    write(
        "rolling",
        TEXTS,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    write(
        "continuation",
        CHOICES,
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="",
        generation_kwargs={"max_gen_toks": 8, "until": ["\n\n"], "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    return TaskManager(include_path=str(folder), include_defaults=False)


def results(tasks, model, names, **options):
    found = simple_evaluate(model, tasks=names, task_manager=tasks, bootstrap_iters=0, log_samples=True, **options)
    return {name: [sample["resps"] for sample in found["samples"][name]] for name in names}


@pytest.fixture(scope="module")
def load(tasks):
    def make(kind=CalibFusionLM, batch_size=1, **options):
        return kind(pretrained=str(TARGET), dtype="float32", device="cpu", batch_size=batch_size, **options)

    return make


def test_strength_zero_equals_the_harness_s_own_model(tasks, load):
    from lm_eval.models.huggingface import HFLM

    names = ["choice", "rolling", "continuation"]
    plain, fused = results(tasks, load(HFLM), names), results(tasks, load(alpha=0), names)
    assert fused["continuation"] == plain["continuation"]
    for name in ("choice", "rolling"):
        pairs = [(numbers(one), numbers(other)) for one, other in zip(plain[name], fused[name], strict=True)]
        assert all(torch.allclose(one, other, atol=1e-3) for one, other in pairs)


def test_likelihoods_and_texts_are_the_fused_model_s(tasks, load):
    model = load(alpha=1.0)
    before = model.fusion.calls
    found = results(tasks, model, ["choice", "continuation"])
    assert model.fusion.calls > before
    rude = numbers(found["choice"][1])[1] - numbers(results(tasks, load(alpha=0), ["choice"])["choice"][1])[1]
    assert rude < -0.5  # nats: the rude answer became less likely in a task that never calls generate()


def test_batches_change_nothing(tasks, load):
    one, four = (results(tasks, load(batch_size=size), ["choice"])["choice"] for size in (1, 4))
    for left, right in zip(one, four, strict=True):
        torch.testing.assert_close(numbers(left), numbers(right), atol=1e-3, rtol=0)


def numbers(responses):
    return torch.tensor(
        [float(each[0][0]) if isinstance(each[0], tuple | list) else float(each[0]) for each in responses]
    )
