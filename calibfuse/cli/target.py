"""The arguments of the target model and of the calibrator, which several commands share, and the loading of both."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calibfuse.generation.language_model import LanguageModel
    from calibfuse.processor import CalibFusion


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--model` and what belongs to it."""
    group = parser.add_argument_group("target model")
    group.add_argument(
        "--model",
        "--target",
        metavar="PATH_OR_HUB",
        help="folder or Hub id of a causal language model (default: the demo target)",
    )
    group.add_argument("--gguf-file", metavar="NAME", help="GGUF file in that folder or repository")
    group.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: the checkpoint's own, but float32 on a CPU",
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


def load_fusion(args: argparse.Namespace, target: LanguageModel) -> CalibFusion:
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


def load_target_of(args: argparse.Namespace) -> LanguageModel:
    """`load_language_model` from the arguments that `add_target_arguments` added."""
    from calibfuse.generation.language_model import load_language_model

    return load_language_model(
        args.model,
        gguf_file=args.gguf_file,
        device=args.device,
        dtype=args.dtype,
        revision=args.revision,
        local_files_only=args.local_files_only,
        trust_remote_code=args.trust_remote_code,
    )
