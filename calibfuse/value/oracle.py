"""Oracle: whether a whole text satisfies the constraint, as a number C in [0, 1]."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from calibfuse.errors import InputError, check_ranges
from calibfuse.scorers import ToxicityScorer, load_scorer
from calibfuse.scorers.adapters import FunctionScorer
from calibfuse.scorers.loading import import_object

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class Oracle(Protocol):
    """Says how well texts satisfy the constraint."""

    @property
    def name(self) -> str:
        """What reports call this oracle."""
        ...

    def satisfaction(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Label texts: (len(texts),), float64, C in [0, 1]; 1 satisfies the constraint, nan could not be labelled."""
        ...


class ScorerOracle:
    """A toxicity scorer as an oracle; a scorer that fails on any text is an error.

    Args:
        scorer: gives each text a toxicity in [0, 1].
        power: C = 1 - toxicity ** power; above 1 forgives mild toxicity, below 1 does not.
        threshold: C = 1 where the toxicity is below, else 0; None: soft labels.
    """

    def __init__(self, scorer: ToxicityScorer, *, power: float = 1.0, threshold: float | None = None) -> None:
        self.scorer, self.power, self.threshold = scorer, power, threshold
        check_ranges(self, power="(0, inf)", threshold="(0, 1]")
        rule = f"1 - toxicity^{power:g}" if threshold is None else f"toxicity < {threshold:g}"
        self.name = f"{scorer.name} ({rule})"

    def satisfaction(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """See `Oracle.satisfaction`."""
        toxicity = np.asarray(self.scorer.score(texts), dtype=np.float64)
        if self.threshold is not None:
            return (toxicity < self.threshold).astype(np.float64)
        labels: NDArray[np.float64] = 1.0 - toxicity**self.power
        return labels


class FunctionOracle:
    """A user's function as an oracle: list of texts -> one number in [0, 1] for each, nan where it cannot tell."""

    def __init__(self, function: Callable[[list[str]], Any], name: str) -> None:
        self.name = name
        self.satisfaction = FunctionScorer(function, name, may_be_nan=True).score


def load_oracle(spec: str, *, power: float = 1.0, threshold: float | None = None, device: str | None = None) -> Oracle:
    """Load an oracle.

    Args:
        spec: "module:function", a function list[str] -> numbers in [0, 1], taken as C itself; or whatever
            `calibfuse.scorers.load_scorer` takes ("bundled", a folder or Hub id of a scorer or a transformers text
            classifier), whose toxicity becomes C.
        power: of the toxicity; see `ScorerOracle`.
        threshold: of the toxicity, likewise.
        device: where a transformers classifier runs; None: the CPU.

    Raises:
        InputError: a module or function that is not there, power or threshold out of range, or given for a function.
        CheckpointError: a folder or Hub id that holds no scorer.
        ScorerError: `spec` names no scorer.

    Example:
        >>> load_oracle("bundled", threshold=0.5).satisfaction(["What a lovely day."]).tolist()
        [1.0]
    """
    if not _FUNCTION.fullmatch(spec) or Path(spec).expanduser().exists():
        return ScorerOracle(load_scorer(spec, device=device), power=power, threshold=threshold)
    if power != 1.0 or threshold is not None:
        raise InputError(
            f"power and threshold turn a toxicity into C, but the oracle {spec!r} is a function that gives C "
            "itself; leave them out."
        )
    function = import_object(spec, "oracle")
    if not callable(function):
        raise InputError(
            f"The oracle {spec!r} must be a function from texts to numbers in [0, 1], but it is a "
            f"{type(function).__name__}."
        )
    return FunctionOracle(function, spec)
