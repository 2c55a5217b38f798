"""The calibrator: composer, body, heads, and its binding to a target vocabulary."""

from calibfuse.calibrator.binding import BoundCalibrator
from calibfuse.calibrator.calibrator import Calibrator, load_universal
from calibfuse.calibrator.model import CalibratorConfig
from calibfuse.guide import Guide, GuideSession, NextTokenScores

NextTokens = NextTokenScores  # its former name

__all__ = [
    "BoundCalibrator",
    "Calibrator",
    "CalibratorConfig",
    "Guide",
    "GuideSession",
    "NextTokenScores",
    "NextTokens",
    "load_universal",
]
