"""A causal language model and its tokenizer, from a folder, a GGUF file or the Hub; one sentence where it fails."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibfuse.errors import CheckpointError, InputError, MissingDependencyError, reason_of
from calibfuse.hub import CONFIG_NAME, check_repository, find_folder, read_json, resolve_checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEMO_TARGET = "demo-target"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_GGUF = ".gguf"


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model with its tokenizer: the target, or a judge of fluency."""

    name: str  # in reports and messages, as the user gave it
    model: PreTrainedModel  # in evaluation mode, on its device
    tokenizer: PreTrainedTokenizerBase
    is_bundled: bool = False  # whether it is the small demo target that comes with calibfuse


def load_language_model(
    name: str | None,
    *,
    gguf_file: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: local folder, Hub id, or a GGUF file; None: the bundled demo target.
        gguf_file: name of a GGUF file in that folder or repository; its weights are widened to `dtype`.
        device: as torch names it; None: CUDA, else MPS, else CPU.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own on an accelerator, float32 on a CPU,
            where half precision is slow.
        revision: on the Hub.
        local_files_only: never touch the network.
        trust_remote_code: run Python code that the model brings along.

    The tokenizer pads on the left.

    Raises:
        CheckpointError: there is no such model, it is damaged or of another kind, or it does not fit into memory.
        InputError: the device is not there, or a revision was given for a local folder.
        MissingDependencyError: a GGUF file without the package `gguf`.
    """
    place = choose_device(device)
    source, gguf_file = locate(name, gguf_file, revision)
    options: dict[str, Any] = {
        "gguf_file": gguf_file,
        "revision": revision,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
    }
    tokenizer = read_tokenizer(source, **options)
    tokenizer.padding_side = "left"
    wanted = "float32" if dtype == "auto" and (place.type == "cpu" or gguf_file is not None) else dtype
    model = read_model(source, device=place, dtype=wanted, **options)
    if gguf_file is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id  # the file tells it of the tokenizer alone
    shown = DEMO_TARGET if name is None else source if gguf_file is None else str(Path(source) / gguf_file)
    return LanguageModel(shown, model, tokenizer, is_bundled=name is None)


def read_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:  # noqa: ANN401
    """A tokenizer from where `locate` found it, or CheckpointError; options that are None are left out."""
    if find_folder(source, "model") is None:
        check_repository(
            source, revision=options.get("revision"), local_files_only=bool(options.get("local_files_only"))
        )
    tokenizer: PreTrainedTokenizerBase = _read("AutoTokenizer", "tokenizer of", source, options)
    return tokenizer


def read_model(source: str, *, device: torch.device | str, dtype: str, **options: Any) -> PreTrainedModel:  # noqa: ANN401
    """A causal language model in evaluation mode, from where `locate` found it; see `read_tokenizer`."""
    model: PreTrainedModel = _read("AutoModelForCausalLM", "model", source, options | {"dtype": dtype}, device)
    return model


def read_config(source: str, **options: Any) -> PretrainedConfig:  # noqa: ANN401
    """A model's configuration, from where `locate` found it; see `read_tokenizer`."""
    config: PretrainedConfig = _read("AutoConfig", "configuration of", source, options)
    return config


def _read(kind: str, what: str, source: str, options: dict[str, Any], device: torch.device | str | None = None) -> Any:  # noqa: ANN401
    import transformers

    from calibfuse.loading import quiet_transformers

    given = {"trust_remote_code": False} | {key: value for key, value in options.items() if value is not None}
    # transformers, its tokenizers, the Hub's client and torch each raise errors of their own; whatever it is, the
    # thing could not be loaded.
    try:
        with quiet_transformers():
            loaded = getattr(transformers, kind).from_pretrained(source, **given)
        return loaded if device is None else loaded.to(device).eval()
    except Exception as error:
        raise CheckpointError(f"Cannot load the {what} {source!r}: {reason_of(error)}.") from error


def locate(name: str | None, gguf_file: str | None = None, revision: str | None = None) -> tuple[str, str | None]:
    """What transformers is to load: a folder or Hub id, and the GGUF file in it; errors of `load_language_model`."""
    if name is None:
        if gguf_file is not None or revision is not None:
            raise InputError("A GGUF file or a revision was given without a model; name its folder or Hub id as well.")
        return str(resolve_checkpoint(None, default=DEMO_TARGET)), None
    place = Path(name).expanduser()
    if place.is_file() and place.suffix == _GGUF and gguf_file is None:
        name, gguf_file = str(place.parent), place.name
    folder = find_folder(name, "model", revision=revision)
    if folder is not None:
        _check_folder(folder, gguf_file)
    if gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError("Reading a GGUF file needs the package gguf: pip install gguf.")
    return name if folder is None else str(folder), gguf_file


def _check_folder(folder: Path, gguf_file: str | None) -> None:
    """Refuse folders that hold no model; what transformers says about them is long and of something else."""
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise CheckpointError(f"There is no file {gguf_file!r} in the folder {str(folder)!r}.")
        return
    if not (folder / CONFIG_NAME).is_file():
        found = sorted(path.name for path in folder.glob(f"*{_GGUF}"))
        hint = f"; for {found[0]!r} give that file" if found else ""
        raise CheckpointError(
            f"Expected a transformers model in the folder {str(folder)!r}, but it has no {CONFIG_NAME}{hint}."
        )
    kind = read_json(folder / CONFIG_NAME, "configuration of a target model").get("format", "")
    if str(kind).startswith("calibfuse-"):
        raise CheckpointError(
            f"Expected a language model in the folder {str(folder)!r}, but it holds a {kind}: is it the calibrator?"
        )


def choose_device(device: str | None) -> torch.device:
    """The device of a name (InputError where it is not there), or for None the best: CUDA, else MPS, else CPU."""
    import torch

    from calibfuse.loading import as_device

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    chosen = as_device(device or best)
    assert chosen is not None
    return chosen
