"""CalibFusion as methods of a comparison: the strengths of the user's fusion, and three published methods made of it.

| name | source | how it is made of the calibrator |
|---|---|---|
| experts | DExperts, Liu et al. 2021 | both heads, both ways, unclipped, after the target's nucleus |
| geometric | the non-toxic model alone, and mixtures with it | log-linear; 1 is the non-toxic model alone |
| embedding | Tian et al. 2025 | fusion of last hidden states; needs `calibfuse align` |
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calibfuse.errors import InputError

if TYPE_CHECKING:
    from transformers import LogitsProcessor

    from calibfuse.evaluation import Method
    from calibfuse.fusion import FusionConfig
    from calibfuse.generation.language_model import LanguageModel
    from calibfuse.processor import CalibFusion

_NO_CLIP = 1e9  # nats


@dataclass(frozen=True)
class FusionBaseline:
    """A published method that is a setting of CalibFusion.

    Attributes:
        mode: of the fusion.
        default: the paper's strength.
        scan: strengths to search the best one among, with the default.
        options: of the fusion.
        truncates_first: whether the target's nucleus is taken before the fusion.
    """

    mode: str
    default: float
    scan: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    truncates_first: bool = False


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
}


def parse_fusion_baseline(spec: str, *, scan: bool = False) -> tuple[str, tuple[float, ...]]:
    """Name and strengths of a specification such as `experts:1,2`; the paper's where none are given.

    Args:
        spec: "name" or "name:strength,strength".
        scan: without strengths in it, also those among which the best one is searched.

    Returns:
        A key of FUSION_BASELINES, and strengths above 0.

    Raises:
        InputError: the strengths are no numbers, or out of the mode's range.
    """
    from calibfuse.fusion import FusionConfig

    name, colon, rest = spec.partition(":")
    baseline = FUSION_BASELINES[name]
    if not colon:
        strengths = tuple(sorted({baseline.default, *(baseline.scan if scan else ())}))
    else:
        try:
            strengths = tuple(float(part) for part in rest.split(","))
        except ValueError as error:
            raise InputError(f"Expected numbers after {name + ':'!r}, separated by commas, got {rest!r}.") from error
    for value in strengths:
        if value == 0.0:
            raise InputError(f"The strengths of the baseline {name!r} must be above 0, got {rest!r}.")
        FusionConfig(mode=baseline.mode, alpha=value)
    return name, strengths


class BoundFusions:
    """Fusions with the calibrator of `--calibrator`, which is loaded and bound to the target once.

    Args:
        args: of the command.
        target: the model.
    """

    def __init__(self, args: argparse.Namespace, target: LanguageModel) -> None:
        from calibfuse.calibrator import Calibrator

        self.calibrator = Calibrator.from_pretrained(args.calibrator, local_files_only=args.local_files_only)
        self._args = args
        self._target = target
        self._guide = self.calibrator.bind(target.tokenizer, device=target.model.device)

    def recommended(self, mode: str | None) -> FusionConfig:
        """What `from_pretrained` would take in a mode; None: the calibrator's."""
        from calibfuse.fusion import recommended_config

        return recommended_config(self.calibrator.config.fusion, {} if mode is None else {"mode": mode})

    def make(self, **options: Any) -> CalibFusion:  # noqa: ANN401
        """A fusion with options of FusionConfig over the recommended ones.

        Raises:
            InputError: an option is out of range.
            MissingHeadError: the mode needs a head that the calibrator has not, or an alignment with the target.
        """
        from calibfuse.fusion import MODES, recommended_config
        from calibfuse.processor import CalibFusion

        config = recommended_config(self.calibrator.config.fusion, options)
        if MODES[config.mode].fuse is not None:
            return CalibFusion(self._guide, config)
        return CalibFusion.from_pretrained(  # finds the alignment
            self._args.calibrator,
            tokenizer=self._target.tokenizer,
            target=self._target.model,
            local_files_only=self._args.local_files_only,
            **options,
        )


def fusion_baseline_methods(args: argparse.Namespace, fusions: BoundFusions, spec: str) -> list[Method]:
    """One method per strength of a specification.

    Raises:
        MissingHeadError: mode embedding, and the calibrator has no alignment with the target.
    """
    from calibfuse.evaluation import Method

    name, strengths = parse_fusion_baseline(spec, scan=args.fluency_budget is not None)
    baseline = FUSION_BASELINES[name]
    methods = []
    for alpha in strengths:
        fusion = fusions.make(mode=baseline.mode, alpha=alpha, **baseline.options)
        before = args.top_p if baseline.truncates_first and args.top_p < 1.0 else None
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
                is_default=alpha == baseline.default,
            )
        )
    return methods


def _factory(fusion: CalibFusion, top_p: float | None) -> Callable[[], Sequence[LogitsProcessor]]:
    if top_p is None:
        return lambda: [fusion]
    from transformers.generation.logits_process import TopPLogitsWarper

    make: Any = TopPLogitsWarper
    nucleus = make(top_p=top_p)
    return lambda: [nucleus, fusion]
