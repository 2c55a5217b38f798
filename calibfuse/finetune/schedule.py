"""Which role runs when, and on whose products: the sequential and the parallel schedule of Meng et al. 2024.

*samples* draws continuations and labels them, *auxiliary* learns R from them, *model* fine-tunes towards q = p R. In a
sequential step one follows the other; in a parallel one all three work at once on the products of the step before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calibfuse.errors import InputError

SAMPLES, AUXILIARY, MODEL = "samples", "auxiliary", "model"
ROLES = (SAMPLES, AUXILIARY, MODEL)
SEQUENTIAL, PARALLEL = "sequential", "parallel"


@dataclass(frozen=True, eq=False)
class Job:
    """One role of one step; `reads` gives for each product that it needs the step which made it.

    Model 0 is the user's. The auxiliary model that role `auxiliary` reads is where its training starts from.
    """

    role: str
    step: int
    reads: Mapping[str, int]

    def folder(self, work: Path) -> Path:
        """Where the product lies; it is there if and only if it is complete."""
        return product_folder(work, self.role, self.step)


def product_folder(work: Path, role: str, step: int) -> Path:
    """Where the product of a role and step lies."""
    return work / f"step-{step}" / role


def plan_stages(schedule: str, iterations: int, *, constrained: bool = True) -> tuple[tuple[Job, ...], ...]:
    """The stages of a run, one after the other; the jobs of one may run at the same time."""
    if schedule not in (SEQUENTIAL, PARALLEL):
        raise InputError(f"Unknown schedule {schedule!r}; expected {SEQUENTIAL} or {PARALLEL}.")
    if iterations < 1:
        raise InputError(f"iterations must be at least 1, got {iterations}.")
    steps = range(1, iterations + 1)
    if not constrained:
        return tuple((Job(MODEL, step, {MODEL: step - 1}),) for step in steps)
    if schedule == SEQUENTIAL:
        return tuple((job,) for step in steps for job in _sequential_jobs(step))
    fill = (Job(SAMPLES, 0, {MODEL: 0}), Job(AUXILIARY, 0, {SAMPLES: 0, MODEL: 0}))
    return (*((job,) for job in fill), *map(_parallel_jobs, steps))


def _sequential_jobs(step: int) -> tuple[Job, ...]:
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
