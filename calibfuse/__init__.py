"""calibfuse: make a language model say fewer harmful things, at decoding time.

A small calibrator, trained once on non-toxic text, runs beside any target model; its next-token distribution is fused
with the target's own at the output layer. `CalibFusion` is the one name most users need:

    fusion = CalibFusion.from_pretrained(tokenizer=tokenizer)
    model.generate(**inputs, logits_processor=[fusion])

The names below are imported on first use (PEP 562), so that `calibfuse --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from calibfuse.calibrator import BoundCalibrator, Calibrator
    from calibfuse.errors import (
        CalibfuseError,
        CheckpointError,
        CheckpointFormatError,
        DataError,
        FusionNotAppliedError,
        InputError,
        MissingDependencyError,
        MissingHeadError,
        ScorerError,
        VocabularyError,
        VocabularyMismatchError,
    )
    from calibfuse.fusion import FusionConfig
    from calibfuse.processor import CalibFusion
    from calibfuse.vocabulary import Vocabulary

__all__ = [
    "BoundCalibrator",
    "CalibFusion",
    "CalibfuseError",
    "Calibrator",
    "CheckpointError",
    "CheckpointFormatError",
    "DataError",
    "FusionConfig",
    "FusionNotAppliedError",
    "InputError",
    "MissingDependencyError",
    "MissingHeadError",
    "ScorerError",
    "Vocabulary",
    "VocabularyError",
    "VocabularyMismatchError",
    "__version__",
]

# Every public name that does not come from `errors`.
_MODULE_OF = {
    "BoundCalibrator": "calibfuse.calibrator",
    "CalibFusion": "calibfuse.processor",
    "Calibrator": "calibfuse.calibrator",
    "FusionConfig": "calibfuse.fusion",
    "Vocabulary": "calibfuse.vocabulary",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'calibfuse' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF.get(name, "calibfuse.errors")), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
