"""Decoding options of the command line."""

from __future__ import annotations

import argparse

from calibfuse.errors import InputError
from calibfuse.generation.decoding import Decoding


def add_decoding_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int, several: bool = True) -> None:
    """Add the decoding options; `several`: also beams and several continuations per prompt."""
    group = parser.add_argument_group("decoding")
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help="(default: %(default)s)")
    group.add_argument("--temperature", type=float, metavar="T", help="of sampling (default: 1)")
    group.add_argument(
        "--top-p", type=float, metavar="P", help=f"nucleus sampling; 1 is off (default: {Decoding.top_p})"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K best tokens; 0 is off (default: 0)")
    group.add_argument("--greedy", action="store_true", help="always the best token")
    if several:
        group.add_argument(
            "--num-beams", type=int, default=1, metavar="N", help="beam search (beam sampling with a sampling option)"
        )
        group.add_argument("--num-return-sequences", type=int, default=1, metavar="N", help="continuations per prompt")
    group.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")


def decoding_of(args: argparse.Namespace) -> Decoding:
    """The options that were given.

    Raises:
        InputError: a value is out of range, or two options exclude each other.
    """
    given = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(args, name)) is not None}
    num_beams = getattr(args, "num_beams", 1)
    if args.greedy and (given or num_beams != 1):
        other = _option(next(iter(given))) if given else "--num-beams"
        raise InputError(f"--greedy and {other} exclude each other; leave one of them out.")
    return Decoding(
        max_new_tokens=args.max_new_tokens,
        do_sample=not args.greedy and (num_beams == 1 or bool(given)),
        num_beams=num_beams,
        samples=getattr(args, "num_return_sequences", 1),
        seed=args.seed,
        **given,
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
