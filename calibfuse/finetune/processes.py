"""Roles in processes of their own: started once, given one job after the other, stopped together.

Fresh interpreters (`python -m calibfuse.finetune.worker`) rather than multiprocessing: nothing is pickled, and a user's
script needs no `if __name__ == "__main__"`. What crosses is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibfuse import errors
from calibfuse.errors import CalibfuseError, InputError, reason_of
from calibfuse.finetune.schedule import ROLES, Job

_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Place:
    """Where a role runs.

    Attributes:
        device: as torch names it.
        threads: of the CPU.
    """

    device: str
    threads: int


def share_out(devices: Sequence[str], threads: int, roles: Sequence[str] = ROLES) -> dict[str, Place]:
    """Give each role a device and its share of the CPU threads.

    Args:
        devices: one or more. The last role, which fine-tunes, gets the first device and what is left over of the
            threads; the others share the rest of the devices.
        threads: in all; each role has at least one.
        roles: which.

    Returns:
        Role -> place.

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


class RoleProcesses:
    """The processes of several roles; a context manager that stops all of them.

    Args:
        work: the run's folder of products.
        places: role -> where it runs.
        command: what to start, followed by folder, role, device and threads; None: this package's worker.
    """

    def __init__(self, work: Path, places: Mapping[str, Place], *, command: Sequence[str] | None = None) -> None:
        self._replies: queue.SimpleQueue[tuple[str, dict[str, Any] | None]] = queue.SimpleQueue()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._listeners: list[threading.Thread] = []
        start = list(command or (sys.executable, "-m", "calibfuse.finetune.worker"))
        try:
            for role, place in places.items():
                self._processes[role] = self._start([*start, str(work), role, place.device, str(place.threads)], place)
                self._listeners.append(threading.Thread(target=self._listen, args=(role,), daemon=True))
                self._listeners[-1].start()
            self._gather(set(places), "ready", "start")
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> RoleProcesses:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def run(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """Run jobs at the same time, each in its role's process, and wait for all.

        Returns:
            Role -> record, as `RoleRunner.run` returns it.

        Raises:
            CalibfuseError: a role failed, of the kind and with the message of that role; the others were stopped.
        """
        try:
            for job in jobs:
                values = {"role": job.role, "step": job.step, "reads": dict(job.reads)}
                stream = self._processes[job.role].stdin
                assert stream is not None
                with contextlib.suppress(OSError):  # it has died; its listener says so
                    stream.write(json.dumps(values).encode() + b"\n")
                    stream.flush()
            return self._gather({job.role for job in jobs}, "done", f"step {jobs[0].step}")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all processes, also in the middle of a job; returns when they are gone."""
        for process in self._processes.values():
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        for process in self._processes.values():
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for listener in self._listeners:  # each has read the end of its stream by now, and closes it
            listener.join(_GRACE_SECONDS)

    def _start(self, command: list[str], place: Place) -> subprocess.Popen[bytes]:
        # what this process can import, an oracle's module for instance, the other one can too
        paths = [os.path.abspath(path) for path in sys.path]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
            "OMP_NUM_THREADS": str(place.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        # a session of its own: Ctrl-C reaches this process alone, which then ends the others in order
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )

    def _listen(self, role: str) -> None:
        stream = self._processes[role].stdout
        assert stream is not None
        with stream:
            for line in stream:
                self._replies.put((role, json.loads(line)))
        self._replies.put((role, None))

    def _gather(self, roles: set[str], key: str, when: str) -> dict[str, dict[str, Any]]:
        """Wait until each role has answered with `key`; raise on the first that fails or dies."""
        answers: dict[str, dict[str, Any]] = {}
        while roles - set(answers):
            try:
                # woken now and then, because Windows delivers Ctrl-C only between two waits
                role, reply = self._replies.get(timeout=1.0)
            except queue.Empty:
                continue
            if reply is None:
                code = self._processes[role].wait()
                raise CalibfuseError(
                    f"The process of role {role!r} ended in {when} with exit code {code} and without a message; a "
                    "negative code is a signal, -9 for instance the one that a machine without memory sends."
                )
            if "failed" in reply:
                raise _error(role, when, **reply["failed"])
            answers[role] = reply[key]
        return answers


def _error(role: str, when: str, kind: str, message: str) -> CalibfuseError:
    """The error of a role, of its own class where it is one of ours."""
    known = getattr(errors, kind, None)
    text = f"Role {role!r} failed in {when}: {message if known else f'{kind}: {message}'}"
    return known(text) if isinstance(known, type) and issubclass(known, CalibfuseError) else CalibfuseError(text)


def find_devices(device: str | None) -> list[str]:
    """The devices that a run may use: the given ones, else all GPUs, else MPS, else the CPU.

    Raises:
        InputError: torch does not know one, or it is not there.
    """
    if device is not None:
        names = [each.strip() for each in device.split(",")]
        for name in names:
            try:
                torch.zeros(1, device=name)
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                raise InputError(f"The device {name!r} cannot be used here: {reason_of(error)}.") from error
        return names
    if torch.cuda.is_available():
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["mps"] if torch.backends.mps.is_available() else ["cpu"]
