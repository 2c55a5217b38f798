"""What a calibrator is, in numbers that a person asks for before using it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from calibfuse.loading import PretrainedCalibrator


@dataclass(frozen=True)
class CalibratorMetadata:
    """What one calibrator is.

    Attributes:
        fingerprint: hex SHA-256 of shape and weights; the key of everything derived from them.
        heads: names of its heads.
        parameters: number of parameters of each part, by name.
        bytes_in_memory: of the weights as loaded.
        shape: sizes of its config.
        fusion: recommended options of fusion; what is missing is FusionConfig's default.
        training: what its trainer noted.
    """

    fingerprint: str
    heads: tuple[str, ...]
    parameters: Mapping[str, int]
    bytes_in_memory: int
    shape: Mapping[str, int]
    fusion: Mapping[str, Any]
    training: Mapping[str, Any]

    @property
    def parameter_count(self) -> int:
        """Parameters of all parts."""
        return sum(self.parameters.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {**asdict(self), "heads": list(self.heads), "parameter_count": self.parameter_count}


def describe_calibrator(calibrator: PretrainedCalibrator) -> CalibratorMetadata:
    """Collect what `Calibrator.from_pretrained` loaded."""
    config = calibrator.config.to_dict()
    parameters: Counter[str] = Counter()
    for name, parameter in calibrator.named_parameters():
        parameters[name.split(".")[0]] += parameter.numel()
    return CalibratorMetadata(
        fingerprint=calibrator.fingerprint,
        heads=tuple(config["heads"]),
        parameters=dict(parameters),
        bytes_in_memory=sum(parameter.nbytes for _, parameter in calibrator.named_parameters()),
        shape={name: value for name, value in config.items() if isinstance(value, int)},
        fusion=dict(config["fusion"]),
        training=dict(config["training"]),
    )
