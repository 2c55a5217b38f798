"""The jobs of a stage at the same time, each in a process of its own, with a device and CPU threads for its role."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibfuse.errors import CalibfuseError
from calibfuse.finetune.roles import RoleRunner
from calibfuse.finetune.schedule import ROLES, Job
from calibfuse.generation.language_model import choose_device


@dataclass(frozen=True)
class Place:
    """Where a role runs: a device as torch names it, and a number of CPU threads."""

    device: str
    threads: int


def share_out(devices: Sequence[str], threads: int, roles: Sequence[str] = ROLES) -> dict[str, Place]:
    """Give each role a device and its share of the CPU threads, at least one.

    The last role, which fine-tunes, gets the first device and the rest of the threads.

    Example:
        >>> places = share_out(["cuda:0", "cuda:1"], 8)
        >>> [(place.device, place.threads) for place in places.values()]
        [('cuda:1', 2), ('cuda:1', 2), ('cuda:0', 4)]
    """
    share = max(1, threads // len(roles))
    others = devices[1:] or devices
    places = {role: Place(others[number % len(others)], share) for number, role in enumerate(roles[:-1])}
    places[roles[-1]] = Place(devices[0], max(share, threads - share * (len(roles) - 1)))
    return places


class ParallelRunner:
    """Runs the jobs of each role in a fresh interpreter of its own; a context manager that ends them.

    A script that uses it needs `if __name__ == "__main__":`, as every use of processes does.
    """

    def __init__(self, work: Path, places: dict[str, Place]) -> None:
        self._work, self._places = work, places
        # A process that is forked from this one could not use CUDA. A server can fork ones that have loaded the modules
        # and touched no device, in a fraction of the time that each needs to load them.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([__name__])
        self._processes = {
            role: ProcessPoolExecutor(1, mp_context=context, initializer=_follow_parent) for role in places
        }

    def __enter__(self) -> ParallelRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes.values():
            process.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """Run jobs at the same time and wait for all; the error of the first that failed is raised."""
        futures = [self._processes[job.role].submit(_run_job, self._work, self._places[job.role], job) for job in jobs]
        records: dict[str, dict[str, Any]] = {}
        for job, future in zip(jobs, futures, strict=True):
            try:
                records[job.role] = future.result()
            except BrokenProcessPool as error:
                raise CalibfuseError(
                    f"The process of role {job.role!r} ended in step {job.step} without a message, for instance "
                    "because the machine ran out of memory; resume goes on from the complete products."
                ) from error
            except CalibfuseError as error:
                raise type(error)(f"Role {job.role!r} failed in step {job.step}: {error}") from error
        return records


def _run_job(work: Path, place: Place, job: Job) -> dict[str, Any]:
    torch.set_num_threads(place.threads)
    return _runner(work, place.device).make(job)


@functools.cache
def _runner(work: Path, device: str) -> RoleRunner:
    """Keeps tokenizer and oracle from job to job."""
    return RoleRunner(work, device)


def _follow_parent() -> None:
    """End with the process that started this one: a killed run must not go on writing next to the resumed one."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def find_devices(device: str | None) -> list[str]:
    """The devices that a run may use: the given ones, else all GPUs, else MPS, else the CPU."""
    if device is not None:
        return [str(choose_device(each.strip())) for each in device.split(",")]
    if torch.cuda.is_available():
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [str(choose_device(None))]
