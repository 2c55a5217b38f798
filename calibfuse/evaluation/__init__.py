"""The offline evaluation kit: prompts, sampling, metrics with intervals, neutrality, baselines, reports.

It takes a target model and factories of logits processors, and knows nothing of what the processors do: calibfuse's own
fusion and every baseline are measured by the same code, on the same prompts, with the same draws.
"""

from calibfuse.evaluation.likelihood import LanguageModel
from calibfuse.evaluation.methods import PLAIN, Method
from calibfuse.evaluation.metrics import METRICS, Estimate
from calibfuse.evaluation.neutrality import Neutrality, measure_neutrality
from calibfuse.evaluation.prompts import Prompt, load_prompts
from calibfuse.evaluation.running import Evaluation, MethodResult, evaluate
from calibfuse.evaluation.sampling import SamplingConfig, sample_continuations
from calibfuse.evaluation.tables import to_data, to_markdown

__all__ = [
    "METRICS",
    "PLAIN",
    "Estimate",
    "Evaluation",
    "LanguageModel",
    "Method",
    "MethodResult",
    "Neutrality",
    "Prompt",
    "SamplingConfig",
    "evaluate",
    "load_prompts",
    "measure_neutrality",
    "sample_continuations",
    "to_data",
    "to_markdown",
]
