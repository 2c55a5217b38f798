"""From arguments to objects: target model, decoding, fusion; and what can be refused before any of them is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibfuse.cli.options import Fields
from calibfuse.errors import InputError
from calibfuse.generation.decoding import Decoding

if TYPE_CHECKING:
    from calibfuse.generation.language_model import LanguageModel
    from calibfuse.processor import CalibFusion

_LOADING = ("device", "dtype", "local_files_only", "trust_remote_code")
DECODING = Fields(
    "calibfuse.generation.decoding:Decoding",
    *("max_new_tokens", "temperature", "top_p", "top_k", "seed", "chat", "system"),
)
BEAMS = Fields(DECODING.source, "samples", "num_beams")


def load_target(args: argparse.Namespace) -> LanguageModel:
    """The model of `--model`; arguments as `options.add_model` adds them."""
    from calibfuse.generation.language_model import load_language_model

    options = {name: getattr(args, name) for name in _LOADING}
    return load_language_model(args.model, gguf_file=args.gguf_file, revision=args.revision, **options)


def load_second(args: argparse.Namespace, name: str, **changed: Any) -> LanguageModel:  # noqa: ANN401
    """Another model, loaded as the target is."""
    from calibfuse.generation.language_model import load_language_model

    return load_language_model(name, **({option: getattr(args, option) for option in _LOADING} | changed))


def check_model(args: argparse.Namespace, *others: str | None) -> None:
    """Refuse folders without a model before anything is loaded; what lies on the Hub is found out later."""
    from calibfuse.generation.language_model import locate

    locate(args.model, args.gguf_file, args.revision)
    for name in others:
        if name is not None:
            locate(name)


def check_calibrator(name: str | None) -> None:
    """Refuse a path that is no folder before anything is loaded."""
    from calibfuse.hub import resolve_checkpoint

    if name is not None and ("\\" in name or name.count("/") != 1 or name.startswith((".", "/", "~"))):
        resolve_checkpoint(name, local_files_only=True)


def page_of(args: argparse.Namespace) -> Path | None:
    """The file of `--html`."""
    if not args.html:
        return None
    page = Path(args.html).expanduser()
    if page.is_dir():
        raise InputError(f"--html expects a file, but {args.html!r} is a folder.")
    from calibfuse.html import require

    require("jinja2")
    return page


def decoding_of(args: argparse.Namespace) -> Decoding:
    """The decoding that was asked for; any option of a draw turns beam search into beam sampling."""
    values = DECODING.values(args)
    if hasattr(args, "num_beams"):
        values |= BEAMS.values(args)
    given = [name for name in ("temperature", "top_p", "top_k") if name in values]
    has_beams = values.get("num_beams", 1) != 1
    if args.greedy and (given or has_beams):
        other = given[0].replace("_", "-") if given else "num-beams"
        raise InputError(f"--greedy and --{other} exclude each other; leave one of them out.")
    return Decoding(**values, do_sample=not args.greedy and (not has_beams or bool(given)))


def check_fusion(args: argparse.Namespace) -> None:
    """Refuse a bad `--alpha`, `--mode` or `--calibrator` before anything large is loaded."""
    from calibfuse.fusion import FusionConfig

    FusionConfig.from_dict({key: value for key in ("alpha", "mode") if (value := getattr(args, key)) is not None})
    check_calibrator(args.calibrator)


def load_fusion(args: argparse.Namespace, target: LanguageModel) -> CalibFusion:
    """The calibrator of the arguments, bound to the target."""
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
