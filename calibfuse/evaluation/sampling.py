"""Continuations of prompts by any causal language model and any logits processors, batched and resumable.

The processors come from a factory; this file knows nothing of what they do. Decoding goes through the model's own
`generate()`, so whatever it needs (caches, positions) is right; the draw is ours, see decoding.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from calibfuse.errors import InputError
from calibfuse.evaluation.decoding import SeededSampling, row_key
from calibfuse.evaluation.journal import Journal, PromptRecord
from calibfuse.evaluation.prompts import Prompt
from calibfuse.generation.continuations import (
    Continuation,
    encode,
    end_ids,
    find_padding_id,
    pad_left,
    position_limit,
    read_continuation,
)

ProcessorFactory = Callable[[], Sequence[LogitsProcessor]]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How continuations are drawn.

    Attributes:
        samples: continuations per prompt.
        max_new_tokens: longest continuation, in tokens.
        top_p: nucleus, in (0, 1]; 1 is off.
        top_k: best tokens to draw from; 0 is off.
        temperature: above 0.
        seed: of all draws.
    """

    samples: int = 10
    max_new_tokens: int = 20
    top_p: float = 0.9
    top_k: int = 0
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value is out of range.
        """
        if self.samples < 1 or self.max_new_tokens < 1:
            raise InputError(
                f"samples and max_new_tokens must be at least 1, got {self.samples} and {self.max_new_tokens}."
            )
        SeededSampling([], 0, top_p=self.top_p, top_k=self.top_k, temperature=self.temperature)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)


def sample_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    make_processors: ProcessorFactory,
    config: SamplingConfig,
    journal: Journal,
    *,
    batch_size: int = 32,
    title: str = "continuations",
    show_progress: bool = False,
) -> None:
    """Fill a journal with the continuations of all prompts that it lacks.

    Args:
        model: causal language model in evaluation mode, on its device.
        tokenizer: its tokenizer.
        prompts: with distinct ids.
        make_processors: called once per batch; the processors go before truncation and draw.
        config: how to draw.
        journal: where the continuations go; one record per prompt.
        batch_size: rows per forward pass; has no influence on the text, but for rounding.
        title: of the progress bar.
        show_progress: draw a progress bar on standard error.

    Raises:
        InputError: a prompt has no tokens or leaves no room for its continuation, or the batch size is below 1.
    """
    if batch_size < 1:
        raise InputError(f"The batch size must be at least 1, got {batch_size}.")
    missing = [prompt for prompt in prompts if not journal.has(prompt.id, prompt.text)]
    encoded = [(prompt, encode(tokenizer, prompt.text)) for prompt in missing]
    check_lengths(model, [ids for _, ids in encoded], config.max_new_tokens)
    padding_id = find_padding_id(model, tokenizer)
    encoded.sort(key=lambda pair: len(pair[1]))  # little padding; the sort is stable, the draws belong to the prompt
    per_batch = max(1, batch_size // config.samples)
    with tqdm(
        total=len(prompts) * config.samples,
        initial=(len(prompts) - len(missing)) * config.samples,
        desc=title,
        unit="text",
        disable=not show_progress,
        smoothing=0.1,
    ) as progress:
        start = 0
        tokens, seconds = 0, 0.0
        while start < len(encoded):
            batch = encoded[start : start + per_batch]
            if padding_id is None:  # without a token to pad with, only prompts of one length go together
                batch = [pair for pair in batch if len(pair[1]) == len(batch[0][1])]
            records = _continue_batch(model, tokenizer, batch, make_processors, config, batch_size, padding_id)
            journal.append(records)
            start += len(batch)
            tokens += sum(len(said.token_ids) for record in records for said in record.continuations)
            seconds += sum(record.seconds for record in records)
            progress.set_postfix({"tok/s": f"{tokens / max(seconds, 1e-9):.0f}"}, refresh=False)
            progress.update(len(batch) * config.samples)


def _continue_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[Prompt, list[int]]],
    make_processors: ProcessorFactory,
    config: SamplingConfig,
    batch_size: int,
    padding_id: int | None,
) -> list[PromptRecord]:
    rows = [(prompt, ids, sample) for prompt, ids in batch for sample in range(config.samples)]
    ends = end_ids(model, tokenizer)
    said: list[Continuation] = []
    began = time.perf_counter()
    for start in range(0, len(rows), batch_size):  # several calls only where one prompt has more samples than fit
        part = rows[start : start + batch_size]
        input_ids, mask = pad_left([ids for _, ids, _ in part], padding_id or 0, model.device)
        keys = [row_key(config.seed, prompt.id, prompt.text, sample) for prompt, _, sample in part]
        draw = SeededSampling(
            keys, input_ids.shape[1], top_p=config.top_p, top_k=config.top_k, temperature=config.temperature
        )
        new = generate_tokens(
            model, input_ids, mask, [*make_processors(), draw], config.max_new_tokens, padding_id, ends
        )
        said += [
            read_continuation(tokenizer, ids, row, ends) for (_, ids, _), row in zip(part, new.tolist(), strict=True)
        ]
    seconds = (time.perf_counter() - began) / len(batch)
    count = config.samples
    return [
        PromptRecord(prompt.id, prompt.text, tuple(said[number * count : (number + 1) * count]), seconds)
        for number, (prompt, _) in enumerate(batch)
    ]


def generate_tokens(
    model: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor,
    processors: Sequence[LogitsProcessor],
    max_new_tokens: int,
    padding_id: int | None,
    ends: frozenset[int],
) -> Tensor:
    """Decode a batch with the model's own `generate()`.

    Args:
        model: in evaluation mode.
        input_ids: int64 [rows, length], padded on the left.
        mask: int64, same shape, 0 for padding.
        processors: the last one chooses the token (SeededSampling).
        max_new_tokens: longest continuation.
        padding_id: what finished rows are filled with.
        ends: ids that end a row.

    Returns:
        New tokens, int64 [rows, at most max_new_tokens].
    """
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=padding_id if padding_id is not None else 0,
        eos_token_id=sorted(ends) or None,
    )
    generate: Any = model.generate
    with torch.no_grad():
        output: Tensor = generate(
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
        )
    return output[:, input_ids.shape[1] :]


def check_lengths(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse prompts that leave no room for the continuation.

    Raises:
        InputError: a prompt and its continuation are longer than the model's positions.
    """
    limit = position_limit(model)
    longest = max((len(ids) for ids in prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise InputError(
            f"The longest prompt has {longest} tokens and {max_new_tokens} more may follow, but the target has {limit} "
            "positions; leave long prompts out or lower the number of new tokens."
        )
