"""Continuations of prompts by any causal language model and any logits processors, batched and resumable.

The processors come from a factory; this file knows nothing of what they do. The draw belongs to the row, not to the
batch, see generation/seeded_sampling.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from calibfuse.errors import InputError
from calibfuse.evaluation.journal import Journal, PromptRecord
from calibfuse.evaluation.prompts import Prompt
from calibfuse.generation.continuations import Continuation, end_ids, find_padding_id, read_continuation
from calibfuse.generation.decoding import Decoding, check_lengths, generate_tokens
from calibfuse.generation.seeded_sampling import SeededSampling, row_key

ProcessorFactory = Callable[[], Sequence[LogitsProcessor]]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Decoding):
    """Decoding as the kit does it: several draws of each prompt."""

    samples: int = 10


def sample_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    make_processors: ProcessorFactory,
    config: Decoding,
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
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")
    if not config.do_sample or config.num_beams != 1:
        raise InputError("The evaluation draws its continuations; leave out greedy decoding and beams.")
    missing = [prompt for prompt in prompts if not journal.has(prompt.id, prompt.text)]
    encoded = [(prompt, config.encode(tokenizer, prompt.text)) for prompt in missing]
    check_lengths(model, [ids for _, ids in encoded], config.max_new_tokens, "prompt")
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
        while start < len(encoded):
            batch = encoded[start : start + per_batch]
            if padding_id is None:  # without a token to pad with, only prompts of one length go together
                batch = [pair for pair in batch if len(pair[1]) == len(batch[0][1])]
            records = _continue_batch(model, tokenizer, batch, make_processors, config, batch_size, padding_id)
            journal.append(records)
            start += len(batch)
            progress.update(len(batch) * config.samples)


def _continue_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[tuple[Prompt, list[int]]],
    make_processors: ProcessorFactory,
    config: Decoding,
    batch_size: int,
    padding_id: int | None,
) -> list[PromptRecord]:
    rows = [(prompt, ids, sample) for prompt, ids in batch for sample in range(config.samples)]
    ends = end_ids(model, tokenizer)
    said: list[Continuation] = []
    for start in range(0, len(rows), batch_size):  # several calls only where one prompt has more samples than fit
        part = rows[start : start + batch_size]
        keys = [row_key(config.seed, prompt.id, prompt.text, sample) for prompt, _, sample in part]
        draw = SeededSampling(keys, max(len(ids) for _, ids, _ in part), config)
        new = generate_tokens(
            model,
            [ids for _, ids, _ in part],
            [*make_processors(), draw],
            padding_id,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=sorted(ends) or None,
            do_sample=False,
            num_beams=1,
        )
        said += [
            read_continuation(tokenizer, ids, row, ends) for (_, ids, _), row in zip(part, new.tolist(), strict=True)
        ]
    count = config.samples
    return [
        PromptRecord(prompt.id, prompt.text, tuple(said[number * count : (number + 1) * count]))
        for number, (prompt, _) in enumerate(batch)
    ]
