"""The methods that `calibfuse evaluate` compares: strengths of the user's fusion, and published methods.

Those in FUSION_BASELINES are settings of CalibFusion, or parts of the calibrator; the others know nothing of it
(evaluation/baselines.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calibfuse.cli.loading import words_of
from calibfuse.errors import InputError

if TYPE_CHECKING:
    from calibfuse.evaluation import Method
    from calibfuse.fusion import FusionConfig
    from calibfuse.generation.language_model import LanguageModel
    from calibfuse.guide import Guide
    from calibfuse.processor import CalibFusion

_ALL = "all"
_FEW_ALPHAS = {"contrast": (1.0, 3.0, 5.0), "value": (0.5, 1.0, 2.0)}
_MANY_ALPHAS = {"contrast": (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0), "value": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)}
_OF_MIXTURES = (0.1, 0.2, 0.3, 0.5, 0.7)  # alpha ends at 1 there


@dataclass(frozen=True)
class FusionBaseline:
    """A published method that is a setting of CalibFusion."""

    mode: str
    default: float | None  # the paper's strength; None: the calibrator's own
    options: dict[str, Any] = field(default_factory=dict)
    truncates_first: bool = False  # whether the target's nucleus is taken before the fusion
    part: str = ""  # of the calibrator, that is measured alone: "words" or "heads"; empty: all of it


FUSION_BASELINES: dict[str, FusionBaseline] = {
    # DExperts (Liu et al. 2021): both heads, both ways, unclipped, after the target's nucleus
    "experts": FusionBaseline(
        "contrast",
        2.0,
        {"one_sided": False, "max_shift": 1e9, "margin": 0.0, "candidates": 0},
        truncates_first=True,
    ),
    # log-linear mixtures; 1 is the non-toxic model alone
    "geometric": FusionBaseline("geometric", 1.0),
    # Tian et al. 2025: fusion of last hidden states; needs `calibfuse align-embedding`
    "embedding": FusionBaseline("embedding", 0.1),
    "words": FusionBaseline("contrast", None, part="words"),
    "heads": FusionBaseline("contrast", None, part="heads"),
}


def check_methods(args: argparse.Namespace) -> None:
    """Refuse bad strengths, modes and baselines before anything is loaded."""
    from calibfuse.evaluation.baselines import BASELINES, parse_baseline
    from calibfuse.fusion import FusionConfig

    for spec in _specs(args):
        name = spec.partition(":")[0]
        if name in FUSION_BASELINES:
            _fusion_strengths(spec)
        elif name in BASELINES:
            parse_baseline(spec)
        else:
            known = ", ".join([*BASELINES, *FUSION_BASELINES, _ALL])
            raise InputError(f"Unknown baseline {name!r}; choose among {known}.")
    for mode in args.mode or [None]:
        for alpha in args.alpha or [None]:
            FusionConfig.from_dict(_options(args, mode, alpha))
    words_of(args)


def _options(args: argparse.Namespace, mode: str | None, alpha: float | None) -> dict[str, Any]:
    values = {"mode": mode, "alpha": alpha, "max_shift": args.max_shift}
    return {name: value for name, value in values.items() if value is not None}


def _specs(args: argparse.Namespace) -> list[str]:
    """The baselines that were asked for, `all` written out; strengths of one's own stand for a baseline of `all`."""
    from calibfuse.evaluation.baselines import BASELINES

    given = [spec for spec in args.baseline if spec != _ALL]
    named = {spec.partition(":")[0] for spec in given}
    others = [*BASELINES, *FUSION_BASELINES] if _ALL in args.baseline else []
    return list(dict.fromkeys([*given, *(name for name in others if name not in named)]))


def _fusion_strengths(spec: str, *, own: float = 1.0) -> tuple[float, ...]:
    """Strengths of `experts:1,2`; of `experts` the paper's, or the calibrator's `own`."""
    from calibfuse.evaluation.baselines import parse_strengths
    from calibfuse.fusion import FusionConfig

    name, colon, rest = spec.partition(":")
    baseline = FUSION_BASELINES[name]
    if not colon:
        return (own if baseline.default is None else baseline.default,)
    strengths = parse_strengths(name, rest)
    for value in strengths:
        FusionConfig(mode=baseline.mode, alpha=value)
    return strengths


class BoundFusions:
    """Fusions with the calibrator of the arguments, which is loaded and bound to the target once."""

    def __init__(self, args: argparse.Namespace, target: LanguageModel) -> None:
        from calibfuse.calibrator import Calibrator, load_universal

        self.words = words_of(args)
        if self.words:
            why = "--words and --protect-names need a universal calibrator"
            self.calibrator: Any = load_universal(args.calibrator, why=why).with_words(self.words)
        else:
            self.calibrator = Calibrator.from_pretrained(args.calibrator)
        self._name = args.calibrator
        self._target = target
        self._guides: dict[str, Guide] = {}
        self._guide("")

    def recommended(self, mode: str | None) -> FusionConfig:
        """What `from_pretrained` would take in a mode; None: the calibrator's."""
        from calibfuse.fusion import recommended_config

        return recommended_config(self.calibrator.config.fusion, {} if mode is None else {"mode": mode})

    def _guide(self, part: str) -> Guide:
        if part not in self._guides:
            from calibfuse.evaluation.ablations import heads_alone, words_alone

            make: Any = {"": lambda whole: whole, "words": words_alone, "heads": heads_alone}[part]
            bound = make(self.calibrator).bind(self._target.tokenizer, device=self._target.model.device)
            self._guides[part] = bound
        return self._guides[part]

    def make(self, part: str = "", **options: Any) -> CalibFusion:  # noqa: ANN401
        """A fusion of the calibrator or a part of it, with options of FusionConfig over the recommended ones."""
        from calibfuse.fusion import MODES, recommended_config
        from calibfuse.processor import CalibFusion

        config = recommended_config(self.calibrator.config.fusion, options)
        if MODES[config.mode].fuse is not None:
            return CalibFusion(self._guide(part), config)
        target = self._target  # from_pretrained finds the alignment
        return CalibFusion.from_pretrained(self._name, tokenizer=target.tokenizer, target=target.model, **options)


def bind_calibrator(args: argparse.Namespace, target: LanguageModel) -> BoundFusions | None:
    """The calibrator, bound to the target; None: no method that was asked for needs it."""
    if args.alpha == [0.0] and not any(spec.partition(":")[0] in FUSION_BASELINES for spec in _specs(args)):
        return None
    return BoundFusions(args, target)


def fusion_methods(args: argparse.Namespace, fusions: BoundFusions) -> list[Method]:
    """One method per mode and strength above 0."""
    methods: dict[str, Method] = {}
    for mode in dict.fromkeys(args.mode or [None]):
        recommended = fusions.recommended(mode)
        for alpha in _alphas(args, recommended):
            if alpha == 0.0:  # exactly the plain target, which is always measured
                continue
            fusion = fusions.make(**_options(args, mode, alpha))
            config = fusion.config
            method = _method(
                fusions,
                fusion,
                f"{config.mode}-{config.alpha:g}",
                f"{config.mode}, alpha {config.alpha:g}",
                config.mode,
                is_default=config == recommended,
            )
            methods.setdefault(method.key, method)
    return list(methods.values())


def _alphas(args: argparse.Namespace, recommended: FusionConfig) -> Sequence[float]:
    """The strengths that were asked for, else those of the mode and the one that `from_pretrained` would take."""
    if args.alpha is not None:
        return sorted(set(args.alpha))
    is_search = args.pick_alpha or args.fluency_budget is not None
    strengths = (_MANY_ALPHAS if is_search else _FEW_ALPHAS).get(recommended.mode)
    if strengths is None:
        strengths = _OF_MIXTURES if is_search else _OF_MIXTURES[:3]
    return sorted({*strengths, recommended.alpha})


def baseline_methods(
    args: argparse.Namespace,
    target: LanguageModel,
    methods: Sequence[Method],
    fusions: BoundFusions | None,
    top_p: float,
) -> tuple[list[Method], list[str]]:
    """The methods of `--baseline`, and notes on what `all` had to leave out; `top_p`: the nucleus of the draw."""
    from calibfuse.errors import MissingHeadError
    from calibfuse.evaluation.baselines import Ingredients, make_baselines
    from calibfuse.scorers import load_scorer

    specs = _specs(args)
    guide = load_scorer("bundled") if any(spec.partition(":")[0] == "reward" for spec in specs) else None
    # of the temperature control: the method that people would use
    matched = max(methods, key=lambda method: (method.is_default, method.alpha or 0.0), default=None)
    found: list[Method] = []
    notes: list[str] = []
    for spec in specs:
        is_asked_for = spec in args.baseline
        if spec == "temperature" and matched is None and not is_asked_for:
            notes.append("'--baseline all' leaves out temperature: there is no fusion whose entropy it could match")
        elif fusions is None or spec.partition(":")[0] not in FUSION_BASELINES:
            found += make_baselines(spec, Ingredients(target, guide, matched))
        else:
            try:
                found += _fusion_baselines(fusions, spec, top_p)
            except MissingHeadError as error:
                if is_asked_for:
                    raise
                notes.append(f"'--baseline all' leaves out {spec}: {error}")
    return found, notes


def _fusion_baselines(fusions: BoundFusions, spec: str, top_p: float) -> list[Method]:
    name = spec.partition(":")[0]
    baseline = FUSION_BASELINES[name]
    before = top_p if baseline.truncates_first and top_p < 1.0 else None
    own = fusions.recommended(baseline.mode).alpha
    return [
        _method(
            fusions,
            fusions.make(baseline.part, mode=baseline.mode, alpha=alpha, **baseline.options),
            f"{name}-{alpha:g}",
            f"{name} {alpha:g}",
            name,
            before=before,
            is_default=alpha == (own if baseline.default is None else baseline.default),
            baseline=name,
            strength=alpha,
            nucleus_before=before,
        )
        for alpha in _fusion_strengths(spec, own=own)
    ]


def _method(
    fusions: BoundFusions,
    fusion: CalibFusion,
    key: str,
    title: str,
    family: str,
    *,
    is_default: bool,
    before: float | None = None,
    **settings: Any,  # noqa: ANN401
) -> Method:
    from transformers.generation.logits_process import TopPLogitsWarper

    from calibfuse.evaluation import Method

    nucleus = [] if before is None else [TopPLogitsWarper(top_p=before)]
    if fusions.words:
        settings["words"] = fusions.words
    return Method(
        key,
        title,
        lambda: [*nucleus, fusion],
        family,
        fusion.config.alpha,
        {**settings, "fusion": fusion.config.to_dict(), "calibrator": fusions.calibrator.fingerprint},
        is_default=is_default,
    )
