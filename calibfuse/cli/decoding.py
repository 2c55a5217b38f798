"""Decoding options of the command line, and the continuation of prompts with or without the calibrator."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibfuse.errors import InputError
from calibfuse.generation.continuations import (
    Continuation,
    encode,
    end_ids,
    find_padding_id,
    pad_left,
    position_limit,
    read_continuation,
)

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from calibfuse.cli.target import Target
    from calibfuse.processor import CalibFusion

DEFAULT_TOP_P = 0.9


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: at most so many per continuation; at least 1.
        do_sample: draw tokens; else the best token, or the best beam.
        temperature: above 0; of the draw.
        top_p: draw from the smallest set of tokens with this probability, in (0, 1]; 1 is off.
        top_k: draw from so many best tokens; 0 is off.
        num_beams: beams; 1 is off.
        num_return_sequences: continuations per prompt.
    """

    max_new_tokens: int = 40
    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = DEFAULT_TOP_P
    top_k: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value is out of range, or two options exclude each other.
        """
        for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
            if getattr(self, name) < 1:
                raise InputError(f"{_option(name)} must be at least 1, got {getattr(self, name)}.")
        if not 0.0 < self.temperature < float("inf"):
            raise InputError(f"--temperature must be above 0, got {self.temperature}; for no randomness use --greedy.")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"--top-p must be above 0 and at most 1, got {self.top_p}.")
        if self.top_k < 0:
            raise InputError(f"--top-k must be 0 (off) or positive, got {self.top_k}.")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise InputError(
                f"Without sampling there are only {self.num_beams} different continuations, but "
                f"--num-return-sequences is {self.num_return_sequences}."
            )

    def options(self) -> dict[str, Any]:
        """The arguments of transformers' `generate`."""
        values: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            "num_beams": self.num_beams,
            "num_return_sequences": self.num_return_sequences,
        }
        if self.do_sample:
            values |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return values


def add_decoding_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int, several: bool = True) -> None:
    """Add the decoding options; `several`: also beams and several continuations per prompt."""
    group = parser.add_argument_group("decoding")
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help="(default: %(default)s)")
    group.add_argument("--temperature", type=float, metavar="T", help="of sampling (default: 1)")
    group.add_argument(
        "--top-p", type=float, metavar="P", help=f"nucleus sampling; 1 is off (default: {DEFAULT_TOP_P})"
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
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must lie in 0..2**63-1, got {args.seed}.")
    return Decoding(
        max_new_tokens=args.max_new_tokens,
        do_sample=not args.greedy and (num_beams == 1 or bool(given)),
        num_beams=num_beams,
        num_return_sequences=getattr(args, "num_return_sequences", 1),
        **given,
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def encode_prompt(target: Target, prompt: str, *, chat: bool = False) -> list[int]:
    """Token ids of a prompt, with the marks that the tokenizer puts before a text.

    Args:
        target: whose tokenizer is used.
        prompt: the text, or with `chat` what the user says.
        chat: put it into the tokenizer's chat template.

    Returns:
        At least one id.

    Raises:
        InputError: the tokenizer has no chat template, or the prompt has no tokens.
    """
    tokenizer = target.tokenizer
    if chat:
        if not tokenizer.chat_template:
            raise InputError(f"The tokenizer of {target.name!r} has no chat template; leave --chat out.")
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
        if not ids:
            raise InputError(f"The chat template of {target.name!r} makes no token of the prompt {prompt!r}.")
        return list(ids)
    return encode(tokenizer, prompt)


def check_lengths(target: Target, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse prompts that leave no room for the continuation.

    Raises:
        InputError: a prompt and its continuation are longer than the model's positions.
    """
    limit = position_limit(target.model)
    if limit is None:
        return
    for number, ids in enumerate(prompts, start=1):
        if len(ids) + max_new_tokens > limit:
            raise InputError(
                f"Prompt {number} has {len(ids)} tokens and {max_new_tokens} more may follow, but {target.name!r} has "
                f"{limit} positions; shorten the prompt or lower --max-new-tokens."
            )


def continue_prompts(
    target: Target,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    fusion: CalibFusion | None = None,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
) -> list[list[Continuation]]:
    """Continue a batch of prompts.

    Args:
        target: the model.
        prompts: token ids; padded on the left.
        decoding: how.
        fusion: the processor; None: the plain model.
        seed: of torch's generators, set before the call; the same with and without fusion gives both the same draws.
        streamer: gets the tokens as they come; one prompt and one continuation only.

    Returns:
        The continuations of each prompt, `decoding.num_return_sequences` of them.

    Raises:
        InputError: rows need padding, and the tokenizer has no special token for it.
        FusionNotAppliedError: the engine never called the processor.
    """
    import torch

    padding_id = find_padding_id(target.model, target.tokenizer)
    if padding_id is None:
        if len({len(prompt) for prompt in prompts}) > 1:
            raise InputError(
                f"The tokenizer of {target.name!r} has no special token to pad with; give one prompt at a time."
            )
        padding_id = 0  # under no row
    input_ids, mask = pad_left(prompts, padding_id, target.model.device)
    torch.manual_seed(seed)
    with torch.no_grad(), fusion.required() if fusion is not None else nullcontext():
        generate: Any = target.model.generate
        output = generate(
            input_ids=input_ids,
            attention_mask=mask,
            pad_token_id=padding_id,
            logits_processor=[fusion] if fusion is not None else [],
            streamer=streamer,
            **decoding.options(),
        )
    new = output[:, input_ids.shape[1] :].tolist()
    ends = end_ids(target.model, target.tokenizer)
    per_prompt = decoding.num_return_sequences
    return [
        [
            read_continuation(target.tokenizer, prompt, row, ends)
            for row in new[number * per_prompt : (number + 1) * per_prompt]
        ]
        for number, prompt in enumerate(prompts)
    ]
