"""The methods that `calibfuse evaluate` compares: strengths of the user's fusion, and published methods.

Some methods are settings of CalibFusion, or parts of the calibrator; the others know nothing of it
(evaluation/baselines.py).

| name | source | how it is made of the calibrator |
|---|---|---|
| experts | DExperts, Liu et al. 2021 | both heads, both ways, unclipped, after the target's nucleus |
| geometric | the non-toxic model alone, and mixtures with it | log-linear; 1 is the non-toxic model alone |
| words | ablation: the calibrator's table of words alone | contrast at the calibrator's strength |
| heads | ablation: its language-model heads without the words | likewise |
| embedding | Tian et al. 2025 | fusion of last hidden states; needs `calibfuse align-embedding` |
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calibfuse.cli.options import Fields
from calibfuse.errors import InputError

if TYPE_CHECKING:
    from transformers import LogitsProcessor

    from calibfuse.evaluation import Method
    from calibfuse.fusion import FusionConfig
    from calibfuse.generation.language_model import LanguageModel
    from calibfuse.guide import Guide
    from calibfuse.processor import CalibFusion

FUSION = Fields("calibfuse.fusion:FusionConfig", "candidates", "margin", "max_shift", "one_sided", "mass_to_others")
_ALL = "all"
_NO_CLIP = 1e9  # nats
_FEW_ALPHAS = {"contrast": (1.0, 3.0, 5.0), "value": (0.5, 1.0, 2.0)}
_MANY_ALPHAS = {"contrast": (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0), "value": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)}
_FEW_OF_MIXTURES = (0.1, 0.2, 0.3)  # alpha ends at 1 there
_MANY_OF_MIXTURES = (0.1, 0.2, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class FusionBaseline:
    """A published method that is a setting of CalibFusion.

    Attributes:
        mode: of the fusion.
        default: the paper's strength; None: the calibrator's own.
        scan: strengths to search the best one among, with the default.
        options: of the fusion.
        truncates_first: whether the target's nucleus is taken before the fusion.
        part: of the calibrator, that is measured alone: "words" or "heads"; empty: all of it.
    """

    mode: str
    default: float | None
    scan: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    truncates_first: bool = False
    part: str = ""


FUSION_BASELINES: dict[str, FusionBaseline] = {
    "experts": FusionBaseline(
        "contrast",
        2.0,
        (0.25, 0.5, 1.0, 3.0),
        {"one_sided": False, "max_shift": _NO_CLIP, "margin": 0.0, "candidates": 0},
        truncates_first=True,
    ),
    "geometric": FusionBaseline("geometric", 1.0, (0.1, 0.2, 0.3, 0.5, 0.7)),
    "embedding": FusionBaseline("embedding", 0.1, (0.05, 0.2, 0.3)),
    "words": FusionBaseline("contrast", None, (1.0, 3.0, 5.0), part="words"),
    "heads": FusionBaseline("contrast", None, (1.0, 3.0, 5.0), part="heads"),
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


def _options(args: argparse.Namespace, mode: str | None, alpha: float | None) -> dict[str, Any]:
    """The fusion options that were given."""
    values = {"mode": mode, "alpha": alpha, **FUSION.values(args)}
    return {name: value for name, value in values.items() if value is not None}


def _specs(args: argparse.Namespace) -> list[str]:
    """The baselines that were asked for, `all` written out; strengths of one's own stand for a baseline of `all`."""
    from calibfuse.evaluation.baselines import BASELINES

    given = [spec for spec in args.baseline if spec != _ALL]
    named = {spec.partition(":")[0] for spec in given}
    others = [*BASELINES, *FUSION_BASELINES] if _ALL in args.baseline else []
    return list(dict.fromkeys([*given, *(name for name in others if name not in named)]))


def _is_fusion(spec: str) -> bool:
    return spec.partition(":")[0] in FUSION_BASELINES


def _fusion_strengths(spec: str, *, own: float = 1.0, scan: bool = False) -> tuple[float, ...]:
    """Strengths of a specification such as `experts:1,2`; the paper's where none are given, with `scan` several.

    `own` is the calibrator's, which stands for the paper's where there is no paper.
    """
    from calibfuse.fusion import FusionConfig

    name, colon, rest = spec.partition(":")
    baseline = FUSION_BASELINES[name]
    if not colon:
        default = own if baseline.default is None else baseline.default
        return tuple(sorted({default, *(baseline.scan if scan else ())}))
    try:
        strengths = tuple(float(part) for part in rest.split(","))
    except ValueError as error:
        raise InputError(f"Expected numbers after {name + ':'!r}, separated by commas, got {rest!r}.") from error
    for value in strengths:
        if value == 0.0:
            raise InputError(f"The strengths of the baseline {name!r} must be above 0, got {rest!r}.")
        FusionConfig(mode=baseline.mode, alpha=value)
    return strengths


class BoundFusions:
    """Fusions with the calibrator of `--calibrator`, which is loaded and bound to the target once."""

    def __init__(self, args: argparse.Namespace, target: LanguageModel) -> None:
        from calibfuse.calibrator import Calibrator

        self.calibrator = Calibrator.from_pretrained(args.calibrator, local_files_only=args.local_files_only)
        self._args = args
        self._target = target
        self._guides = {"": self.calibrator.bind(target.tokenizer, device=target.model.device)}

    def recommended(self, mode: str | None) -> FusionConfig:
        """What `from_pretrained` would take in a mode; None: the calibrator's."""
        from calibfuse.fusion import recommended_config

        return recommended_config(self.calibrator.config.fusion, {} if mode is None else {"mode": mode})

    def _guide(self, part: str) -> Guide:
        """The calibrator, or a part of it alone."""
        if part not in self._guides:
            from calibfuse.evaluation.ablations import heads_alone, words_alone

            calibrator = {"words": words_alone, "heads": heads_alone}[part](self.calibrator)
            self._guides[part] = calibrator.bind(self._target.tokenizer, device=self._target.model.device)
        return self._guides[part]

    def make(self, part: str = "", **options: Any) -> CalibFusion:  # noqa: ANN401
        """A fusion of the calibrator or a part of it, with options of FusionConfig over the recommended ones."""
        from calibfuse.fusion import MODES, recommended_config
        from calibfuse.processor import CalibFusion

        config = recommended_config(self.calibrator.config.fusion, options)
        if MODES[config.mode].fuse is not None:
            return CalibFusion(self._guide(part), config)
        return CalibFusion.from_pretrained(  # finds the alignment
            self._args.calibrator,
            tokenizer=self._target.tokenizer,
            target=self._target.model,
            local_files_only=self._args.local_files_only,
            **options,
        )


def bind_calibrator(args: argparse.Namespace, target: LanguageModel) -> BoundFusions | None:
    """The calibrator, bound to the target; None: no method that was asked for needs it."""
    if args.no_fusion and not any(map(_is_fusion, _specs(args))):
        return None
    return BoundFusions(args, target)


def fusion_methods(args: argparse.Namespace, fusions: BoundFusions) -> list[Method]:
    """One method per mode and strength above 0."""
    from calibfuse.evaluation import Method

    methods: dict[str, Method] = {}
    for mode in [] if args.no_fusion else dict.fromkeys(args.mode or [None]):
        recommended = fusions.recommended(mode)
        for alpha in _alphas(args, recommended):
            if alpha == 0.0:  # exactly the plain target, which is always measured
                continue
            fusion = fusions.make(**_options(args, mode, alpha))
            config = fusion.config
            method = Method(
                key=f"{config.mode}-{config.alpha:g}",
                title=f"{config.mode}, alpha {config.alpha:g}",
                make_processors=_factory(fusion),
                family=config.mode,
                alpha=config.alpha,
                settings={"fusion": config.to_dict(), "calibrator": fusions.calibrator.fingerprint},
                is_default=config == recommended,
            )
            methods.setdefault(method.key, method)
    return list(methods.values())


def _alphas(args: argparse.Namespace, recommended: FusionConfig) -> Sequence[float]:
    """The strengths that were asked for, else those of the mode and the one that `from_pretrained` would take."""
    if args.alpha is not None:
        return sorted(set(args.alpha))
    if args.pick_alpha or args.fluency_budget is not None:
        strengths: Sequence[float] = _MANY_ALPHAS.get(recommended.mode, _MANY_OF_MIXTURES)
    else:
        strengths = _FEW_ALPHAS.get(recommended.mode, _FEW_OF_MIXTURES)
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
        if not _is_fusion(spec):
            if spec == "temperature" and matched is None and not is_asked_for:
                notes.append("'--baseline all' leaves out temperature: there is no fusion whose entropy it could match")
                continue
            parts = Ingredients(target, guide, matched)
            found += make_baselines(spec, parts, scan=args.fluency_budget is not None)
            continue
        assert fusions is not None
        try:
            found += _fusion_baselines(fusions, spec, top_p, scan=args.fluency_budget is not None)
        except MissingHeadError as error:
            if is_asked_for:
                raise
            notes.append(f"'--baseline all' leaves out {spec}: {error}")
    return found, notes


def _fusion_baselines(fusions: BoundFusions, spec: str, top_p: float, *, scan: bool) -> list[Method]:
    """One method per strength of a specification."""
    from calibfuse.evaluation import Method

    name = spec.partition(":")[0]
    baseline = FUSION_BASELINES[name]
    before = top_p if baseline.truncates_first and top_p < 1.0 else None
    methods = []
    own = fusions.recommended(baseline.mode).alpha
    for alpha in _fusion_strengths(spec, own=own, scan=scan):
        fusion = fusions.make(baseline.part, mode=baseline.mode, alpha=alpha, **baseline.options)
        settings = {
            "baseline": name,
            "strength": alpha,
            "nucleus_before": before,
            "fusion": fusion.config.to_dict(),
            "calibrator": fusions.calibrator.fingerprint,
        }
        methods.append(
            Method(
                f"{name}-{alpha:g}",
                f"{name} {alpha:g}",
                _factory(fusion, before),
                name,
                alpha,
                settings,
                starts_at_plain=before is None,
                is_default=alpha == (own if baseline.default is None else baseline.default),
            )
        )
    return methods


def _factory(fusion: CalibFusion, top_p: float | None = None) -> Callable[[], Sequence[LogitsProcessor]]:
    if top_p is None:
        return lambda: [fusion]
    from transformers.generation.logits_process import TopPLogitsWarper

    make: Any = TopPLogitsWarper
    nucleus = make(top_p=top_p)
    return lambda: [nucleus, fusion]
