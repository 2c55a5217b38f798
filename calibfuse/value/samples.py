"""Continuations drawn from a base model, with importance weights and labels: what an auxiliary model learns from.

Drawn from the whole distribution (no top-k, no nucleus), because R is an expectation under the base itself. The weight
of a sample, p_base / p_sampling of its continuation, undoes a temperature (Meng et al. 2022, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from calibfuse import hub
from calibfuse.errors import DataError, ScorerError, check_ranges
from calibfuse.generation.decoding import (
    check_lengths,
    decode_continuation,
    encode_prompt,
    end_ids,
    find_padding_id,
    generate_tokens,
)
from calibfuse.scorers.checks import check_scores
from calibfuse.value.oracle import Oracle

SAMPLES_FILE = "samples.safetensors"
_MOST_FAILED = 0.5


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """How continuations are drawn and labelled."""

    per_prompt: int = 4  # continuations drawn of each prompt
    max_new_tokens: int = 20  # length of the continuations, in tokens; an end mark ends one earlier, and counts
    temperature: float = 1.0  # of the draw; above 1 draws rarer continuations, and their weights undo it
    batch_size: int = 64  # rows per forward pass of the target while sampling
    continuation_only: bool = False  # show the oracle the continuation without its prompt
    chat: bool = False  # put each prompt into the tokenizer's chat template; the oracle sees the continuation alone
    system: str | None = None  # system message of the chat template; implies `chat`

    def __post_init__(self) -> None:
        check_ranges(self, **dict.fromkeys(("per_prompt", "max_new_tokens", "batch_size"), "[1, inf)"))
        check_ranges(self, temperature="(0, inf)")

    def draw(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        oracle: Oracle,
        *,
        seed: int,
        show_progress: bool = False,
    ) -> SampleSet:
        """Labelled samples; see `draw_samples` and `label_samples`."""
        samples = draw_samples(model, tokenizer, prompts, self, seed=seed, show_progress=show_progress)
        alone = self.continuation_only or self.chat or self.system is not None
        return label_samples(samples, tokenizer, oracle, continuation_only=alone, show_progress=show_progress)


@dataclass(frozen=True, eq=False)
class SampleSet:
    """Continuations of prompts."""

    input_ids: Tensor  # int64 [n, length], prompt then continuation, padded on the right
    lengths: Tensor  # int64 [n], tokens of prompt and continuation; an end mark that was drawn counts
    prompt_lengths: Tensor  # int64 [n], tokens of the prompt
    log_weights: Tensor  # float32 [n], log p_base - log p_sampling of the continuation, nats; 0 where the base drew
    satisfaction: Tensor  # float32 [n], C in [0, 1]; nan before labelling, and where labelling failed

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: Tensor) -> SampleSet:
        """Some of the samples; int64 [k] or bool [n]."""
        return SampleSet(self.input_ids[index], **{name: getattr(self, name)[index] for name in _COLUMNS})

    @staticmethod
    def concatenate(parts: Sequence[SampleSet]) -> SampleSet:
        """All samples of several sets, which may be padded to different lengths."""
        longest = max(part.input_ids.shape[1] for part in parts)
        ids = [torch.nn.functional.pad(part.input_ids, (0, longest - part.input_ids.shape[1])) for part in parts]
        return SampleSet(
            torch.cat(ids), **{name: torch.cat([getattr(part, name) for part in parts]) for name in _COLUMNS}
        )

    def save(self, folder: Path) -> None:
        """Write samples.safetensors, whole or not at all."""
        tensors = {"input_ids": self.input_ids.to(torch.int32), **{name: getattr(self, name) for name in _COLUMNS}}
        hub.write_tensors(folder / SAMPLES_FILE, tensors)

    @classmethod
    def load(cls, folder: Path) -> SampleSet:
        """Read what `save` wrote."""
        tensors = hub.read_tensors(folder / SAMPLES_FILE)
        return cls(tensors.pop("input_ids").long(), **tensors)


_COLUMNS = ("lengths", "prompt_lengths", "log_weights", "satisfaction")


def draw_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    plan: SamplingPlan,
    *,
    seed: int,
    show_progress: bool = True,
) -> SampleSet:
    """Continuations of prompts, drawn from a model's whole distribution, in the prompts' order, unlabelled."""
    if not prompts:
        raise DataError("Sampling needs prompts, got none.")
    per_prompt, max_new_tokens, batch_size = plan.per_prompt, plan.max_new_tokens, plan.batch_size
    encoded = [encode_prompt(tokenizer, prompt, chat=plan.chat, system=plan.system) for prompt in prompts]
    check_lengths(model, encoded, max_new_tokens, "prompt")
    ends = torch.tensor(sorted(end_ids(model, tokenizer)), dtype=torch.int64, device=model.device)
    padding_id = find_padding_id(model, tokenizer) or 0  # masked: any id will do
    rows = [(ids, number * per_prompt + sample) for number, ids in enumerate(encoded) for sample in range(per_prompt)]
    rows.sort(key=lambda row: len(row[0]))  # little padding; the sort is stable
    count = len(rows)
    result = SampleSet(
        torch.full((count, max(map(len, encoded)) + max_new_tokens), padding_id, dtype=torch.int64),
        lengths=torch.zeros(count, dtype=torch.int64),
        prompt_lengths=torch.zeros(count, dtype=torch.int64),
        log_weights=torch.zeros(count),
        satisfaction=torch.full((count,), torch.nan),
    )
    with (
        _own_distribution(model),
        tqdm(total=len(rows), desc="sampling", unit="text", leave=False, disable=not show_progress) as bar,
    ):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            key = int(np.random.SeedSequence([seed, 31, start]).generate_state(1)[0])
            draw = _WeightedDraw(len(batch), ends, plan.temperature, key)
            new = generate_tokens(
                model,
                [ids for ids, _ in batch],
                [draw],
                padding_id,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends.tolist() or None,
            ).cpu()
            is_end = torch.isin(new, ends.cpu())
            # the first end mark counts; what follows it is padding
            counts = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, new.shape[1])
            for (ids, place), tokens, count, weight in zip(batch, new, counts.tolist(), draw.log_weights, strict=True):
                whole = torch.cat([torch.tensor(ids), tokens[:count]])
                result.input_ids[place, : len(whole)] = whole
                result.lengths[place], result.prompt_lengths[place] = len(whole), len(ids)
                result.log_weights[place] = weight
            bar.update(len(batch))
    longest = int(result.lengths.max())
    return replace(result, input_ids=result.input_ids[:, :longest].clone())


class _WeightedDraw(LogitsProcessor):
    """Draws the next token of each row from the whole distribution, and keeps the log-weights, float32 [rows]."""

    supports_continuous_batching = False

    def __init__(self, rows: int, ends: Tensor, temperature: float, seed: int) -> None:
        self.log_weights = torch.zeros(rows, device=ends.device)
        self._going = torch.ones(rows, dtype=torch.bool, device=ends.device)
        self._ends, self._temperature = ends, temperature
        self._generator = torch.Generator(device=ends.device).manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """0 for the token drawn, -inf for all others, float32 [rows, vocabulary]."""
        logits = scores.float()
        tempered = logits / self._temperature
        chosen = torch.multinomial(tempered.softmax(dim=-1), 1, generator=self._generator)
        if self._temperature != 1.0:
            ratio = logits.log_softmax(dim=-1) - tempered.log_softmax(dim=-1)
            self.log_weights += torch.where(self._going, ratio.gather(1, chosen)[:, 0], 0.0)
        self._going &= ~torch.isin(chosen[:, 0], self._ends)
        return torch.full_like(logits, -torch.inf).scatter(1, chosen, 0.0)


@contextmanager
def _own_distribution(model: PreTrainedModel) -> Iterator[None]:
    """Keep `generate()` from the processors (a repetition penalty, ...) that a model's generation_config asks for."""
    former, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = former


def label_samples(
    samples: SampleSet,
    tokenizer: PreTrainedTokenizerBase,
    oracle: Oracle,
    *,
    continuation_only: bool = False,
    batch_size: int = 256,
    show_progress: bool = False,
) -> SampleSet:
    """The same samples, each with the oracle's label; nan where it could not label a text."""
    texts = []
    for ids, length, prompt_length in zip(
        samples.input_ids.tolist(), samples.lengths.tolist(), samples.prompt_lengths.tolist(), strict=True
    ):
        if continuation_only:
            texts.append(decode_continuation(tokenizer, ids[:prompt_length], ids[prompt_length:length]))
        else:
            texts.append(str(tokenizer.decode(ids[:length], skip_special_tokens=True)))
    labels = np.full(len(texts), np.nan)
    with tqdm(total=len(texts), desc="labelling", unit="text", leave=False, disable=not show_progress) as bar:
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            answer = check_scores(oracle.satisfaction(part), len(part), oracle.name, may_be_nan=True)
            labels[start : start + batch_size] = answer
            bar.update(len(part))
    failed = int(np.isnan(labels).sum())
    if failed > _MOST_FAILED * len(labels):
        raise ScorerError(
            f"The oracle {oracle.name!r} could not label {failed} of {len(labels)} texts (it returned nan); at most "
            "half may fail."
        )
    return replace(samples, satisfaction=torch.from_numpy(labels).float())
