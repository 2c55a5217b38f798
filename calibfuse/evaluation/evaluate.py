"""A whole evaluation: sample every method, measure, compare with plain decoding.

Text and scores are left in the output folder as they come, so a killed run repeats at most a batch of text or the
scoring of one method.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from calibfuse.errors import InputError
from calibfuse.evaluation.journal import Journal
from calibfuse.evaluation.likelihood import check_texts
from calibfuse.evaluation.measure_files import load_measured, save_measured
from calibfuse.evaluation.measuring import Measured, measure, select
from calibfuse.evaluation.methods import PLAIN, Method
from calibfuse.evaluation.metrics import TOXIC_FROM, Estimate, resample
from calibfuse.evaluation.neutral_text import BENIGN_TEXTS
from calibfuse.evaluation.neutrality import Neutrality, measure_neutrality
from calibfuse.evaluation.opinions import Opinion, OpinionFigures, compare_opinions, resample_opinions
from calibfuse.evaluation.prompts import Prompt
from calibfuse.evaluation.sampling import SamplingConfig, sample_continuations
from calibfuse.evaluation.speed import Speed, measure_speed
from calibfuse.evaluation.suites import Suite, SuiteResult, measure_suite
from calibfuse.generation.language_model import LanguageModel
from calibfuse.scorers import ToxicityScorer, check_scores


@dataclass(frozen=True, eq=False)
class MethodResult:
    """What one method gave.

    Attributes:
        method: which.
        measured: sums per prompt, and examples.
        estimates: metric -> figure with interval.
        changes: metric -> relative change against plain, paired by prompts; empty for plain itself.
        differences: metric -> difference to plain, likewise.
        groups: group of prompts -> metric -> figure with interval; empty where prompts have no groups.
        neutrality: what it does to neutral text; None where it was not measured.
        speed: measured interleaved with plain; None where it was not.
        suites: what it suppresses of labelled sentences, by name of the suite; empty for plain itself.
        opinions: toxic continuations by every scorer, from several scores on.
    """

    method: Method
    measured: Measured
    estimates: dict[str, Estimate]
    changes: dict[str, Estimate]
    differences: dict[str, Estimate]
    groups: dict[str, dict[str, Estimate]]
    neutrality: Neutrality | None
    speed: Speed | None
    suites: Mapping[str, SuiteResult] = field(default_factory=dict)
    opinions: Mapping[Opinion, OpinionFigures] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of all methods.

    Attributes:
        results: plain first, then as given.
        prompts: what was continued.
        sampling: how.
        facts: names and settings, for the report; JSON values.
    """

    results: tuple[MethodResult, ...]
    prompts: tuple[Prompt, ...]
    sampling: SamplingConfig
    facts: dict[str, Any] = field(default_factory=dict)


def evaluate(
    target: LanguageModel,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    scorer: ToxicityScorer,
    output: str | os.PathLike[str],
    *,
    other_scorers: Sequence[ToxicityScorer] = (),
    sampling: SamplingConfig | None = None,
    judge: LanguageModel | None = None,
    benign_texts: Sequence[str] | None = None,
    suites: Sequence[Suite] = (),
    toxic_from: float = TOXIC_FROM,
    batch_size: int = 32,
    resamples: int = 1000,
    speed_rounds: int = 3,
    resume: bool = False,
    show_progress: bool = False,
) -> Evaluation:
    """Compare methods with plain decoding on the same prompts, with the same draws.

    Args:
        target: the model that is guided.
        methods: with distinct keys; plain decoding is added.
        prompts: with distinct ids, at least one.
        scorer: of continuations; should not be the one that sorted a calibrator's training text.
        output: folder of the continuations; made when missing.
        other_scorers: second opinions on toxicity, with distinct names; `scorer` leads.
        sampling: how to draw; default SamplingConfig().
        judge: a separate language model, for fluency.
        benign_texts: for the divergence on benign text; None: a bundled set; empty: neutrality is not measured.
        suites: labelled sentences that are read, not continued; with distinct names.
        toxic_from: a continuation is toxic from this score on.
        batch_size: rows per forward pass.
        resamples: of the bootstrap.
        speed_rounds: how often each method's speed is measured, interleaved; 0: not at all.
        resume: go on with what is in the output folder.
        show_progress: draw progress bars on standard error.

    Returns:
        Figures with intervals, and changes against plain.

    Raises:
        InputError: bad settings, a text longer than the target's positions, or the output folder holds text made with
            other settings or of other prompts.
        ScorerError: a text could not be scored.
        DataError: the files in the output folder are damaged.
        CheckpointError: the output cannot be written.
    """
    sampling = sampling or SamplingConfig()
    everything = [PLAIN, *methods]
    _check(everything, prompts, suites, [scorer, *other_scorers])
    for texts in (benign_texts or (), *([each.text for each in suite.texts] for suite in suites)):
        check_texts(target, texts)
    settings = {"target": target.name, "target_weights": weights_digest(target.model), "sampling": sampling.to_dict()}
    scoring = {
        "scorer": _fingerprint(scorer),
        "other_scorers": [_fingerprint(each) for each in other_scorers],
        "judge": None if judge is None else [judge.name, weights_digest(judge.model)],
        "toxic_from": toxic_from,
        "prompts": _prompts_digest(prompts),
    }
    measured: list[Measured] = []
    for method in everything:
        journal = Journal(
            Path(output) / "continuations" / f"{method.key}.jsonl",
            {**settings, "method": {"key": method.key, **method.settings}},
            resume=resume,
        )
        sample_continuations(
            target.model,
            target.tokenizer,
            prompts,
            method.make_processors,
            sampling,
            journal,
            batch_size=batch_size,
            title=f"{method.title}: continuations",
            show_progress=show_progress,
        )
        place = Path(output) / "measures" / f"{method.key}.json"
        found = load_measured(place, {**scoring, **journal.settings}) if resume else None
        if found is None:
            found = measure(
                journal,
                prompts,
                scorer,
                other_scorers=other_scorers,
                target=target,
                judge=judge,
                toxic_from=toxic_from,
                batch_size=batch_size,
                title=f"{method.title}: scores",
                show_progress=show_progress,
            )
            save_measured(place, found, {**scoring, **journal.settings})
        measured.append(found)
    neutral: list[Neutrality | None] = [None] * len(everything)
    if benign_texts is None or len(benign_texts):
        neutral[1:] = [
            measure_neutrality(target, method.make_processors, benign_texts, batch_size=batch_size)
            for method in methods
        ]
    read: list[dict[str, SuiteResult]] = [
        {suite.name: measure_suite(target, method.make_processors, suite, batch_size=batch_size) for suite in suites}
        for method in methods
    ]
    speeds: Mapping[str, Speed] = {}
    if speed_rounds:
        speeds = measure_speed(target, everything, prompts, sampling, rounds=speed_rounds)
    facts = {
        "target": target.name,
        "target_weights": settings["target_weights"],
        "target_parameters": target.model.num_parameters(),
        "scorer": scorer.name,
        "other_scorers": [each.name for each in other_scorers],
        "judge": None if judge is None else judge.name,
        "toxic_from": toxic_from,
        "prompt_count": len(prompts),
        "sampling": sampling.to_dict(),
        "batch_size": batch_size,
        "resamples": resamples,
        "torch_threads": torch.get_num_threads(),
        "device": str(target.model.device),
    }
    if suites:
        facts["suites"] = {suite.name: len(suite.texts) for suite in suites}
    results = _compare(everything, measured, neutral, [{}, *read], speeds, prompts, resamples, sampling.seed)
    return Evaluation(tuple(results), tuple(prompts), sampling, facts)


def _fingerprint(scorer: ToxicityScorer) -> list[str | float]:
    """Its name and a few of its scores: a name alone does not tell two versions apart."""
    return [scorer.name, *map(float, check_scores(scorer.score(BENIGN_TEXTS[:3]), 3, scorer.name))]


def _check(
    methods: Sequence[Method], prompts: Sequence[Prompt], suites: Sequence[Suite], scorers: Sequence[ToxicityScorer]
) -> None:
    if not prompts:
        raise InputError("An evaluation needs at least one prompt.")
    for kind, names in (
        ("method", [method.key for method in methods]),
        ("prompt", [prompt.id for prompt in prompts]),
        ("suite", [suite.name for suite in suites]),
        ("scorer", [scorer.name for scorer in scorers]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise InputError(f"The {kind} {twice[0]!r} was given twice; each needs a name of its own.")


def _prompts_digest(prompts: Sequence[Prompt]) -> str:
    whole = "\0".join(f"{prompt.id}\0{prompt.text}" for prompt in prompts)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def weights_digest(model: PreTrainedModel) -> str:
    """A short hex digest of a model's weights, of a sample of them: tells checkpoints apart, is no proof."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        part = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 64)]
        digest.update(part.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _compare(
    methods: Sequence[Method],
    measured: Sequence[Measured],
    neutral: Sequence[Neutrality | None],
    read: Sequence[Mapping[str, SuiteResult]],
    speeds: Mapping[str, Speed],
    prompts: Sequence[Prompt],
    resamples: int,
    seed: int,
) -> list[MethodResult]:
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        if prompt.group is not None:
            places.setdefault(prompt.group, []).append(place)
    results = []
    plain = resample(measured[0].sums, resamples=resamples, seed=seed)
    plain_opinions = resample_opinions(measured[0].opinions, resamples=resamples, seed=seed)
    for number, (method, each, neutrality) in enumerate(zip(methods, measured, neutral, strict=True)):
        figures = resample(each.sums, resamples=resamples, seed=seed) if number else plain
        groups = {
            group: {
                name: figure.estimate()
                for name, figure in resample(select(each, chosen).sums, resamples=resamples, seed=seed).items()
            }
            for group, chosen in sorted(places.items())
        }
        opinions = resample_opinions(each.opinions, resamples=resamples, seed=seed) if number else plain_opinions
        shared = [name for name in figures if name in plain] if number else []
        results.append(
            MethodResult(
                method=method,
                measured=each,
                estimates={name: figure.estimate() for name, figure in figures.items()},
                changes={name: figures[name].relative_to(plain[name]) for name in shared},
                differences={name: figures[name].minus(plain[name]) for name in shared},
                groups=groups,
                neutrality=neutrality,
                speed=speeds.get(method.key),
                suites=read[number],
                opinions=compare_opinions(opinions, plain_opinions if number else None),
            )
        )
    return results
