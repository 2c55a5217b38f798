"""The methods that `calibfuse evaluate` compares, from its arguments: strengths of the fusion, and baselines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from calibfuse.cli.target import Target
from calibfuse.errors import InputError

if TYPE_CHECKING:
    from calibfuse.calibrator import Calibrator
    from calibfuse.evaluation import LanguageModel, Method

_EXPERTS = "experts"
_EXPERT_STRENGTHS = (2.0,)
_NO_CLIP = 1e9  # nats
_DEFAULT_ALPHAS = (0.5, 1.0, 2.0)
_PICK_ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
_PICK_ALPHAS_OF_MIXTURES = (0.1, 0.2, 0.3, 0.5, 0.7)


def check_methods(args: argparse.Namespace) -> None:
    """Refuse bad strengths, modes and baselines before anything is loaded.

    Raises:
        InputError: out of range, or unknown.
    """
    from calibfuse.evaluation.baselines import parse_baseline
    from calibfuse.fusion import FusionConfig

    for spec in args.baseline:
        if spec.partition(":")[0] == _EXPERTS:
            _expert_strengths(spec)
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
    }
    return {name: value for name, value in values.items() if value is not None}


def fusion_methods(args: argparse.Namespace, target: Target) -> tuple[Calibrator | None, list[Method]]:
    """The calibrator, and one method per mode and strength above 0."""
    from calibfuse.calibrator import Calibrator

    methods: list[Method] = []
    if args.no_fusion and not _needs_calibrator(args):
        return None, methods
    calibrator = Calibrator.from_pretrained(args.calibrator, local_files_only=args.local_files_only)
    if args.no_fusion:
        return calibrator, methods
    for mode in dict.fromkeys(args.mode or [None]):
        for alpha in _alphas(args, mode or str(calibrator.config.fusion.get("mode", "contrast"))):
            method = _fusion_method(args, target, mode, alpha, calibrator.fingerprint)
            if method is not None and method.key not in [other.key for other in methods]:
                methods.append(method)
    return calibrator, methods


def _alphas(args: argparse.Namespace, mode: str) -> Sequence[float]:
    from calibfuse.fusion import MODES

    if args.alpha is not None:
        return sorted(set(args.alpha))
    is_mixture = mode in MODES and MODES[mode].max_alpha == 1.0
    if args.pick_alpha:
        return _PICK_ALPHAS_OF_MIXTURES if is_mixture else _PICK_ALPHAS
    return _PICK_ALPHAS_OF_MIXTURES[:3] if is_mixture else _DEFAULT_ALPHAS


def _fusion_method(
    args: argparse.Namespace, target: Target, mode: str | None, alpha: float, fingerprint: str
) -> Method | None:
    from calibfuse.evaluation import Method
    from calibfuse.processor import CalibFusion

    if alpha == 0.0:
        return None  # exactly the plain target, which is always measured
    fusion = CalibFusion.from_pretrained(
        args.calibrator,
        tokenizer=target.tokenizer,
        target=target.model,
        local_files_only=args.local_files_only,
        **_options(args, mode, alpha),
    )
    config = fusion.config
    return Method(
        key=f"{config.mode}-{config.alpha:g}",
        title=f"{config.mode}, alpha {config.alpha:g}",
        make_processors=lambda: [fusion],
        family=config.mode,
        alpha=config.alpha,
        settings={"fusion": config.to_dict(), "calibrator": fingerprint},
    )


def _needs_calibrator(args: argparse.Namespace) -> bool:
    return any(spec.partition(":")[0] == _EXPERTS for spec in args.baseline)


def baseline_methods(
    args: argparse.Namespace,
    model: LanguageModel,
    target: Target,
    methods: Sequence[Method],
    calibrator: Calibrator | None,
) -> list[Method]:
    """The methods of `--baseline`."""
    from calibfuse.evaluation.baselines import Ingredients, make_baselines
    from calibfuse.scorers import load_scorer

    if not args.baseline:
        return []
    names = {spec.partition(":")[0] for spec in args.baseline}
    guide = load_scorer("bundled") if "reward" in names else None
    strongest = max(methods, key=lambda method: method.alpha or 0.0, default=None)
    found: list[Method] = []
    for spec in args.baseline:
        if spec.partition(":")[0] == _EXPERTS:
            assert calibrator is not None
            found += [_expert_method(args, target, alpha, calibrator.fingerprint) for alpha in _expert_strengths(spec)]
        else:
            found += make_baselines(spec, Ingredients(model, guide, strongest))
    return found


def _expert_strengths(spec: str) -> tuple[float, ...]:
    """The strengths of `experts:1,2`; the paper's 2 where none are given.

    Raises:
        InputError: they are no numbers above 0.
    """
    _, colon, rest = spec.partition(":")
    if not colon:
        return _EXPERT_STRENGTHS
    try:
        strengths = tuple(float(part) for part in rest.split(","))
    except ValueError as error:
        raise InputError(f"Expected numbers after 'experts:', separated by commas, got {rest!r}.") from error
    if not all(0.0 < value < float("inf") for value in strengths):
        raise InputError(f"The strengths of the baseline 'experts' must be above 0, got {rest!r}.")
    return strengths


def _expert_method(args: argparse.Namespace, target: Target, alpha: float, fingerprint: str) -> Method:
    """Expert minus anti-expert (Liu et al. 2021) with the calibrator's two heads: both ways, without a clip."""
    from calibfuse.evaluation import Method
    from calibfuse.processor import CalibFusion

    fusion = CalibFusion.from_pretrained(
        args.calibrator,
        tokenizer=target.tokenizer,
        target=target.model,
        local_files_only=args.local_files_only,
        mode="contrast",
        alpha=alpha,
        one_sided=False,
        max_shift=_NO_CLIP,
    )
    return Method(
        key=f"experts-{alpha:g}",
        title=f"experts {alpha:g}",
        make_processors=lambda: [fusion],
        family=_EXPERTS,
        alpha=alpha,
        settings={"baseline": _EXPERTS, "fusion": fusion.config.to_dict(), "calibrator": fingerprint},
    )
