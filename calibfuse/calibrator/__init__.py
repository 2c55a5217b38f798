"""The calibrator: composer, body, heads, and its binding to a target vocabulary."""

from calibfuse.calibrator.binding import BoundCalibrator
from calibfuse.calibrator.calibrator import Calibrator, load_universal
from calibfuse.calibrator.model import CalibratorConfig

__all__ = ["BoundCalibrator", "Calibrator", "CalibratorConfig", "load_universal"]
