"""Finished stages of an evaluation (scores, a suite, timings), each one JSON file, so that a killed run goes on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from calibfuse.hub import write_files

_FORMAT = {"format": "calibfuse-evaluation-stage", "format_version": 3}
_Found = TypeVar("_Found")


def run_stage(
    path: str | os.PathLike[str],
    kind: type[_Found],
    settings: Mapping[str, Any],
    compute: Callable[[], _Found],
    *,
    resume: bool,
) -> _Found:
    """What a stage found: from its file, where that was made with the same settings, else computed and written.

    `kind` is a dataclass of numbers, texts, arrays, tuples, dictionaries by text, and such dataclasses; `settings` are
    JSON values that determine the result. A damaged file counts as none, and without `resume` none is looked for.
    """
    place = Path(path)
    header = json.loads(json.dumps({**_FORMAT, "settings": settings}))
    if resume:
        # Whatever is wrong with the file, its stage can be computed again.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            data = json.loads(place.read_bytes())
            if {name: data[name] for name in header} == header:
                found: _Found = _decode(kind, data["found"])
                return found
    found = compute()
    encoded = json.dumps({**header, "found": found}, default=_encode)
    write_files(place.parent, {place.name: encoded.encode("utf-8")})
    return found


def _encode(value: Any) -> Any:  # noqa: ANN401
    """What `json.dumps` does not know."""
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
