"""The calibrator: composer, body, heads, and its binding to a target vocabulary."""

from calibfuse.calibrator.binding import BoundCalibrator
from calibfuse.calibrator.model import Calibrator, CalibratorConfig
from calibfuse.guide import Guide, GuideSession, NextTokens

__all__ = ["BoundCalibrator", "Calibrator", "CalibratorConfig", "Guide", "GuideSession", "NextTokens"]
