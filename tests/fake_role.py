"""Stands in for `calibfuse.finetune.worker` in tests of the processes: same protocol, no models, quick to start.

Arguments: a folder for signs of life, role, device, threads. The step of a job says what to do.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

folder, role, device, threads = sys.argv[1:]
lines: list[str] = []
ready = threading.Event()


def reply(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def listen() -> None:
    for line in sys.stdin:
        lines.append(line)
        ready.set()
    os._exit(1)


threading.Thread(target=listen, daemon=True).start()
if device == "broken":
    reply(failed={"kind": "CheckpointError", "message": "no model here"})
    sys.exit(1)
(Path(folder) / f"{role}.pid").write_text(str(os.getpid()))
reply(ready=role)
while True:
    ready.wait()
    ready.clear()
    job = json.loads(lines.pop(0))
    began = time.time()
    if job["step"] == 1:  # wait for the other roles: only works if all run at the same time
        (Path(folder) / f"{role}.here").touch()
        while len(list(Path(folder).glob("*.here"))) < 3:
            time.sleep(0.01)
        reply(done={"role": role, "threads": threads, "began": began})
    elif job["step"] == 2 and role == "auxiliary":
        reply(failed={"kind": "ScorerError", "message": "the oracle returned nan"})
        sys.exit(1)
    elif job["step"] == 3 and role == "auxiliary":
        os._exit(7)
    elif job["step"] == 4 and role == "auxiliary":
        reply(failed={"kind": "KeyError", "message": "'speech'"})
        sys.exit(1)
    else:
        time.sleep(60)
