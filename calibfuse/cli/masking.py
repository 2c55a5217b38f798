"""The `--mask` of the commands: a function that masks offensive words, or one that does nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibfuse.scorers import ToxicityScorer

Mask = Callable[[str], str]


def masking(wanted: bool, scorer: ToxicityScorer | None = None) -> Mask:
    """What turns a text into its form for the screen."""
    if not wanted:
        return str
    from calibfuse.scorers import LinearScorer, load_scorer, mask_offensive

    linear = scorer if isinstance(scorer, LinearScorer) else load_scorer("bundled")
    assert isinstance(linear, LinearScorer)
    return lru_cache(maxsize=10_000)(lambda text: mask_offensive(text, linear))
