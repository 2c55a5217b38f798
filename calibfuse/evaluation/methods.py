"""A method under comparison: a name, and a factory of logits processors. Nothing is known of what they do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import LogitsProcessor

from calibfuse.errors import InputError

ProcessorFactory = Callable[[], Sequence[LogitsProcessor]]


@dataclass(frozen=True, eq=False)
class Method:
    """One way of decoding; InputError where its key cannot name a file."""

    key: str  # unique, of letters, digits, dots, dashes and underscores; names the method's files
    title: str  # in tables
    make_processors: ProcessorFactory  # called once per batch; the processors act before truncation and draw
    family: str = ""  # methods of one family are points of one curve
    alpha: float | None = None  # the strength on that curve; None: no curve
    # JSON values that determine what the method does; a run is resumed only with equal ones.
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_default: bool = False  # whether this is the strength of the paper, or the one that the calibrator recommends

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.key):
            raise InputError(
                f"The key of a method must be letters, digits, dots, dashes, underscores; got {self.key!r}."
            )

    def identity(self) -> dict[str, Any]:
        """What tells it from every other method, as JSON values."""
        return {"key": self.key, **self.settings}


PLAIN = Method("plain", "plain", list, family="plain", alpha=0.0)
"""The target alone. Truncation happens at the draw, equally for all methods, so it is also the control of alpha 0."""
