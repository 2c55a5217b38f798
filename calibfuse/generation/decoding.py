"""How prompts are continued: settings, a prompt's ids, batches, `generate()`, and the text of new ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from calibfuse.errors import InputError, check_ranges

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LogitsProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from calibfuse.generation.language_model import LanguageModel


_TAIL = 16  # tokens before a continuation that decide how its first token is spelled


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How continuations are decoded."""

    samples: int = 1  # continuations per prompt
    max_new_tokens: int = 20  # longest continuation, in tokens
    top_p: float = 0.9  # draw from the smallest set of tokens with this probability; 1 is off
    top_k: int = 0  # draw from so many best tokens; 0 is off
    temperature: float = 1.0  # of the draw
    seed: int = 0  # of all draws
    do_sample: bool = True  # draw tokens; else the best token
    chat: bool = False  # put each prompt into the tokenizer's chat template
    system: str | None = None  # system message of the chat template; implies `chat`

    def __post_init__(self) -> None:
        check_ranges(self, **dict.fromkeys(("samples", "max_new_tokens"), "[1, inf)"))
        if not 0.0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be above 0, got {self.temperature}; for no randomness decode greedily.")
        check_ranges(self, top_p="(0, 1]", top_k="[0, inf)")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must lie in 0..2**63-1, got {self.seed}.")
        if not self.do_sample and self.samples > 1:
            raise InputError(f"Without sampling there is only 1 different continuation, got samples={self.samples}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary; greedy decoding and chat appear only where they are on."""
        off = {"do_sample": True, "chat": False, "system": None}
        return {name: value for name, value in asdict(self).items() if name not in off or value != off[name]}

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        """Token ids of a prompt; see `encode_prompt`."""
        return encode_prompt(tokenizer, prompt, chat=self.chat, system=self.system)

    def options(self) -> dict[str, Any]:
        """The arguments of transformers' `generate`."""
        values: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            "num_return_sequences": self.samples,
        }
        if self.do_sample:
            values |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return values


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False, system: str | None = None
) -> list[int]:
    """Token ids of a prompt, with the marks that the tokenizer puts before a text; at least one."""
    if not chat and system is None:
        return encode(tokenizer, prompt)
    if not tokenizer.chat_template:
        raise InputError("The target's tokenizer has no chat template; give the prompts as plain text.")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    try:
        ids = list(tokenizer.apply_chat_template(messages, **options))
    except Exception as error:  # a template is a program of its own, and raises jinja2's errors
        raise InputError(f"The target's chat template refuses this prompt: {' '.join(str(error).split())}") from error
    if not ids:
        raise InputError(f"The target's chat template makes no token of the prompt {prompt!r}.")
    return ids


def check_lengths(
    model: PreTrainedModel | PretrainedConfig, rows: Sequence[Sequence[int]], max_new_tokens: int, what: str
) -> None:
    """Refuse rows of ids that leave no room for `max_new_tokens` more; `what` they are, for the message."""
    limit = position_limit(model)
    for number, ids in enumerate(rows if limit is not None else (), start=1):
        if len(ids) + max_new_tokens > (limit or 0):
            more = f" and {max_new_tokens} more may follow" if max_new_tokens else ""
            cure = f"leave long {what}s out or lower max_new_tokens" if max_new_tokens else "shorten it or leave it out"
            raise InputError(
                f"{what.capitalize()} {number} of {len(rows)} has {len(ids)} tokens{more}, but the model has {limit} "
                f"positions; {cure}."
            )


def generate_tokens(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    processors: Sequence[LogitsProcessor],
    padding_id: int | None,
    *,
    streamer: BaseStreamer | None = None,
    **options: Any,  # noqa: ANN401
) -> Tensor:
    """Decode a batch with the model's own `generate()`.

    Rows are padded on the left with `padding_id` (see `find_padding_id`; None: they must be equally long, else
    InputError). Processors act in their order; `streamer` gets the tokens of one row as they come; `options` are those
    of `generate`. Gives the new tokens, int64 [rows, at most max_new_tokens], on the model's device.
    """
    import torch
    from transformers import LogitsProcessorList

    if padding_id is None and len({len(row) for row in rows}) > 1:
        raise InputError("The target's tokenizer has no special token to pad with; give one prompt at a time.")
    input_ids, mask = pad_left(rows, padding_id or 0, model.device)  # without padding, any id will do
    generate: Any = model.generate
    with torch.no_grad():
        output: Tensor = generate(
            input_ids=input_ids,
            attention_mask=mask,
            pad_token_id=padding_id or 0,
            logits_processor=LogitsProcessorList(processors),
            streamer=streamer,
            **options,  # single arguments win over the model's generation_config, a whole configuration may not
        )
    return output[:, input_ids.shape[1] :]


def continue_prompts(
    target: LanguageModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    processors: Sequence[LogitsProcessor] = (),
    *,
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
) -> list[list[Continuation]]:
    """Continue a batch of prompts with torch's draws; arguments as of `generate_tokens`."""
    import torch

    padding_id = find_padding_id(target.model, target.tokenizer)
    torch.manual_seed(decoding.seed if seed is None else seed)
    options = decoding.options()
    new = generate_tokens(target.model, prompts, processors, padding_id, streamer=streamer, **options).tolist()
    ends = end_ids(target.model, target.tokenizer)
    return [
        [
            read_continuation(target.tokenizer, prompt, row, ends)
            for row in new[number * decoding.samples : (number + 1) * decoding.samples]
        ]
        for number, prompt in enumerate(prompts)
    ]


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
