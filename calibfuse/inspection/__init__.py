"""Shows what a calibrator is, what of a vocabulary it covers, and what it did to a text, token by token.

Everything here returns frozen dataclasses; printing is the command line's, pages are made by pages.py.
"""

from calibfuse.inspection.coverage import (
    TextReport,
    VocabularyReport,
    report_text,
    report_vocabulary,
)
from calibfuse.inspection.metadata import CalibratorMetadata, describe_calibrator
from calibfuse.inspection.pages import coverage_page, text_rows, trace_page, vocabulary_rows
from calibfuse.inspection.spelling import mask_in_context, mask_pieces
from calibfuse.inspection.trace import CandidateTrace, StepTrace, trace_generation
from calibfuse.vocabulary.text_encoder import TextEncoder, text_encoder

__all__ = [
    "CalibratorMetadata",
    "CandidateTrace",
    "StepTrace",
    "TextEncoder",
    "TextReport",
    "VocabularyReport",
    "coverage_page",
    "describe_calibrator",
    "mask_in_context",
    "mask_pieces",
    "report_text",
    "report_vocabulary",
    "text_encoder",
    "text_rows",
    "trace_generation",
    "trace_page",
    "vocabulary_rows",
]
