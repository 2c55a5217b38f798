"""What a calibrator is, what of a vocabulary it covers, and what it did to a text, token by token."""

from calibfuse.inspection.coverage import VocabularyReport, describe_calibrator, report_vocabulary
from calibfuse.inspection.pages import trace_page
from calibfuse.inspection.spelling import mask_in_context, mask_pieces
from calibfuse.inspection.trace import CandidateTrace, StepTrace, trace_generation

__all__ = [
    "CandidateTrace",
    "StepTrace",
    "VocabularyReport",
    "describe_calibrator",
    "mask_in_context",
    "mask_pieces",
    "report_vocabulary",
    "trace_generation",
    "trace_page",
]
