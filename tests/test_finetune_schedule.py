"""Schedules: who reads whose products, in which order, together or not, and where each role runs."""

import json

import pytest

from calibfuse.errors import InputError, ScorerError
from calibfuse.finetune.parallel import find_devices, share_out
from calibfuse.finetune.run import execute
from calibfuse.finetune.schedule import plan_stages, product_folder


def reads(schedule, iterations):
    """(role, step) -> what it reads, models of step 0 being the user's."""
    return {(job.role, job.step): dict(job.reads) for jobs in plan_stages(schedule, iterations) for job in jobs}


def test_sequential_runs_one_role_after_the_other():
    order = [[(job.role, job.step) for job in stage] for stage in plan_stages("sequential", 2)]
    assert order == [
        [("samples", 1)],
        [("auxiliary", 1)],
        [("model", 1)],
        [("samples", 2)],
        [("auxiliary", 2)],
        [("model", 2)],
    ]


def test_sequential_reads_what_was_just_made():
    """NADO_i learns from samples of LM_(i-1), then LM_i from NADO_i; samples of step i are those of LM_(i-1)."""
    for (role, step), found in reads("sequential", 4).items():
        if role == "samples":
            assert found == {"model": step - 1}
        elif role == "auxiliary":
            assert (found["samples"], found["model"]) == (step, step - 1)
        else:
            assert found == {"model": step - 1, "auxiliary": step, "samples": step}


def test_parallel_runs_all_roles_at_once_after_the_pipeline_is_filled():
    order = [[(job.role, job.step) for job in stage] for stage in plan_stages("parallel", 2)]
    assert order == [
        [("samples", 0)],
        [("auxiliary", 0)],
        [("samples", 1), ("auxiliary", 1), ("model", 1)],
        [("samples", 2), ("auxiliary", 2), ("model", 2)],
    ]


def test_parallel_reads_only_products_of_the_step_before():
    """In step i: NADO_i on samples of LM_(i-2), LM_i from NADO_(i-1), sampling of LM_(i-1)."""
    found = reads("parallel", 5)
    for (role, step), inputs in found.items():
        if step == 0:
            continue
        if role == "samples":
            assert inputs == {"model": step - 1}
        elif role == "model":
            assert inputs == {"model": step - 1, "auxiliary": step - 1, "samples": step - 1}
        else:
            sampled_from = found["samples", inputs["samples"]]["model"]
            assert inputs["samples"] == step - 1
            assert sampled_from == max(0, step - 2)
            assert inputs["model"] == sampled_from, "R is the expectation under the model that was sampled"


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_nothing_is_read_before_it_is_made(schedule):
    made = {("model", 0)}
    for stage in plan_stages(schedule, 4):
        for job in stage:
            assert {(kind, step) for kind, step in job.reads.items()} <= made, job
        made |= {(job.role, job.step) for job in stage}
    assert ("model", 4) in made


def test_plain_fine_tuning_needs_no_other_role():
    stages = plan_stages("parallel", 2, constrained=False)
    assert [[(job.role, dict(job.reads)) for job in stage] for stage in stages] == [
        [("model", {"model": 0})],
        [("model", {"model": 1})],
    ]


def test_bad_plans_are_refused():
    with pytest.raises(InputError, match="Unknown schedule 'both'; expected sequential or parallel"):
        plan_stages("both", 1)
    with pytest.raises(InputError, match="iterations must be at least 1, got 0"):
        plan_stages("sequential", 0)


class Recorder:
    """Makes empty products, and can fail at one of them."""

    def __init__(self, work, fails_at=None):
        self.work, self.fails_at, self.stages = work, fails_at, []

    def __call__(self, jobs):
        self.stages.append([(job.role, job.step) for job in jobs])
        records = {}
        for job in jobs:
            if (job.role, job.step) == self.fails_at:
                raise ScorerError("the oracle returned strings")
            folder = product_folder(self.work, job.role, job.step)
            folder.mkdir(parents=True)
            records[job.role] = {"seconds": 0.5, "figures": {}}
            (folder / "role.json").write_text(json.dumps(records[job.role]))
        return records


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_stages_run_in_order_and_nothing_twice(schedule, tmp_path):
    stages = plan_stages(schedule, 2)
    recorder = Recorder(tmp_path)
    execute(stages, tmp_path, recorder)
    assert recorder.stages == [[(job.role, job.step) for job in stage] for stage in stages]
    again = Recorder(tmp_path)
    execute(stages, tmp_path, again)
    assert again.stages == []


def test_a_stopped_run_goes_on_with_the_first_missing_product(tmp_path):
    stages = plan_stages("parallel", 2)
    with pytest.raises(ScorerError, match="strings"):
        execute(stages, tmp_path, Recorder(tmp_path, fails_at=("auxiliary", 1)))
    recorder = Recorder(tmp_path)
    execute(stages, tmp_path, recorder)
    assert recorder.stages == [
        [("auxiliary", 1), ("model", 1)],  # the samples were complete
        [("samples", 2), ("auxiliary", 2), ("model", 2)],
    ]


def test_devices_are_shared_out():
    assert share_out(["cpu"]) == {"samples": "cpu", "auxiliary": "cpu", "model": "cpu"}
    assert list(share_out(["a", "b"]).values()) == ["b", "b", "a"]
    assert list(share_out(["a", "b", "c"]).values()) == ["b", "c", "a"]


def test_devices_that_are_not_there_are_refused():
    assert find_devices("cpu, cpu") == ["cpu", "cpu"]
    with pytest.raises(InputError, match="device must be one of torch's, such as 'cpu' or 'cuda:0', got 'abacus'"):
        find_devices("cpu,abacus")
