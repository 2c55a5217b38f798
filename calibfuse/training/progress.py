"""What a long run tells its user: where it writes, how to resume it, and the curve of its losses as a picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from calibfuse.errors import CheckpointError
from calibfuse.training.config import TrainingConfig
from calibfuse.training.loop import find_checkpoint

logger = logging.getLogger(__name__)

_SMOOTHED_OVER = 40  # a curve is the mean of so many parts of the run


def open_output(output: Path, folders: Sequence[Path], *, resume: bool) -> None:
    """Refuse to begin anew where something is, and to resume where nothing is.

    Args:
        output: where the result goes.
        folders: of the loops' checkpoints.
        resume: whether the run is to go on.
    """
    begun = any(find_checkpoint(folder) for folder in folders)
    if resume and not begun:
        raise CheckpointError(f"There is no checkpoint yet in {output}: run it without resume.")
    if not resume and begun:
        raise CheckpointError(
            f"{output} holds the checkpoint of an earlier run: go on with resume (and more steps if it was finished), "
            "or choose another output folder."
        )
    if not resume and (output / "config.json").exists():
        raise CheckpointError(f"{output} holds a finished calibrator: choose another output folder, or remove it.")


def announce(output: Path, training: TrainingConfig) -> None:
    """Log where the run writes, and what a stop keeps."""
    logger.info(
        "Training %s steps; the result goes to %s, a checkpoint to %s every %d steps. Ctrl-C finishes the step and "
        "writes one, and resume goes on from it.",
        f"{training.steps:,}",
        output,
        output / "work",
        training.save_every,
    )


def draw_curves(path: Path, history: Sequence[Mapping[str, float]], panels: Mapping[str, Sequence[str]]) -> None:
    """Draw figures of a run over its steps, one panel below the other, as SVG.

    Args:
        path: of the file.
        history: rows of a loop.
        panels: label of the vertical axis -> names of figures.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("No picture of the losses: it needs matplotlib (pip install 'calibfuse[eval]').")
        return
    if not history:
        return
    steps = np.array([row["step"] for row in history])
    parts = np.array_split(np.arange(len(steps)), min(len(steps), _SMOOTHED_OVER))
    figure = Figure(figsize=(7.6, 2.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (label, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            values = np.array([row[name] for row in history])
            (line,) = axis.plot(steps, values, linewidth=0.6, alpha=0.3)
            smooth = [(steps[part].mean(), values[part].mean()) for part in parts]
            axis.plot(*zip(*smooth, strict=True), color=line.get_color(), label=name.replace("_", " "))
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    axes[-1].set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg")
    logger.info("Curves of the training: %s", path)
