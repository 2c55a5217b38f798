"""The loop that everything here trains in: schedule, optimiser, checkpoints with exact resume, signals, progress.

Own loop rather than transformers' Trainer: it needs no further package on one process, and its state is a few arrays
that can be written without pickle. What a step computes is the subclass's.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import signal
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from calibfuse import hub
from calibfuse.errors import CheckpointError, InputError
from calibfuse.training.work_folder import new_folder

logger = logging.getLogger(__name__)

STATE_FORMAT = 2
_SMOOTHING = 0.98
_MAX_GRADIENT_NORM = 1.0  # longer gradients are shortened to this


class TrainingLoop(ABC):
    """Takes steps until all are done, a signal comes, or the loss is no number.

    Subclasses compute the losses of a step and say where in their data they are. A step must be a function of that
    position, the step's number and the weights, so that a resumed run ends with the weights of an uninterrupted one.

    Args:
        parameters: what a checkpoint holds, by name; those that require gradients are trained.
        optimizer: over those.
        steps: in all.
        rate: from the number of a step, from 0, to its learning rate.
        folder: gets `checkpoint/`; None: nothing is kept, and Ctrl-C stops at once.
        identity: what a checkpoint must share with this run, by what it is called in messages; ready for JSON.
        first_step: where the count begins, in a run that goes on in memory.
    """

    is_main = True
    """Whether this process writes files and shows progress."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        rate: Callable[[int], float],
        folder: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        save_every: int = 500,
        label: str = "training",
        first_step: int = 0,
        show_progress: bool = True,
    ) -> None:
        self.parameters, self.optimizer = dict(parameters), optimizer
        self.steps, self.rate, self.save_every = steps, rate, save_every
        self.folder = folder
        self.identity = json.loads(json.dumps(identity or {}))
        self.label, self.show_progress = label, show_progress
        self.step = first_step
        self.tokens, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []

    @abstractmethod
    def losses(self) -> dict[str, float]:
        """Compute the losses of step `self.step` and add their gradients; the figures of its row in the history."""

    def position(self) -> Any:  # noqa: ANN401
        """Where in the data the run is, ready for JSON."""
        return None

    def set_position(self, position: Any) -> None:  # noqa: ANN401, B027
        """Inverse of `position`."""

    def agree(self, told: bool) -> bool:
        """Whether to stop, when this process was told so or not; several processes ask each other."""
        return told

    def take_step(self) -> dict[str, float]:
        """Losses, clipped gradients, optimiser; gives the row of the history."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        row = {"step": self.step + 1, **self.losses()}
        for name, value in row.items():
            if not math.isfinite(value):
                kept = f", and go on from the checkpoint in {self.folder}" if self.checkpoint else ""
                raise InputError(
                    f"The {name.replace('_', ' ')} became {value} at optimiser step {self.step + 1}: training has "
                    f"diverged. Choose a lower learning rate{kept}."
                )
        trained = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, _MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.history.append(row)
        return row

    def train(self, validate: Callable[[], str] | None = None, *, validate_every: int = 0) -> bool:
        """Take the remaining steps; False when Ctrl-C (or SIGTERM) stopped the run after a checkpoint.

        `validate` measures, and gives a line to log, every `validate_every` steps (0: never).
        """
        if self.step >= self.steps and self.checkpoint:
            return True
        shown = self.show_progress and self.is_main
        bar = tqdm(total=self.steps, initial=self.step, desc=self.label, unit="step", leave=False, disable=not shown)
        signals = stop_on_signal() if self.folder else contextlib.nullcontext(lambda: False)
        with signals as told, bar:
            began = time.monotonic() - self.seconds
            smooth: dict[str, float] = {}
            while self.step < self.steps:
                row = self.take_step()
                self.seconds = time.monotonic() - began
                for name, value in list(row.items())[1:]:
                    smooth[name] = _SMOOTHING * smooth.get(name, value) + (1 - _SMOOTHING) * value
                figures = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in smooth.items()]
                figures += [f"{self.tokens / self.seconds:,.0f} tokens/s"] if self.tokens else []
                bar.set_postfix_str(", ".join(figures), refresh=False)
                bar.update()
                if self.agree(told()):
                    self.save_checkpoint()
                    return False
                if validate and validate_every and self.step % validate_every == 0 and self.is_main:
                    logger.info("%s, step %d: %s", self.label, self.step, validate())
                if self.step % self.save_every == 0:
                    self.save_checkpoint()
        if self.step % self.save_every:
            self.save_checkpoint()
        return True

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the checkpoint, if there is one."""
        return find_checkpoint(self.folder) if self.folder else None

    def save_checkpoint(self) -> None:
        """Write weights, optimiser state and position; the former checkpoint is replaced only by a complete one."""
        if self.folder is None or not self.is_main:
            return
        state = {
            "format": STATE_FORMAT,
            "identity": self.identity,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "position": self.position(),
            "history": self.history,
        }
        with new_folder(self.folder / "checkpoint", f"the checkpoint of step {self.step}") as fresh:
            hub.write_tensors(fresh / "model.safetensors", self.parameters)
            hub.write_tensors(fresh / "optimizer.safetensors", optimizer_tensors(self.optimizer, self.parameters))
            (fresh / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def resume(self) -> int:
        """Load the checkpoint in the folder and go on from there exactly; gives the step."""
        place = self.checkpoint
        if place is None:
            raise CheckpointError(f"There is no checkpoint yet in {self.folder}: run the same without resume.")
        state = hub.read_json(place / "state.json", "training state")
        found = state.get("identity", {})
        different = [what for what, value in self.identity.items() if found.get(what) != value]
        if state.get("format") != STATE_FORMAT or different:
            raise CheckpointError(
                f"The checkpoint in {self.folder} was made with another {different[0] if different else 'version'}; "
                "resume with the same inputs, or choose another output folder."
            )
        expected = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        weights = hub.read_tensors(place / "model.safetensors", expected=expected)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
        load_optimizer(self.optimizer, self.parameters, hub.read_tensors(place / "optimizer.safetensors"))
        self.step, self.tokens, self.seconds = int(state["step"]), int(state["tokens"]), float(state["seconds"])
        self.set_position(state["position"])
        self.history = list(state["history"])
        return self.step


def endless_batches(
    rows: NDArray[np.int64], size: int, rng_of: Callable[[int], np.random.Generator]
) -> Iterator[NDArray[np.int64]]:
    """Batches of row numbers without end, each epoch (from 0) in an order of its own."""
    left = rows[:0]
    for epoch in itertools.count():
        left = np.concatenate([left, rng_of(epoch).permutation(rows)])
        while len(left) >= size:
            yield left[:size]
            left = left[size:]


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a loop in its folder, if there is one."""
    # checkpoint.old: killed between the two renames of `new_folder`
    places = (folder / name for name in ("checkpoint", "checkpoint.old"))
    return next((place for place in places if (place / "state.json").is_file()), None)


def learning_rate(step: int, steps: int, *, peak: float, warmup: float, decay: float | None = None) -> float:
    """The rate of a step: rises over the first share `warmup` of the steps, stays, falls to 0 over the last `decay`.

    Without `decay` it falls from the end of the rise.

    Example:
        >>> [learning_rate(step, 4, peak=1.0, warmup=0.5, decay=0.5) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    warmup_steps = max(1.0, warmup * steps)
    rising = (step + 1) / warmup_steps
    falling = (steps - step) / max(1.0, steps - warmup_steps if decay is None else decay * steps)
    return peak * max(0.0, min(1.0, rising, falling))


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    *,
    rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.98),
    undecayed: Collection[str] = (),
    fused: bool = False,
) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients; matrices decay, vectors and those in `undecayed` do not.

    The fused kernel, where there is one (CPU and CUDA), is several times faster on large tables.
    """
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    decays = {name: parameter.ndim >= 2 and name not in undecayed for name, parameter in trained.items()}
    groups = [
        {"params": [trained[name] for name in trained if decays[name]], "weight_decay": weight_decay},
        {"params": [trained[name] for name in trained if not decays[name]], "weight_decay": 0.0},
    ]
    fused = fused and all(parameter.device.type in ("cpu", "cuda") for parameter in trained.values())
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, betas=betas, fused=fused)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's state under names of parameters, for a file."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        f"{names[id(parameter)]}|{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`; tensors of other parameters are an InputError."""
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("|")
        if name not in parameters:
            raise InputError(f"The optimiser's state belongs to another model: it has {name}, which this one lacks.")
        parameter = parameters[name]
        if key == "step":
            optimizer.state[parameter][key] = tensor.to(parameter.device if optimizer.defaults.get("fused") else "cpu")
            continue
        # The fused kernel walks through memory: moments must lie there as the parameter does, which may be by columns.
        moment = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
        optimizer.state[parameter][key] = moment.copy_(tensor)


@contextlib.contextmanager
def mixed_precision(device: torch.device, precision: str) -> Iterator[None]:
    """`torch.autocast` to bfloat16 where precision is "bf16"; weights stay in float32.

    Without its notice that a norm with weights in float32 has no fused kernel.
    """
    with warnings.catch_warnings(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM are noted, for the caller to finish its step and save; a second one stops at once."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    former: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not the main thread: no signals there
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
