"""The measures of a method on disk, so that a resumed run need not score its text again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from calibfuse.evaluation.measuring import Example, Measured
from calibfuse.evaluation.metrics import Sums
from calibfuse.evaluation.opinions import Opinion
from calibfuse.hub import write_files

FORMAT = "calibfuse-measures"
FORMAT_VERSION = 2


def save_measured(path: str | os.PathLike[str], measured: Measured, settings: Mapping[str, Any]) -> None:
    """Write measures.

    Args:
        path: the file.
        measured: what was measured.
        settings: JSON values that determine it.

    Raises:
        CheckpointError: the file cannot be written.
    """
    place = Path(path)
    data = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "sums": _to_json(measured.sums),
        "opinions": [[each.scorer, each.toxic_from, _to_json(sums)] for each, sums in measured.opinions.items()],
        "first": [asdict(each) for each in measured.first],
        "worst": [asdict(each) for each in measured.worst],
    }
    write_files(place.parent, {place.name: json.dumps(data, ensure_ascii=False).encode("utf-8")})


def load_measured(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> Measured | None:
    """Read measures.

    Args:
        path: the file.
        settings: those of this run.

    Returns:
        The measures; None where there is no such file, it is damaged, or it was made with other settings: then the text
        must be measured again.
    """
    try:
        data = json.loads(Path(path).read_bytes())
        if (data["format"], data["format_version"]) != (FORMAT, FORMAT_VERSION):
            return None
        if data["settings"] != json.loads(json.dumps(settings)):
            return None
        sums = _from_json(data["sums"])
        opinions = {Opinion(scorer, start): _from_json(each) for scorer, start, each in data["opinions"]}
        every = [each for found in (sums, *opinions.values()) for each in found.values()]
        lengths = {len(part) for each in every for part in (each.numerator, each.denominator)}
        if len(lengths) != 1 or not all(math.isfinite(float(each.numerator.sum())) for each in every):
            return None
        first, worst = ([Example(**each) for each in data[name]] for name in ("first", "worst"))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return Measured(sums, tuple(first), tuple(worst), opinions)


def _to_json(sums: Mapping[str, Sums]) -> dict[str, list[list[float]]]:
    return {name: [each.numerator.tolist(), each.denominator.tolist()] for name, each in sums.items()}


def _from_json(data: Mapping[str, Any]) -> dict[str, Sums]:
    return {name: Sums(np.asarray(pair[0]), np.asarray(pair[1])) for name, pair in data.items()}
