"""From what a user writes (`--scorer ...`) to a scorer."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from calibfuse.errors import CheckpointError, InputError, ScorerError
from calibfuse.hub import CONFIG_NAME, read_json, resolve_checkpoint
from calibfuse.scorers.adapters import FunctionScorer, TransformersScorer
from calibfuse.scorers.checks import ToxicityScorer
from calibfuse.scorers.linear import FORMAT, LinearScorer

_BUNDLED = "default-scorer"
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
ScorerSpec = str | os.PathLike[str] | Callable[[list[str]], Any] | ToxicityScorer | None


def load_scorer(
    spec: ScorerSpec = None,
    *,
    label: str | None = None,
    batch_size: int = 32,
    fast: bool = False,
    device: str | torch.device | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> ToxicityScorer:
    """Load a toxicity scorer.

    Args:
        spec: None or "bundled" for the one that comes with calibfuse; the folder or Hub id of a linear scorer or of
            a transformers text-classification model; "module:function", a function that takes a list of texts and
            returns their probabilities; such a function; or a scorer.
        label: name of the toxic class of a transformers model; None finds it by name.
        batch_size: texts per forward pass of a transformers model.
        fast: a transformers model may compute in bfloat16, for scores within 0.01; for sorting much text.
        device: where a transformers model runs; None is the CPU.
        revision: branch, tag or commit on the Hub.
        local_files_only: True for no network access.

    CheckpointError: a folder or Hub id that holds no scorer, or a damaged one. InputError: a function that does not
    exist, or a model without a toxic class. ScorerError: `spec` is none of the above.

    Example:
        >>> scorer = load_scorer(lambda texts: [0.5 for _ in texts])
        >>> scorer.score(["hello", "world"]).tolist()
        [0.5, 0.5]
    """
    if spec is None or spec == "bundled":
        return LinearScorer.load(resolve_checkpoint(None, default=_BUNDLED))
    if not isinstance(spec, str | os.PathLike):
        return _from_object(spec)
    text = os.fspath(spec)
    if not Path(text).expanduser().exists() and _FUNCTION.fullmatch(text):
        return _from_object(import_object(text), text)
    source: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    config_folder = resolve_checkpoint(text, allow_patterns=[CONFIG_NAME], **source)
    kind = read_json(config_folder / CONFIG_NAME, "configuration of a toxicity scorer").get("format")
    if kind == FORMAT:
        return LinearScorer.load(resolve_checkpoint(text, **source))
    if kind is not None:
        raise CheckpointError(f"Expected a toxicity scorer, but {text!r} holds a checkpoint of the format {kind!r}.")
    return TransformersScorer.from_pretrained(
        text, device=device, **source, label=label, batch_size=batch_size, fast=fast
    )


def _from_object(value: object, name: str | None = None) -> ToxicityScorer:
    """Make a scorer of a scorer or a function; both are checked."""
    if isinstance(value, LinearScorer | FunctionScorer):
        return value
    function = value.score if hasattr(value, "score") else value
    if callable(function):
        own = getattr(value, "name", None) or name or getattr(value, "__name__", type(value).__name__)
        return FunctionScorer(function, str(own))
    raise ScorerError(
        f"Expected a toxicity scorer, its name or a function from texts to probabilities, got {type(value).__name__}"
    )


def import_object(spec: str, role: str = "scorer") -> Any:  # noqa: ANN401
    """Import `module:name`; the working directory counts as a place of modules, as it does for `python`."""
    module_name, _, attribute = spec.partition(":")
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: importing it may raise any error
        raise InputError(
            f"The {role} {spec!r} needs a module {module_name!r}, which cannot be imported: {error}"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise InputError(f"Module {module_name!r} has no {attribute!r} to use as {role}") from error
    return found
