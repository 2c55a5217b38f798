"""The jobs of a stage at the same time: one process for each role, with a device and CPU threads of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from calibfuse.errors import CalibfuseError
from calibfuse.finetune.roles import RoleRunner
from calibfuse.finetune.schedule import AUXILIARY, MODEL, ROLES, SAMPLES, Job
from calibfuse.finetune.settings import FinetuneConfig
from calibfuse.generation.language_model import choose_device


def find_devices(device: str | None) -> list[str]:
    """The devices that a run may use: the given ones, else all GPUs, else MPS, else the CPU."""
    if device is not None:
        return [str(choose_device(each.strip())) for each in device.split(",")]
    if torch.cuda.is_available():
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [str(choose_device(None))]


def share_out(devices: Sequence[str]) -> dict[str, str]:
    """The device of each role; the first one goes to the role that fine-tunes."""
    others = devices[1:] or devices
    return {SAMPLES: others[0], AUXILIARY: others[1 % len(others)], MODEL: devices[0]}


@contextlib.contextmanager
def in_processes(
    config: FinetuneConfig, prompts: Sequence[str], work: Path, devices: Sequence[str]
) -> Iterator[Callable[[Sequence[Job]], dict[str, dict[str, Any]]]]:
    """A function like `RoleRunner.run` that runs its jobs at the same time; their processes end with the block.

    A script that uses it needs `if __name__ == "__main__":`, as every use of processes does.
    """
    # A process that is forked from this one could not use CUDA; a server can fork ones that have loaded the modules.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    threads = max(1, torch.get_num_threads() // len(ROLES))
    runners = {role: RoleRunner(config, prompts, work, device) for role, device in share_out(devices).items()}
    with contextlib.ExitStack() as stack:
        processes = {
            role: stack.enter_context(
                ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(threads,))
            )
            for role in ROLES
        }

        def run(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
            futures = [(job, processes[job.role].submit(runners[job.role].make, job)) for job in jobs]
            records: dict[str, dict[str, Any]] = {}
            for job, future in futures:
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

        yield run


def _begin(threads: int) -> None:
    """Take a share of the threads, and end with the process that started this one: a killed run writes no more."""
    torch.set_num_threads(threads)

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
