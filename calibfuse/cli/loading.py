"""From arguments to objects: target model, decoding, fusion; and what can be refused before any of them is loaded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from calibfuse.cli.options import Fields
from calibfuse.errors import InputError
from calibfuse.generation.decoding import Decoding

if TYPE_CHECKING:
    from calibfuse.generation.language_model import LanguageModel
    from calibfuse.processor import CalibFusion

_LOADING = ("device", "dtype", "trust_remote_code")
DECODING = Fields(
    "calibfuse.generation.decoding:Decoding",
    *("max_new_tokens", "temperature", "top_p", "top_k", "seed", "chat", "system"),
)


def load_model(args: argparse.Namespace, name: str | None, **changed: Any) -> LanguageModel:  # noqa: ANN401
    """A model, as the arguments that `options.add_model` adds say."""
    from transformers.utils import logging

    from calibfuse.generation.language_model import load_language_model

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its advice is no part of a command's output
    return load_language_model(name, **({option: getattr(args, option) for option in _LOADING} | changed))


def check_model(args: argparse.Namespace, *others: str | None) -> None:
    """Refuse folders without a model before anything is loaded; what lies on the Hub is found out later."""
    from calibfuse.generation.language_model import locate

    locate(args.model)
    for name in others:
        if name is not None:
            locate(name)


def check_calibrator(name: str | None) -> None:
    """Refuse a path that is no folder before anything is loaded."""
    from calibfuse.hub import resolve_checkpoint

    if name is not None and ("\\" in name or name.count("/") != 1 or name.startswith((".", "/", "~"))):
        resolve_checkpoint(name, local_files_only=True)


def decoding_of(args: argparse.Namespace) -> Decoding:
    """The decoding that was asked for."""
    values = DECODING.values(args)
    if hasattr(args, "samples") and args.samples is not None:
        values["samples"] = args.samples
    drawn = [name for name in ("temperature", "top_p", "top_k") if name in values]
    if args.greedy and drawn:
        raise InputError(f"--greedy and --{drawn[0].replace('_', '-')} exclude each other; leave one of them out.")
    return Decoding(**values, do_sample=not args.greedy)


def check_fusion(args: argparse.Namespace) -> None:
    """Refuse a bad `--alpha`, `--mode`, `--calibrator` or list of words before anything large is loaded."""
    from calibfuse.fusion import FusionConfig

    FusionConfig.from_dict({key: value for key in ("alpha", "mode") if (value := getattr(args, key)) is not None})
    check_calibrator(args.calibrator)
    words_of(args)


def words_of(args: argparse.Namespace) -> dict[str, float]:
    """The words of `--words` and `--protect-names`, with their biases."""
    if args.words is None and args.protect_names is None:
        return {}
    from calibfuse.calibrator.word_bias import LOWERED, PROTECTED, read_words

    given = ((args.words, LOWERED), (args.protect_names, PROTECTED))
    return {word: bias for path, own in given if path is not None for word, bias in read_words(path, own).items()}


def load_fusion(args: argparse.Namespace, target: LanguageModel) -> CalibFusion:
    """The calibrator of the arguments, bound to the target."""
    from calibfuse.processor import CalibFusion

    fusion = CalibFusion.from_pretrained(
        args.calibrator,
        tokenizer=target.tokenizer,
        target=target.model,
        alpha=args.alpha,
        mode=args.mode,
        device=target.model.device,
    )
    words = words_of(args)
    return fusion.add_words(words) if words else fusion
