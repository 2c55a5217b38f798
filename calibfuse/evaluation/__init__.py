"""The offline evaluation kit: prompts, sampling, metrics with intervals, neutrality, baselines, reports.

It takes a target model and factories of logits processors, and knows nothing of what the processors do: calibfuse's own
fusion and every baseline are measured by the same code, on the same prompts, with the same draws.
"""

from calibfuse.evaluation.bootstrap import Estimate
from calibfuse.evaluation.budget import BudgetComparison, compare_within_budget, pick_alpha
from calibfuse.evaluation.evaluate import Evaluation, MethodResult, evaluate
from calibfuse.evaluation.given_text.holistic_bias import HolisticBias, load_holistic_bias, measure_holistic_bias
from calibfuse.evaluation.given_text.neutrality import measure_neutrality
from calibfuse.evaluation.given_text.reading import GuidedReader
from calibfuse.evaluation.given_text.suites import Suite, load_suite, measure_suite
from calibfuse.evaluation.given_text.utility import Utility, load_utility, measure_utility
from calibfuse.evaluation.metrics import METRICS
from calibfuse.evaluation.prompts import Prompt, load_prompts
from calibfuse.evaluation.report import to_data, to_markdown
from calibfuse.evaluation.sampling import (
    PLAIN,
    PROTOCOLS,
    EvaluationProtocol,
    Method,
    SamplingConfig,
    sample_continuations,
)
from calibfuse.generation.language_model import LanguageModel

__all__ = [
    "METRICS",
    "PLAIN",
    "PROTOCOLS",
    "BudgetComparison",
    "Estimate",
    "Evaluation",
    "EvaluationProtocol",
    "GuidedReader",
    "HolisticBias",
    "LanguageModel",
    "Method",
    "MethodResult",
    "Prompt",
    "SamplingConfig",
    "Suite",
    "Utility",
    "compare_within_budget",
    "evaluate",
    "load_holistic_bias",
    "load_prompts",
    "load_suite",
    "load_utility",
    "measure_holistic_bias",
    "measure_neutrality",
    "measure_suite",
    "measure_utility",
    "pick_alpha",
    "sample_continuations",
    "to_data",
    "to_markdown",
]
