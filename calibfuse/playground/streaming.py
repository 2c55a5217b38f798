"""Both continuations of a prompt, token by token, with what the fusion did; nothing here knows the page."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import torch
from transformers import StoppingCriteriaList

from calibfuse.generation.decoding import Decoding, check_lengths, find_padding_id
from calibfuse.generation.language_model import LanguageModel
from calibfuse.inspection.trace import StepTrace, trace_generation
from calibfuse.processor import CalibFusion


@dataclass(frozen=True)
class Progress:
    """What is there so far."""

    plain: str = ""  # the plain continuation
    steps: tuple[StepTrace, ...] = ()  # of the guided one
    is_done: bool = False


def stream_both(target: LanguageModel, fusion: CalibFusion, prompt: str, decoding: Decoding) -> Iterator[Progress]:
    """Continue a prompt with the plain model, then with the fusion; one sample is drawn of each."""
    ids = decoding.encode(target.tokenizer, prompt)
    check_lengths(target.model, [ids], decoding.max_new_tokens, "prompt")
    off = CalibFusion(fusion.guide, replace(fusion.config, alpha=0.0))  # exactly the plain model
    progress = Progress()
    for step in _trace(target, off, ids, decoding):
        progress = replace(progress, plain=progress.plain + step.text)
        yield progress
    for step in _trace(target, fusion, ids, decoding):
        progress = replace(progress, steps=(*progress.steps, step))
        yield progress
    yield replace(progress, is_done=True)


def _trace(target: LanguageModel, fusion: CalibFusion, ids: Sequence[int], decoding: Decoding) -> Iterator[StepTrace]:
    """The steps of a generation, which runs in a thread: its error is raised here, closing stops it."""
    queue: SimpleQueue[StepTrace | BaseException | None] = SimpleQueue()  # None: the end
    stop = threading.Event()

    def is_stopped(input_ids: Any, scores: Any, **_: object) -> Any:  # noqa: ANN401
        return torch.full((input_ids.shape[0],), stop.is_set(), dtype=torch.bool, device=input_ids.device)

    padding = find_padding_id(target.model, target.tokenizer)
    options: dict[str, Any] = {
        **replace(decoding, samples=1).options(),
        "seed": decoding.seed,
        "pad_token_id": padding if padding is not None else 0,
        "stopping_criteria": StoppingCriteriaList([is_stopped]),
        "on_step": queue.put,
    }

    def run() -> None:
        try:
            trace_generation(target.model, target.tokenizer, fusion, ids, **options)
            queue.put(None)
        except BaseException as error:  # whatever it is, the reader must not wait for ever
            queue.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (each := queue.get()) is not None:
            if isinstance(each, BaseException):
                raise each
            yield each
    finally:
        stop.set()
        thread.join()
