"""Toxicity scorers behind one small protocol: texts in, probabilities out, failures as errors.

Left out: scorers behind web services. They change or close, and with them every figure they gave.
"""

from __future__ import annotations

from calibfuse.scorers.checks import ToxicityScorer, check_scores
from calibfuse.scorers.linear import LinearScorer, WordScore
from calibfuse.scorers.loading import load_scorer
from calibfuse.scorers.masking import mask_offensive

__all__ = ["LinearScorer", "ToxicityScorer", "WordScore", "check_scores", "load_scorer", "mask_offensive"]
