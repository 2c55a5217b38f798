"""The process of one role in the parallel schedule: `python -m calibfuse.finetune.worker WORK ROLE DEVICE THREADS`.

Jobs arrive on standard input, one JSON object a line, and results leave on standard output likewise; what anything else
prints goes to standard error. When standard input ends, the one that started this process is gone, and so is it: a
killed run leaves no role behind that goes on writing. Ctrl-C is left to the one that started it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, BinaryIO


def main(arguments: list[str]) -> int:
    """Do jobs until standard input ends.

    Args:
        arguments: folder of products, role, device, number of CPU threads.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work, role, device, threads = arguments
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    try:
        import torch
        from transformers.utils import logging

        from calibfuse.finetune.roles import RoleRunner
        from calibfuse.finetune.schedule import Job

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        torch.set_num_threads(int(threads))
        runner = RoleRunner(Path(work), device)
        _reply(replies, {"ready": role})
        while True:
            values = json.loads(jobs.get())
            _reply(replies, {"done": runner.run(Job(values["role"], values["step"], values["reads"]))})
    except Exception as error:
        _reply(replies, {"failed": {"kind": type(error).__name__, "message": str(error) or type(error).__name__}})
        from calibfuse.errors import CalibfuseError

        if not isinstance(error, CalibfuseError):  # a defect, or an oracle's own error: the place matters
            traceback.print_exc()
        return 1


def _listen(jobs: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    os._exit(1)  # at once, in the middle of whatever it is


def _reply(stream: BinaryIO, values: dict[str, Any]) -> None:
    stream.write(json.dumps(values).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
