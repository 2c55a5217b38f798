"""Which role runs when, and on whose products: the sequential and the parallel schedule of Meng et al. 2024.

Three roles repeat: *samples* draws continuations from a model and labels them, *auxiliary* learns R from labelled
samples, *model* fine-tunes towards q = p R. The product of a role in step i lies in `work/step-i/ROLE`; samples of
step i are samples of the model of step i - 1, and model 0, like -1, is the model that the user gave.

- *sequential*: in each step one role after the other, each on what was just made. NADO_i learns from samples of
  LM_(i-1), then LM_i from NADO_i, then LM_i is sampled (as step i + 1 begins).
- *parallel*: in each step all three at once, on the products of step i - 1: NADO_i learns from samples of LM_(i-2),
  LM_i from NADO_(i-1), and LM_(i-1) is sampled. Step 0 fills the pipeline: samples and auxiliary model of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calibfuse.errors import InputError

SAMPLES, AUXILIARY, MODEL = "samples", "auxiliary", "model"
ROLES = (SAMPLES, AUXILIARY, MODEL)
SEQUENTIAL, PARALLEL = "sequential", "parallel"
SCHEDULES = (SEQUENTIAL, PARALLEL)


def product_folder(work: Path, role: str, step: int) -> Path:
    """Where the product of a role and step lies; it is there if and only if it is complete."""
    return work / f"step-{step}" / role


@dataclass(frozen=True, eq=False)
class Job:
    """One role of one step: whose product it makes.

    `reads` gives for each kind of product the step in which it was made. "model" of step 0 or below is the user's;
    "auxiliary" is missing where there is none yet.
    """

    role: str
    step: int
    reads: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Stage:
    """Jobs of one step that run at the same time; stages run one after the other."""

    step: int
    jobs: tuple[Job, ...]


def plan_stages(schedule: str, iterations: int, *, constrained: bool = True) -> tuple[Stage, ...]:
    """All stages of a run.

    Example:
        >>> [[job.role for job in stage.jobs] for stage in plan_stages("parallel", 1)]
        [['samples'], ['auxiliary'], ['samples', 'auxiliary', 'model']]
    """
    if schedule not in SCHEDULES:
        raise InputError(f"Unknown schedule {schedule!r}; expected {' or '.join(SCHEDULES)}.")
    if iterations < 1:
        raise InputError(f"iterations must be at least 1, got {iterations}.")
    steps = range(1, iterations + 1)
    if not constrained:
        return tuple(Stage(step, (Job(MODEL, step, {MODEL: step - 1}),)) for step in steps)
    if schedule == SEQUENTIAL:
        return tuple(Stage(step, (job,)) for step in steps for job in _sequential_jobs(step))
    fill = (Job(SAMPLES, 0, {MODEL: 0}), Job(AUXILIARY, 0, {SAMPLES: 0, MODEL: 0}))
    return (*(Stage(0, (job,)) for job in fill), *(Stage(step, _parallel_jobs(step)) for step in steps))


def _sequential_jobs(step: int) -> tuple[Job, ...]:
    # `auxiliary` of the step before is where training starts from, not what R is an estimate for
    warm = {AUXILIARY: step - 1} if step > 1 else {}
    return (
        Job(SAMPLES, step, {MODEL: step - 1}),
        Job(AUXILIARY, step, {SAMPLES: step, MODEL: step - 1, **warm}),
        Job(MODEL, step, {MODEL: step - 1, AUXILIARY: step, SAMPLES: step}),
    )


def _parallel_jobs(step: int) -> tuple[Job, ...]:
    before = step - 1
    return (
        Job(SAMPLES, step, {MODEL: before}),
        # the samples of the step before were drawn from the model of the step before that one
        Job(AUXILIARY, step, {SAMPLES: before, MODEL: max(0, before - 1), AUXILIARY: before}),
        Job(MODEL, step, {MODEL: before, AUXILIARY: before, SAMPLES: before}),
    )
