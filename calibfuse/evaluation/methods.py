"""The methods of a comparison: strengths of the fusion, and other methods by name.

Some of those are settings of CalibFusion or parts of the calibrator; the others (baselines.py) know nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from calibfuse.calibrator import Calibrator, load_universal
from calibfuse.errors import InputError, MissingHeadError
from calibfuse.evaluation.ablations import heads_alone, words_alone
from calibfuse.evaluation.baselines import RewardGuidance, SelfDebiasing, forbid_words, match_temperature
from calibfuse.evaluation.sampling import Method
from calibfuse.fusion import MODES, FusionConfig, recommended_config
from calibfuse.generation.language_model import LanguageModel
from calibfuse.guide import Guide
from calibfuse.loading import PretrainedCalibrator
from calibfuse.processor import CalibFusion
from calibfuse.scorers import ToxicityScorer, load_scorer

ALL = "all"
_FEW_ALPHAS = {"contrast": (1.0, 3.0, 5.0), "value": (0.5, 1.0, 2.0)}
_MANY_ALPHAS = {"contrast": (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0), "value": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)}
_OF_MIXTURES = (0.1, 0.2, 0.3, 0.5, 0.7)  # alpha ends at 1 there


@dataclass(frozen=True)
class Baseline:
    """A family of methods: a processor of a strength, or a setting of CalibFusion."""

    # Defaults, the first is the paper's; empty: it follows from target or calibrator; None: it has no strength.
    strengths: tuple[float, ...] | None
    make: Callable[[ComparedMethods, float], LogitsProcessor] | None = None  # None: a fusion
    fusion: Mapping[str, Any] | None = None  # options of FusionConfig
    part: Callable[[PretrainedCalibrator], PretrainedCalibrator] | None = None  # of the calibrator; None: all of it
    truncates_first: bool = False  # whether the target's nucleus is taken before the fusion


def _top_k(_: ComparedMethods, strength: float) -> LogitsProcessor:
    if strength < 1 or strength != int(strength):
        raise InputError(f"top-k needs a whole number of tokens, at least 1, got {strength:g}.")
    return TopKLogitsWarper(top_k=int(strength))


def _nucleus(_: ComparedMethods, strength: float) -> LogitsProcessor:
    if strength > 1.0:
        raise InputError(f"nucleus needs a probability of at most 1, got {strength:g}.")
    return TopPLogitsWarper(top_p=strength)


BASELINES: dict[str, Baseline] = {
    # controls: another temperature, truncation to k tokens as in reward, truncation to a nucleus as in experts
    "temperature": Baseline((), lambda _, strength: TemperatureLogitsWarper(strength)),
    "top-k": Baseline((20.0,), _top_k),
    "nucleus": Baseline((0.9,), _nucleus),
    "bad-words": Baseline(None, lambda its, _: forbid_words(its.target.tokenizer)),
    "reward": Baseline((10.0, 50.0), lambda its, beta: RewardGuidance(its.target.tokenizer, its.guide_scorer, beta)),
    "self-debias": Baseline((10.0, 50.0, 100.0), lambda its, decay: SelfDebiasing(its.target, decay)),
    # DExperts (Liu et al. 2021): both heads, both ways, unclipped, after the target's nucleus
    "experts": Baseline(
        (2.0,),
        fusion={"mode": "contrast", "one_sided": False, "max_shift": 1e9, "margin": 0.0, "candidates": 0},
        truncates_first=True,
    ),
    # log-linear mixtures; 1 is the non-toxic model alone
    "geometric": Baseline((1.0,), fusion={"mode": "geometric"}),
    # Tian et al. 2025: fusion of last hidden states; needs `calibfuse align-embedding`
    "embedding": Baseline((0.1,), fusion={"mode": "embedding"}),
    "words": Baseline((), fusion={"mode": "contrast"}, part=words_alone),
    "heads": Baseline((), fusion={"mode": "contrast"}, part=heads_alone),
}


def parse_baseline(spec: str) -> tuple[str, tuple[float, ...]]:
    """Name and strengths of "name" or "name:strength,strength"; the baseline's own where none are given.

    InputError: an unknown name, or strengths that are no positive numbers or that it does not have.
    """
    name, colon, given = spec.partition(":")
    if name not in BASELINES:
        raise InputError(f"Unknown baseline {name!r}; choose among {', '.join([*BASELINES, ALL])}.")
    baseline = BASELINES[name]
    if not colon:
        return name, baseline.strengths or ()
    if baseline.strengths is None:
        raise InputError(f"The baseline {name!r} has no strength, got {spec!r}.")
    try:
        strengths = tuple(float(part) for part in given.split(","))
    except ValueError as error:
        raise InputError(f"Expected numbers after {name + ':'!r}, separated by commas, got {given!r}.") from error
    if not all(0.0 < value < math.inf for value in strengths):
        raise InputError(f"The strengths of the baseline {name!r} must be above 0, got {given!r}.")
    if baseline.fusion is not None:
        for value in strengths:
            FusionConfig(mode=baseline.fusion["mode"], alpha=value)
    return name, strengths


class ComparedMethods:
    """Makes the methods of one target; the calibrator is loaded and bound once, when a method needs it.

    `calibrator` is a folder or Hub id, None the bundled one; `words` have biases and are lowered as well; `top_p` is
    the nucleus of the draw; `guide_scorer`, by default the bundled one, rewards in reward guidance.
    """

    def __init__(
        self,
        target: LanguageModel,
        calibrator: str | None = None,
        *,
        words: Mapping[str, float] | None = None,
        top_p: float = 1.0,
        guide_scorer: ToxicityScorer | None = None,
    ) -> None:
        self.target: LanguageModel = target
        self._name, self._words, self._top_p, self._scorer = calibrator, words, top_p, guide_scorer
        self._guides: dict[object, Guide] = {}

    @cached_property
    def calibrator(self) -> PretrainedCalibrator:
        """As it was loaded, with the words."""
        if not self._words:
            return Calibrator.from_pretrained(self._name)
        why = "--words and --protect-names need a universal calibrator"
        return load_universal(self._name, why=why).with_words(self._words)

    @cached_property
    def guide_scorer(self) -> ToxicityScorer:
        """Of reward guidance."""
        return self._scorer or load_scorer("bundled")

    def fusions(
        self,
        modes: Sequence[str] | None = None,
        alphas: Sequence[float] | None = None,
        *,
        max_shift: float | None = None,
        is_search: bool = False,
    ) -> list[Method]:
        """One method per mode and strength above 0; None: the calibrator's mode, and some strengths with its own.

        A search tries more of them.
        """
        methods: dict[str, Method] = {}
        wanted: Sequence[str | None] = modes or [None]
        for mode in dict.fromkeys(wanted):
            # 0 is exactly the plain target, which is always measured
            for alpha in self._alphas(mode, is_search) if alphas is None else sorted({*alphas} - {0.0}):
                given = {"mode": mode, "alpha": alpha, "max_shift": max_shift}
                fusion = self._fuse({name: value for name, value in given.items() if value is not None})
                own, its = fusion.config.mode, fusion.config.alpha
                is_default = fusion.config == self._recommended(mode)
                method = self._method(f"{own}-{its:g}", f"{own}, alpha {its:g}", own, fusion, is_default=is_default)
                methods.setdefault(method.key, method)
        return list(methods.values())

    def baselines(self, specs: Sequence[str], fusions: Sequence[Method]) -> tuple[list[Method], list[str]]:
        """The methods of some specifications; notes on what "all" left out. `temperature` alone matches a fusion."""
        given = [spec for spec in specs if spec != ALL]
        named = {spec.partition(":")[0] for spec in given}
        rest = [name for name in BASELINES if name not in named] if ALL in specs else []
        # the one that people would use
        matched = max(fusions, key=lambda method: (method.is_default, method.alpha or 0.0), default=None)
        found: list[Method] = []
        notes: list[str] = []
        for spec in dict.fromkeys([*given, *rest]):
            try:
                found += self.baseline(spec, matched)
            except (InputError, MissingHeadError) as error:
                if spec in given:
                    raise
                notes.append(f"'--baseline all' leaves out {spec}: {error}")
        return found, notes

    def baseline(self, spec: str, matched: Method | None = None) -> list[Method]:
        """The methods of one specification; `matched`: whose entropy `temperature` alone has."""
        name, strengths = parse_baseline(spec)
        baseline = BASELINES[name]
        if baseline.fusion is not None:
            return self._fusion_baseline(name, baseline, strengths)

        def method(key: str, title: str, strength: float, settings: dict[str, Any], **options: Any) -> Method:  # noqa: ANN401
            assert baseline.make is not None
            processor = baseline.make(self, strength)
            return Method(key, title, lambda: [processor], name, settings={"baseline": name, **settings}, **options)

        if baseline.strengths is None:
            return [method(name, name, 0.0, {})]
        if not strengths:
            if matched is None:
                raise InputError("The temperature control needs a number (temperature:1.1) or a method to match.")
            # rounded, so that a run that goes on with another number of threads finds the same one
            value = round(match_temperature(self.target, matched.make_processors), 4)
            title = f"temperature {value:.3f} (entropy of {matched.title})"
            return [method("temperature-matched", title, value, {"strength": value})]
        guide = self.guide_scorer.name if name == "reward" else None
        found = []
        for value in strengths:
            its: dict[str, Any] = {"strength": value, "guide": guide}
            is_default = value in baseline.strengths[:1]
            found.append(
                method(f"{name}-{value:g}", f"{name} {value:g}", value, its, alpha=value, is_default=is_default)
            )
        return found

    def _fusion_baseline(self, name: str, baseline: Baseline, strengths: Sequence[float]) -> list[Method]:
        options = dict(baseline.fusion or {})
        default = baseline.strengths[0] if baseline.strengths else self._recommended(options["mode"]).alpha
        before = self._top_p if baseline.truncates_first and self._top_p < 1.0 else None
        return [
            self._method(
                f"{name}-{alpha:g}",
                f"{name} {alpha:g}",
                name,
                self._fuse({**options, "alpha": alpha}, baseline.part),
                is_default=alpha == default,
                nucleus=[] if before is None else [TopPLogitsWarper(top_p=before)],
                settings={"baseline": name, "strength": alpha, "nucleus_before": before},
            )
            for alpha in strengths or [default]
        ]

    def _recommended(self, mode: str | None) -> FusionConfig:
        """What `from_pretrained` would take in a mode; None: the calibrator's."""
        return recommended_config(self.calibrator.config.fusion, {} if mode is None else {"mode": mode})

    def _alphas(self, mode: str | None, is_search: bool) -> list[float]:
        own = self._recommended(mode)
        mixtures = _OF_MIXTURES if is_search else _OF_MIXTURES[:3]
        return sorted({*(_MANY_ALPHAS if is_search else _FEW_ALPHAS).get(own.mode, mixtures), own.alpha})

    def _fuse(self, options: Mapping[str, Any], part: Any = None) -> CalibFusion:  # noqa: ANN401
        """A fusion of the calibrator or a part of it, with options of FusionConfig over the recommended ones."""
        config = recommended_config(self.calibrator.config.fusion, options)
        tokenizer, model = self.target.tokenizer, self.target.model
        if MODES[config.mode].fuse is None:  # from_pretrained finds the alignment
            return CalibFusion.from_pretrained(self._name, tokenizer=tokenizer, target=model, **options)
        if part not in self._guides:
            alone = self.calibrator if part is None else part(self.calibrator)
            self._guides[part] = alone.bind(tokenizer, device=model.device)
        return CalibFusion(self._guides[part], config)

    def _method(
        self,
        key: str,
        title: str,
        family: str,
        fusion: CalibFusion,
        *,
        is_default: bool,
        nucleus: Sequence[LogitsProcessor] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> Method:
        words = {"words": dict(self._words)} if self._words else {}
        its = {"fusion": fusion.config.to_dict(), "calibrator": self.calibrator.fingerprint}
        processors = [*nucleus, fusion]
        identity = {**(settings or {}), **words, **its}
        return Method(key, title, lambda: processors, family, fusion.config.alpha, identity, is_default=is_default)
