"""A calibrator's two parts alone: the table of words, and the language-model heads. Both are methods of a comparison.

What the fusion does comes from both; how much from each differs between targets, so the kit measures it.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from calibfuse.calibrator import Calibrator
from calibfuse.errors import InputError, MissingHeadError
from calibfuse.guide import CALIBRATOR_HEAD, REFERENCE_HEAD


def words_alone(calibrator: Calibrator) -> Calibrator:
    """A copy whose heads say the same, so that only the table of words moves anything in mode contrast.

    Raises:
        InputError: the calibrator has no words.
        MissingHeadError: it lacks one of the heads.
    """
    config = calibrator.config
    if not config.words:
        raise InputError("The calibrator has no table of words, so there is nothing to measure alone.")
    if not {CALIBRATOR_HEAD, REFERENCE_HEAD} <= {*config.heads}:
        raise MissingHeadError(f"Words alone need the heads calibrator and reference, got {', '.join(config.heads)}.")
    copied = _copy(calibrator)
    copied.heads[CALIBRATOR_HEAD].load_state_dict(copied.heads[REFERENCE_HEAD].state_dict())
    own, other = (config.token_width + config.heads.index(name) for name in (CALIBRATOR_HEAD, REFERENCE_HEAD))
    with torch.no_grad():
        copied.composer.table[:, own] = copied.composer.table[:, other]
    return copied


def heads_alone(calibrator: Calibrator) -> Calibrator:
    """A copy without the table of words."""
    return _copy(calibrator, words={})


def _copy(calibrator: Calibrator, **changes: Any) -> Calibrator:  # noqa: ANN401
    copied = copy.deepcopy(calibrator)
    copied.config = replace(calibrator.config, **changes)
    return copied
