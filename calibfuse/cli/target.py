"""The target model of a command: its arguments, its loading, and one sentence where it cannot be loaded.

transformers reports a model that it cannot load by a dozen kinds of exceptions, some of them many lines long; here each
becomes a CheckpointError. Also the arguments of the calibrator, which `generate` and `inspect` share.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibfuse.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from calibfuse.processor import CalibFusion

DEMO_TARGET = "demo-target"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REASON_LENGTH = 200
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Target:
    """A loaded target model.

    Attributes:
        name: as the user gave it.
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer.
        is_bundled: whether it is the small demo target that comes with calibfuse.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    is_bundled: bool


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--model` and what belongs to it."""
    group = parser.add_argument_group("target model")
    group.add_argument(
        "--model",
        "--target",
        metavar="PATH_OR_HUB",
        help="folder or Hub id of a causal language model (default: the demo target)",
    )
    group.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    group.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="auto: the checkpoint's own, but float32 on a CPU"
    )
    group.add_argument("--local-files-only", action="store_true", help="never touch the network")
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that the model brings along")


def add_fusion_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--calibrator`, `--alpha` and `--mode`."""
    group = parser.add_argument_group("calibrator")
    group.add_argument("--calibrator", metavar="PATH_OR_HUB", help="folder or Hub id (default: the bundled one)")
    group.add_argument("--alpha", type=float, help="strength; 0 is off (default: what the calibrator recommends)")
    group.add_argument("--mode", help="contrast, geometric, blend, ... (default: what the calibrator recommends)")


def check_fusion_arguments(args: argparse.Namespace) -> None:
    """Refuse a bad `--alpha` or `--mode` before anything large is loaded.

    Raises:
        InputError: out of range, or unknown.
    """
    from calibfuse.fusion import FusionConfig

    FusionConfig.from_dict({key: value for key in ("alpha", "mode") if (value := getattr(args, key)) is not None})


def load_fusion(args: argparse.Namespace, target: Target) -> CalibFusion:
    """Load the calibrator of the arguments and bind it to the target.

    Raises:
        CalibfuseError: as `CalibFusion.from_pretrained`.
    """
    from calibfuse.processor import CalibFusion

    return CalibFusion.from_pretrained(
        args.calibrator,
        tokenizer=target.tokenizer,
        target=target.model,
        alpha=args.alpha,
        mode=args.mode,
        device=target.model.device,
        local_files_only=args.local_files_only,
    )


def load_target(
    name: str | None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> Target:
    """Load a causal language model and its tokenizer.

    Args:
        name: local folder or Hub id; None: the bundled demo target.
        device: as torch names it; None: CUDA, else MPS, else CPU.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own on an accelerator, float32 on a CPU,
            where half precision is slow.
        revision: on the Hub.
        local_files_only: never touch the network.
        trust_remote_code: run Python code that the model brings along.

    Returns:
        The model and its tokenizer; the tokenizer pads on the left.

    Raises:
        CheckpointError: there is no such model, it is damaged or of another kind, or it does not fit into memory.
        InputError: the device is not there.
    """
    place = choose_device(device)
    path, source = _locate(name)
    options: dict[str, Any] = {"local_files_only": local_files_only, "trust_remote_code": trust_remote_code}
    if revision is not None:
        if path is not None:
            raise InputError(f"Revision {revision!r} was given, but the model is the local folder {source!r}.")
        options["revision"] = revision
    _quiet_transformers()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = "float32" if dtype == "auto" and place.type == "cpu" else dtype
    shown = "the bundled demo target" if name is None else repr(source)
    # transformers, its tokenizers, the Hub's client and torch each raise errors of their own; whatever it is, the
    # model could not be loaded.
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        raise CheckpointError(f"Cannot load the tokenizer of {shown}: {_reason(error)}.") from error
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=wanted, **options)
        model = model.to(place).eval()
    except Exception as error:
        raise CheckpointError(f"Cannot load the model {shown}: {_reason(error)}.") from error
    tokenizer.padding_side = "left"
    return Target(
        name=DEMO_TARGET if name is None else source, model=model, tokenizer=tokenizer, is_bundled=name is None
    )


def load_tokenizer(name: str, *, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer alone.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    _quiet_transformers()
    from transformers import AutoTokenizer

    source = str(Path(name).expanduser())
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=local_files_only, trust_remote_code=False)
    except Exception as error:  # as in load_target
        raise CheckpointError(f"Cannot load the tokenizer {name!r}: {_reason(error)}.") from error


def load_target_of(args: argparse.Namespace) -> Target:
    """`load_target` from the arguments that `add_target_arguments` added."""
    return load_target(
        args.model,
        device=args.device,
        dtype=args.dtype,
        revision=args.revision,
        local_files_only=args.local_files_only,
        trust_remote_code=args.trust_remote_code,
    )


def _locate(name: str | None) -> tuple[Path | None, str]:
    """The local folder, if it is one, and what transformers is to load."""
    from calibfuse.hub import resolve_checkpoint

    if name is None:
        folder = resolve_checkpoint(None, default=DEMO_TARGET)
        return folder, str(folder)
    if not name.strip():
        raise CheckpointError("Expected a folder or a Hub id after --model, got an empty name.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder, name)
        return folder, str(folder)
    if folder.exists():
        raise CheckpointError(f"Expected the folder of a model, but {name!r} is a file; give the folder around it.")
    if not _REPO_ID.fullmatch(name):
        raise CheckpointError(f"There is no model folder {name!r}, and it cannot be the id of a Hub repository.")
    return None, name


def _check_folder(folder: Path, name: str) -> None:
    """Refuse folders that hold no model; what transformers says about them is long and of something else."""
    from calibfuse.hub import CONFIG_NAME, read_json

    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"Expected a transformers model in the folder {name!r}, but it has no {CONFIG_NAME}.")
    kind = read_json(folder / CONFIG_NAME, "configuration of a target model").get("format", "")
    if str(kind).startswith("calibfuse-"):
        raise CheckpointError(
            f"Expected a target model in the folder {name!r}, but it holds a {kind}; a calibrator goes to --calibrator."
        )


def choose_device(device: str | None) -> torch.device:
    """The device of a name, or for None the best there is: CUDA, else MPS, else CPU.

    Raises:
        InputError: torch does not know it, or it is not there.
    """
    import torch

    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"Unknown device {device!r}; expected cpu, cuda, cuda:1, mps or the like.") from error
    try:
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"The device {device!r} cannot be used here: {_reason(error)}.") from error
    return chosen


def _quiet_transformers() -> None:
    """Keep transformers' progress bars and advice out of a command's output."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _reason(error: BaseException) -> str:
    """Why, in one line of at most 200 characters, without a closing full stop."""
    line = " ".join(str(error).split()) or type(error).__name__
    return (line if len(line) <= _REASON_LENGTH else f"{line[:_REASON_LENGTH]}...").rstrip(".:")
