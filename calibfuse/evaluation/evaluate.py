"""A whole evaluation: sample every method, measure, compare with plain decoding.

Text, and what each stage found (scores, a suite, timings) as a JSON file, are left in the output folder as they come,
so a killed run repeats at most a batch of text or one stage of one method.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from calibfuse.errors import InputError
from calibfuse.evaluation.bootstrap import Estimate, compare
from calibfuse.evaluation.given_text.holistic_bias import HolisticBias, HolisticBiasResult, measure_holistic_bias
from calibfuse.evaluation.given_text.neutrality import BENIGN_TEXTS, Neutrality, measure_neutrality
from calibfuse.evaluation.given_text.reading import GuidedReader, check_texts
from calibfuse.evaluation.given_text.suites import Suite, SuiteResult, measure_suite
from calibfuse.evaluation.given_text.utility import Utility, UtilityResult, measure_utility
from calibfuse.evaluation.metrics import FEWEST_FLAGGED, TOXIC_FROM, Measured, measure
from calibfuse.evaluation.prompts import Prompt
from calibfuse.evaluation.sampling import (
    PLAIN,
    EvaluationProtocol,
    Journal,
    Method,
    SamplingConfig,
    sample_continuations,
)
from calibfuse.evaluation.speed import Speed, measure_speed
from calibfuse.generation.language_model import LanguageModel
from calibfuse.hub import write_files
from calibfuse.scorers import ToxicityScorer, load_scorer

_STAGE = {"format": "calibfuse-evaluation-stage", "format_version": 3}
_Found = TypeVar("_Found")


@dataclass(frozen=True, eq=False)
class MethodResult:
    """What one method gave."""

    method: Method  # which
    measured: Measured  # sums per prompt, and examples
    estimates: dict[str, Estimate]  # metric -> figure with interval
    changes: dict[str, Estimate]  # metric -> relative change against plain, paired by prompts; empty for plain itself
    differences: dict[str, Estimate]  # metric -> difference to plain, likewise
    # What it does to given text; None or empty where it was not measured, as for plain itself.
    neutrality: Neutrality | None = None
    suites: Mapping[str, SuiteResult] = field(default_factory=dict)  # by name of the suite
    holistic_bias: HolisticBiasResult | None = None
    utility: UtilityResult | None = None
    speed: Speed | None = None  # measured interleaved with plain; None where it was not


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of all methods."""

    results: tuple[MethodResult, ...]  # plain first, then as given
    prompts: tuple[Prompt, ...]  # what was continued
    sampling: SamplingConfig  # how
    # Names and settings, for the report; JSON values. "notes" are sentences that a reader must see.
    facts: dict[str, Any] = field(default_factory=dict)
    # Of the field, that the figures belong to; None: the user's own settings.
    protocol: EvaluationProtocol | None = None


def evaluate(
    target: LanguageModel,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    scorer: ToxicityScorer,
    output: str | os.PathLike[str],
    *,
    other_scorers: Sequence[ToxicityScorer] = (),
    sampling: SamplingConfig | None = None,
    protocol: EvaluationProtocol | None = None,
    judge: LanguageModel | None = None,
    benign_texts: Sequence[str] | None = None,
    suites: Sequence[Suite] = (),
    holistic_bias: HolisticBias | None = None,
    utility: Utility | None = None,
    toxic_from: float = TOXIC_FROM,
    batch_size: int = 32,
    resamples: int = 1000,
    speed_rounds: int = 3,
    resume: bool = False,
    show_progress: bool = False,
) -> Evaluation:
    """Compare methods with plain decoding on the same prompts, with the same draws: figures, intervals, changes.

    Args:
        target: the model that is guided.
        methods: with distinct keys; plain decoding is added.
        prompts: with distinct ids, at least one.
        scorer: of continuations; should not be the one that sorted a calibrator's training text.
        output: folder of the continuations and stages; made when missing.
        other_scorers: second opinions on toxicity, with distinct names; `scorer` leads.
        sampling: how to draw; default: the protocol's, else SamplingConfig().
        protocol: what the prompts and draws follow, for the report.
        judge: a separate language model, for fluency.
        benign_texts: for the divergence on benign text; None: a bundled set; empty: neutrality is not measured.
        suites: labelled sentences that are read, not continued; with distinct names.
        holistic_bias: names of groups, likewise.
        utility: tasks, likewise.
        toxic_from: a continuation is toxic from this score on.
        batch_size: rows per forward pass.
        resamples: of the bootstrap.
        speed_rounds: how often each method's speed is measured, interleaved; 0: not at all.
        resume: go on with what is in the output folder.
        show_progress: draw progress bars on standard error.

    InputError: bad settings, a text longer than the target's positions, or the folder holds another evaluation, or this
    one and `resume` is off. ScorerError: a text could not be scored. DataError: the files in the folder are damaged.
    CheckpointError: the output cannot be written.
    """
    sampling = sampling or (protocol.sampling() if protocol else SamplingConfig())
    everything = [PLAIN, *methods]
    benign = BENIGN_TEXTS if benign_texts is None else tuple(benign_texts)
    check_output(output, resume=resume)
    _check_names(everything, prompts, suites, [scorer, *other_scorers])
    scorers = [load_scorer(each) for each in (scorer, *other_scorers)]  # what they return is checked
    passages = () if utility is None else utility.passages
    if texts := [*benign, *(each.text for suite in suites for each in suite.texts), *passages]:
        check_texts(target, texts)
    run = _Run(target, prompts, sampling, Path(output), batch_size, resume, show_progress)
    measured = [run.continuations(method, scorers, judge, toxic_from) for method in everything]
    figures = compare([each.sums for each in measured], resamples=resamples, seed=sampling.seed)
    pairs = zip(everything, measured, figures, strict=True)
    results = [MethodResult(method, own, *found) for method, own, found in pairs]
    results[1:] = [
        replace(result, **run.read_all(result.method, benign, suites, holistic_bias, utility)) for result in results[1:]
    ]
    if speed_rounds:
        speeds = run.speeds(everything, speed_rounds)
        results = [replace(result, speed=speeds[result.method.key]) for result in results]
    facts = {
        **run.facts(scorers, judge, toxic_from),
        "protocol": None if protocol is None else f"{protocol.name}: {protocol.description}",
        "prompt_count": len(prompts),
        "resamples": resamples,
        **({"suites": {suite.name: len(suite.texts) for suite in suites}} if suites else {}),
        "notes": _cautions(measured[0], scorers),
    }
    return Evaluation(tuple(results), tuple(prompts), sampling, facts, protocol)


def check_output(output: str | os.PathLike[str], *, resume: bool) -> None:
    """Refuse (InputError) a folder with an evaluation that would be overwritten."""
    if not resume and any(Path(output).glob("continuations/*.jsonl")):
        raise InputError(
            f"The folder {str(output)!r} already holds an evaluation: go on with resume, or choose another output "
            "folder."
        )


@dataclass(eq=False)
class _Run:
    """The stages of one evaluation, each kept in the output folder."""

    target: LanguageModel
    prompts: Sequence[Prompt]
    sampling: SamplingConfig
    output: Path
    batch_size: int
    resume: bool
    show_progress: bool

    def __post_init__(self) -> None:
        self.how: dict[str, Any] = {"batch_size": self.batch_size, "show_progress": self.show_progress}
        self.settings = {"target": self.target.name, "target_weights": weights_digest(self.target.model)}
        self.prompts_digest = _digest([(prompt.id, prompt.text) for prompt in self.prompts])

    def facts(
        self, scorers: Sequence[ToxicityScorer], judge: LanguageModel | None, toxic_from: float
    ) -> dict[str, Any]:
        """What a report says of models, judges and machine."""
        return {
            **self.settings,
            "target_parameters": self.target.model.num_parameters(),
            "scorer": scorers[0].name,
            "other_scorers": [each.name for each in scorers[1:]],
            "judge": None if judge is None else judge.name,
            "toxic_from": toxic_from,
            "sampling": self.sampling.to_dict(),
            "batch_size": self.batch_size,
            "torch_threads": torch.get_num_threads(),
            "device": str(self.target.model.device),
        }

    def _stage(
        self, name: str, kind: type[_Found], settings: Mapping[str, Any], compute: Callable[[], _Found]
    ) -> _Found:
        place = self.output / "stages" / f"{name}.json"
        return run_stage(place, kind, {**self.settings, **settings}, compute, resume=self.resume)

    def continuations(
        self, method: Method, scorers: Sequence[ToxicityScorer], judge: LanguageModel | None, toxic_from: float
    ) -> Measured:
        """Sample what is missing, and score it."""
        target, prompts, sampling, title = self.target, self.prompts, self.sampling, method.title
        made = {"sampling": sampling.to_dict(), "method": method.identity()}
        place = self.output / "continuations" / f"{method.key}.jsonl"
        journal = Journal(place, {**self.settings, **made}, resume=self.resume)
        options: dict[str, Any] = {"title": f"{title}: continuations", **self.how}
        sample_continuations(target, prompts, method.make_processors, sampling, journal, **options)
        scoring = {
            "scorers": [_fingerprint(each) for each in scorers],
            "judge": None if judge is None else [judge.name, weights_digest(judge.model)],
            "toxic_from": toxic_from,
            "prompts": self.prompts_digest,
        }
        options = {"target": target, "judge": judge, "sampling": sampling, "toxic_from": toxic_from, **self.how}
        return self._stage(
            f"{method.key}/scores",
            Measured,
            {**made, **scoring},
            lambda: measure(journal, prompts, scorers, title=f"{title}: scores", **options),
        )

    def read_all(
        self,
        method: Method,
        benign: Sequence[str],
        suites: Sequence[Suite],
        holistic_bias: HolisticBias | None,
        utility: Utility | None,
    ) -> dict[str, Any]:
        """What a method does to given texts, by attribute of MethodResult."""

        def read(name: str, kind: type[_Found], measurement: Callable[..., _Found], data: object) -> _Found:
            return self._stage(
                f"{method.key}/{re.sub('[^a-zA-Z0-9.]+', '-', name)}",
                kind,
                {"method": method.identity(), "data": _digest(data)},
                lambda: measurement(
                    GuidedReader(self.target, method.make_processors, title=f"{method.title}: {name}", **self.how), data
                ),
            )

        found: dict[str, Any] = {}
        if benign:
            found["neutrality"] = read("neutral text", Neutrality, measure_neutrality, benign)
        found["suites"] = {each.name: read(f"suite {each.name}", SuiteResult, measure_suite, each) for each in suites}
        if holistic_bias is not None:
            found["holistic_bias"] = read("HolisticBias", HolisticBiasResult, measure_holistic_bias, holistic_bias)
        if utility is not None:
            found["utility"] = read("utility", UtilityResult, measure_utility, utility)
        return found

    def speeds(self, methods: Sequence[Method], rounds: int) -> dict[str, Speed]:
        """Time all methods in turn."""
        settings = {
            "sampling": self.sampling.to_dict(),
            "methods": [method.identity() for method in methods],
            "prompts": self.prompts_digest,
            "rounds": rounds,
        }
        options: dict[str, Any] = {"rounds": rounds, "show_progress": self.show_progress}
        compute = partial(measure_speed, self.target, methods, self.prompts, self.sampling, **options)
        return self._stage("speed", dict[str, Speed], settings, compute)


def run_stage(
    place: Path, kind: type[_Found], settings: Mapping[str, Any], compute: Callable[[], _Found], *, resume: bool
) -> _Found:
    """What a stage found: from its file, where that was made with the same settings, else computed and written.

    `kind` is a dataclass of numbers, texts, arrays, tuples, dictionaries by text, and such dataclasses; `settings` are
    JSON values that determine the result. A damaged file counts as none, and without `resume` none is looked for.
    """
    header = json.loads(json.dumps({**_STAGE, "settings": settings}))
    if resume:
        # Whatever is wrong with the file, its stage can be computed again.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            data = json.loads(place.read_bytes())
            if {name: data[name] for name in header} == header:
                kept: _Found = _decode(kind, data["found"])
                return kept
    found = compute()
    encoded = json.dumps({**header, "found": found}, default=_encode)
    write_files(place.parent, {place.name: encoded.encode("utf-8")})
    return found


def _encode(value: Any) -> Any:  # noqa: ANN401
    return asdict(value) if is_dataclass(value) else value.tolist()  # type: ignore[arg-type]


def _decode(kind: Any, value: Any) -> Any:  # noqa: ANN401
    """A value of a type from what `json.loads` made of it."""
    arguments = get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{each.name: _decode(hints[each.name], value[each.name]) for each in fields(kind)})  # type: ignore[operator]
    if get_origin(kind) is UnionType:  # X | None
        return None if value is None else _decode(arguments[0], value)
    if kind == NDArray[np.float64]:
        return np.asarray(value, dtype=np.float64)
    if get_origin(kind) is tuple:
        return tuple(_decode(arguments[0], each) for each in value)
    if get_origin(kind) is dict:
        return {key: _decode(arguments[1], each) for key, each in value.items()}
    return value


def _fingerprint(scorer: ToxicityScorer) -> list[str | float]:
    """Its name and a few of its scores: a name alone does not tell two versions apart."""
    return [scorer.name, *map(float, scorer.score(BENIGN_TEXTS[:3]))]


def _check_names(
    methods: Sequence[Method], prompts: Sequence[Prompt], suites: Sequence[Suite], scorers: Sequence[ToxicityScorer]
) -> None:
    if not prompts:
        raise InputError("An evaluation needs at least one prompt.")
    if wrong := [each for each in prompts if not isinstance(each, Prompt)]:
        raise InputError(f"Expected prompts as Prompt(id, text), got a {type(wrong[0]).__name__}.")
    for scorer in scorers:
        if not hasattr(scorer, "score"):
            raise InputError(f"Expected a scorer, such as load_scorer() gives, got a {type(scorer).__name__}.")
    for kind, names in (
        ("method", [method.key for method in methods]),
        ("prompt", [prompt.id for prompt in prompts]),
        ("suite", [suite.name for suite in suites]),
        ("scorer", [scorer.name for scorer in scorers]),
    ):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise InputError(f"The {kind} {twice[0]!r} was given twice; each needs a name of its own.")


def _digest(data: object) -> str:
    """Of data whose `repr` tells all of it: texts, numbers, and tuples and dataclasses of them."""
    return hashlib.sha256(repr(data).encode()).hexdigest()[:16]


def weights_digest(model: PreTrainedModel) -> str:
    """A short hex digest of a model's weights, of a sample of them: tells checkpoints apart, is no proof."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        part = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 64)]
        digest.update(part.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _cautions(plain: Measured, scorers: Sequence[ToxicityScorer]) -> list[str]:
    """Which scorers find too little toxic text in plain decoding to compare shares of it."""
    names = {each.name: "toxic_share" if each is scorers[0] else f"toxic_share ({each.name})" for each in scorers}
    flagged = {scorer: int(plain.sums[name].numerator.sum()) for scorer, name in names.items()}
    return [
        f"the scorer {scorer} counts {count} of plain decoding's continuations as toxic, too few to compare shares of "
        "toxic continuations: compare mean toxicity, or measure more prompts"
        for scorer, count in flagged.items()
        if count < FEWEST_FLAGGED
    ]
