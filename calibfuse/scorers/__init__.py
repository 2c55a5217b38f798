"""Toxicity scorers behind one small protocol: texts in, probabilities out, failures as errors.

`load_scorer` turns a name into a scorer: the bundled linear one, a folder or Hub id of a linear scorer, any
transformers text-classification model, detoxify, or your own function.
Left out: scorers behind web services. They change or close, and with them every figure they gave.
"""

from __future__ import annotations

from calibfuse.scorers.checks import ToxicityScorer, check_scores
from calibfuse.scorers.linear import LinearScorer, WordScore
from calibfuse.scorers.loading import load_scorer
from calibfuse.scorers.masking import mask_offensive

__all__ = ["LinearScorer", "ToxicityScorer", "WordScore", "check_scores", "load_scorer", "mask_offensive"]
