"""Minimise a smooth function of many numbers: L-BFGS with a backtracking line search, in numpy.

What it is for: training the linear scorer. torch's optimiser of the same name skips updates below a fixed curvature,
which stalls on a mean loss over half a million weights; this one has no absolute scale.
Source: Nocedal and Wright, Numerical Optimization (2006), algorithms 7.4 and 7.5.
Left out: bounds, a strong Wolfe search (updates without positive curvature are skipped instead).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["minimise"]

_SUFFICIENT_DECREASE = 1e-4
_SMALLEST_STEP = 1e-8

Function = Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]]


def _direction(
    gradient: NDArray[np.float64], history: deque[tuple[NDArray[np.float64], NDArray[np.float64], float]]
) -> NDArray[np.float64]:
    """Return minus the approximate inverse Hessian times the gradient (two-loop recursion)."""
    direction = -gradient
    factors = []
    for step, change, curvature in reversed(history):
        factor = float(step @ direction) / curvature
        direction = direction - factor * change
        factors.append(factor)
    step, change, curvature = history[-1]
    direction = direction * (curvature / float(change @ change))
    for (step, change, curvature), factor in zip(history, reversed(factors), strict=True):
        direction = direction + (factor - float(change @ direction) / curvature) * step
    return direction


def minimise(
    function: Function,
    start: NDArray[np.float64],
    *,
    iterations: int,
    memory: int = 12,
    relative_tolerance: float = 1e-6,
    progress: Callable[[float], None] = lambda value: None,
) -> NDArray[np.float64]:
    """Minimise a function.

    Args:
        function: returns its value and its gradient, (n,), at a point, (n,).
        start: (n,), not changed.
        iterations: steps at most.
        memory: how many past steps shape the next one.
        relative_tolerance: stop when three steps in a row lower the value by less than this share of it.
        progress: called with the value after each step.

    Returns:
        (n,) the best point found.

    Example:
        >>> bowl = lambda x: (float((x - 3) @ (x - 3)), 2 * (x - 3))
        >>> minimise(bowl, np.zeros(2), iterations=10).round(3).tolist()
        [3.0, 3.0]
    """
    point = start.astype(np.float64)
    value, gradient = function(point)
    history: deque[tuple[NDArray[np.float64], NDArray[np.float64], float]] = deque(maxlen=memory)
    calm = 0
    for _ in range(iterations):
        norm = float(np.linalg.norm(gradient))
        if norm == 0.0:
            break
        direction = _direction(gradient, history) if history else -gradient / norm
        slope = float(gradient @ direction)
        length = 1.0
        while True:
            candidate = point + length * direction
            new_value, new_gradient = function(candidate)
            if new_value <= value + _SUFFICIENT_DECREASE * length * slope:
                break
            # the minimum of the parabola through value, slope and new value, kept between a tenth and a half
            bend = 2.0 * (new_value - value - length * slope)
            length *= min(0.5, max(0.1, -slope * length / bend)) if bend > 0 else 0.5
            if length < _SMALLEST_STEP:
                return point
        step, change = candidate - point, new_gradient - gradient
        curvature = float(step @ change)
        if curvature > 1e-10 * float(np.linalg.norm(step)) * float(np.linalg.norm(change)):
            history.append((step, change, curvature))
        calm = calm + 1 if value - new_value < relative_tolerance * abs(value) else 0
        point, value, gradient = candidate, new_value, new_gradient
        progress(value)
        if calm == 3:
            break
    return point
