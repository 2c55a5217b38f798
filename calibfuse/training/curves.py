"""The curves of a training's losses as a picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

_SMOOTHED_OVER = 40  # a curve is the mean of so many parts of the run


def draw_curves(path: Path, history: Sequence[Mapping[str, float]], panels: Mapping[str, Sequence[str]]) -> None:
    """Draw figures of a loop's history over its steps, one panel below the other, as SVG."""
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
