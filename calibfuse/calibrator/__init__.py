"""The calibrator: composer, body, heads, and its binding to a target vocabulary."""

from calibfuse.calibrator.binding import BoundCalibrator
from calibfuse.calibrator.guide import Guide, GuideSession, NextTokens
from calibfuse.calibrator.model import Calibrator, CalibratorConfig

__all__ = ["BoundCalibrator", "Calibrator", "CalibratorConfig", "Guide", "GuideSession", "NextTokens"]
