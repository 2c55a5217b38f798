"""Tokens per second with and without a method, interleaved in one process, so that a busy machine slows both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import trange

from calibfuse.evaluation.prompts import Prompt
from calibfuse.evaluation.sampling import Method
from calibfuse.generation.decoding import Decoding, find_padding_id
from calibfuse.generation.language_model import LanguageModel
from calibfuse.generation.seeded_sampling import draw_tokens, row_key


@dataclass(frozen=True)
class Speed:
    """How fast a method decodes."""

    tokens_per_second: float  # median over the rounds, all rows together
    kept: float  # tokens per second over those of plain decoding in the same round, median; 1 is no cost
    lowest: float  # of `kept` over the rounds
    highest: float  # likewise


def measure_speed(
    target: LanguageModel,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    sampling: Decoding,
    *,
    rows: int = 8,
    rounds: int = 5,
    show_progress: bool = False,
) -> dict[str, Speed]:
    """Time every method, in turn, on one batch of the first prompts; speed by key of method, against the first one.

    Every row gets its full length, whatever the model ends; one round before the others does not count.
    """
    texts = [prompts[number % len(prompts)] for number in range(rows)]
    encoded = [sampling.encode(target.tokenizer, prompt.text) for prompt in texts]
    padding_id = find_padding_id(target.model, target.tokenizer)
    if padding_id is None:
        encoded = [encoded[0]] * rows
    seconds: dict[str, list[float]] = {method.key: [] for method in methods}
    for number in trange(rounds + 1, desc="speed", unit="round", disable=not show_progress):
        keys = [row_key(sampling.seed + number, prompt.id, prompt.text, row) for row, prompt in enumerate(texts)]
        for method in [*methods[number % len(methods) :], *methods[: number % len(methods)]]:
            began = time.perf_counter()
            draw_tokens(target.model, encoded, keys, method.make_processors(), sampling, padding_id).cpu()
            if number:
                seconds[method.key].append(time.perf_counter() - began)
    result = {}
    for key, values in seconds.items():
        kept = np.asarray(seconds[methods[0].key]) / np.asarray(values)
        speed = rows * sampling.max_new_tokens / float(np.median(values))
        result[key] = Speed(speed, float(np.median(kept)), float(kept.min()), float(kept.max()))
    return result
