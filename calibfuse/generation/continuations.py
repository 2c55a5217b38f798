"""Token ids before and behind `generate()`: a prompt's ids, batches of rows, the end of a text, the text of new ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibfuse.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TAIL = 16  # tokens before a continuation that decide how its first token is spelled


@dataclass(frozen=True)
class Continuation:
    """What a model said after a prompt."""

    text: str  # without special tokens; starts with a space where the tokens say so
    token_ids: tuple[int, ...]  # new tokens of the target, up to the end mark, which is left out
    is_finished: bool  # whether the model ended the text itself


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, with the marks that the tokenizer puts before a text, without those it puts behind.

    At least one, else InputError.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    while len(ids) > 1 and ids[-1] in closing:  # a model does not go on after its end mark
        ids.pop()
    if not ids:
        raise InputError(f"The target's tokenizer finds no token in the prompt {text!r}.")
    return ids


def position_limit(model: PreTrainedModel | PretrainedConfig) -> int | None:
    """How many tokens a model (or one of this configuration) can read; None: it does not say."""
    config: Any = getattr(model, "config", model)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a text."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def find_padding_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A special token to pad with, or None: guides take a leading run of special tokens for no text."""
    candidates = (tokenizer.pad_token_id, *sorted(end_ids(model, tokenizer)), tokenizer.bos_token_id)
    return next((int(token_id) for token_id in candidates if token_id is not None), None)


def pad_left(rows: Sequence[Sequence[int]], padding_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as one int64 tensor [rows, longest], and its mask: 1 for tokens, 0 for padding."""
    import torch

    longest = max(len(row) for row in rows)
    ids = [[padding_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as int64 [rows, longest], and the mask. A causal model never looks right, so any id may fill up."""
    import torch

    longest = max(len(row) for row in rows)
    ids = [[*row, *[row[0]] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def read_continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], row: Sequence[int], ends: frozenset[int]
) -> Continuation:
    """A continuation from the new ids of a row, cut at the first of the ids that end a text."""
    length = next((place for place, token_id in enumerate(row) if token_id in ends), len(row))
    new = tuple(row[:length])
    return Continuation(decode_continuation(tokenizer, prompt, new), new, is_finished=length < len(row))


def decode_continuation(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new ids as it stands after the prompt.

    Decoded alone, the first word of many tokenizers would lose its space; so the end of the prompt is decoded too.
    """
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    tail = list(prompt[-_TAIL:])
    before = str(tokenizer.decode(tail, **options))
    whole = str(tokenizer.decode([*tail, *new], **options))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(list(new), **options))
