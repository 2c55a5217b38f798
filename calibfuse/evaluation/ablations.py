"""A calibrator's two parts alone, as methods of a comparison: the table of words, and the language-model heads."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from calibfuse.calibrator import Calibrator
from calibfuse.errors import MissingHeadError
from calibfuse.guide import CALIBRATOR_HEAD, REFERENCE_HEAD
from calibfuse.loading import PretrainedCalibrator


def words_alone(calibrator: PretrainedCalibrator) -> Calibrator:
    """A copy whose heads say the same, so that only the table of words moves anything in mode contrast.

    MissingHeadError: the calibrator is not a universal one, has no words, or lacks one of the heads.
    """
    copied = _copy(calibrator)
    config = copied.config
    if not {CALIBRATOR_HEAD, REFERENCE_HEAD} <= {*config.heads}:
        raise MissingHeadError(f"Words alone need the heads calibrator and reference, got {', '.join(config.heads)}.")
    copied.heads[CALIBRATOR_HEAD].load_state_dict(copied.heads[REFERENCE_HEAD].state_dict())
    own, other = (config.token_width + config.heads.index(name) for name in (CALIBRATOR_HEAD, REFERENCE_HEAD))
    with torch.no_grad():
        copied.composer.table[:, own] = copied.composer.table[:, other]
    return copied


def heads_alone(calibrator: PretrainedCalibrator) -> Calibrator:
    """A copy without the table of words; MissingHeadError where there is none."""
    return _copy(calibrator, words={})


def _copy(calibrator: PretrainedCalibrator, **changes: Any) -> Calibrator:  # noqa: ANN401
    if not isinstance(calibrator, Calibrator):
        raise MissingHeadError("Only a universal calibrator has a table of words beside its heads.")
    if not calibrator.config.words:
        raise MissingHeadError("The calibrator has no table of words, so no part of it stands alone.")
    copied = copy.deepcopy(calibrator)
    copied.config = replace(calibrator.config, **changes)
    return copied
