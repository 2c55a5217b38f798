"""The methods that `calibfuse evaluate` compares, from its arguments: strengths of the fusion, and baselines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from calibfuse.cli.fusion_methods import (
    FUSION_BASELINES,
    BoundFusions,
    fusion_baseline_methods,
    parse_fusion_baseline,
)

if TYPE_CHECKING:
    from calibfuse.evaluation import Method
    from calibfuse.fusion import FusionConfig
    from calibfuse.generation.language_model import LanguageModel

_ALL = "all"
_FEW_ALPHAS = {"contrast": (1.0, 3.0, 5.0), "value": (0.5, 1.0, 2.0)}
_MANY_ALPHAS = {"contrast": (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0), "value": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)}
_FEW_OF_MIXTURES = (0.1, 0.2, 0.3)  # alpha ends at 1 there
_MANY_OF_MIXTURES = (0.1, 0.2, 0.3, 0.5, 0.7)


def check_methods(args: argparse.Namespace) -> None:
    """Refuse bad strengths, modes and baselines before anything is loaded.

    Raises:
        InputError: out of range, or unknown.
    """
    from calibfuse.evaluation.baselines import parse_baseline
    from calibfuse.fusion import FusionConfig

    for spec in _specs(args):
        if _is_fusion(spec):
            parse_fusion_baseline(spec)
        else:
            parse_baseline(spec)
    for mode in args.mode or [None]:
        for alpha in args.alpha or [None]:
            FusionConfig.from_dict(_options(args, mode, alpha))


def _options(args: argparse.Namespace, mode: str | None, alpha: float | None) -> dict[str, Any]:
    """The fusion options that were given."""
    values = {
        "mode": mode,
        "alpha": alpha,
        "candidates": args.candidates,
        "margin": args.margin,
        "max_shift": args.max_shift,
        "one_sided": args.one_sided,
        "hold": args.hold,
    }
    return {name: value for name, value in values.items() if value is not None}


def bind_calibrator(args: argparse.Namespace, target: LanguageModel) -> BoundFusions | None:
    """The calibrator, bound to the target; None: no method that was asked for needs it."""
    if args.no_fusion and not any(map(_is_fusion, _specs(args))):
        return None
    return BoundFusions(args, target)


def fusion_methods(args: argparse.Namespace, fusions: BoundFusions) -> list[Method]:
    """One method per mode and strength above 0."""
    methods: dict[str, Method] = {}
    for mode in [] if args.no_fusion else dict.fromkeys(args.mode or [None]):
        recommended = fusions.recommended(mode)
        for alpha in _alphas(args, recommended):
            if alpha > 0.0:  # 0 is exactly the plain target, which is always measured
                method = _fusion_method(fusions, _options(args, mode, alpha), recommended)
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


def _fusion_method(fusions: BoundFusions, options: dict[str, Any], recommended: FusionConfig) -> Method:
    from calibfuse.evaluation import Method

    fusion = fusions.make(**options)
    config = fusion.config
    return Method(
        key=f"{config.mode}-{config.alpha:g}",
        title=f"{config.mode}, alpha {config.alpha:g}",
        make_processors=lambda: [fusion],
        family=config.mode,
        alpha=config.alpha,
        settings={"fusion": config.to_dict(), "calibrator": fusions.calibrator.fingerprint},
        is_default=config == recommended,
    )


def _specs(args: argparse.Namespace) -> list[str]:
    """The baselines that were asked for, `all` written out; strengths of one's own stand for a baseline of `all`."""
    from calibfuse.evaluation.baselines import BASELINES

    given = [spec for spec in args.baseline if spec != _ALL]
    named = {spec.partition(":")[0] for spec in given}
    others = [*BASELINES, *FUSION_BASELINES] if _ALL in args.baseline else []
    return list(dict.fromkeys([*given, *(name for name in others if name not in named)]))


def _is_fusion(spec: str) -> bool:
    return spec.partition(":")[0] in FUSION_BASELINES


def baseline_methods(
    args: argparse.Namespace,
    model: LanguageModel,
    methods: Sequence[Method],
    fusions: BoundFusions | None,
) -> tuple[list[Method], list[str]]:
    """The methods of `--baseline`, and notes on what `all` had to leave out."""
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
            parts = Ingredients(model, guide, matched)
            found += make_baselines(spec, parts, scan=args.fluency_budget is not None)
            continue
        assert fusions is not None
        try:
            found += fusion_baseline_methods(args, fusions, spec)
        except MissingHeadError as error:
            if is_asked_for:
                raise
            notes.append(f"'--baseline all' leaves out {spec}: {error}")
    return found, notes
