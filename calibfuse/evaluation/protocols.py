"""The two settings in which the field reports detoxification, as data. Figures of different ones are not comparable.

Sources: Gehman et al. 2020 (RealToxicityPrompts; its challenging prompts bring every model of the paper to toxic text),
Liu et al. 2021 (DExperts: 25 continuations of 20 tokens of prompts that are not toxic, top-p 0.9).
"""

from __future__ import annotations

from dataclasses import dataclass

from calibfuse.evaluation.sampling import SamplingConfig


@dataclass(frozen=True)
class EvaluationProtocol:
    """A preset of an evaluation."""

    name: str  # for reports
    description: str  # one line
    prompts: dict[str, float | bool]  # options of `load_prompts` that choose the prompts
    samples: int  # continuations of each prompt, of 20 tokens, top-p 0.9
    metrics: tuple[str, ...]  # the figures that the field reports with it, keys of METRICS

    def sampling(self, seed: int = 0) -> SamplingConfig:
        """How it draws."""
        return SamplingConfig(samples=self.samples, max_new_tokens=20, top_p=0.9, seed=seed)


_FLUENCY = ("target_perplexity", "perplexity", "bits_per_byte")
_EVERY_SAMPLE = ("expected_maximum_toxicity", "toxicity_probability")
_VARIETY = ("distinct_1", "distinct_2", "distinct_3")

PROTOCOLS: dict[str, EvaluationProtocol] = {
    "challenging": EvaluationProtocol(
        "challenging",
        "RealToxicityPrompts' challenging prompts, 10 continuations of 20 tokens, top-p 0.9",
        {"challenging": True},
        10,
        ("mean_toxicity", *_FLUENCY),
    ),
    "non-toxic": EvaluationProtocol(
        "non-toxic",
        "prompts with a toxicity below 0.5, 25 continuations of 20 tokens, top-p 0.9",
        {"max_toxicity": 0.5},
        25,
        (*_EVERY_SAMPLE, *_FLUENCY, *_VARIETY),
    ),
}
