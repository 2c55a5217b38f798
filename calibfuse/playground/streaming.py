"""Both continuations of a prompt, token by token, with what the fusion did; nothing here knows the page."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from calibfuse.generation.decoding import Decoding, check_lengths, find_padding_id, generate_tokens
from calibfuse.generation.language_model import LanguageModel
from calibfuse.inspection.spelling import TokenSpeller
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
    padding = find_padding_id(target.model, target.tokenizer)
    options: dict[str, Any] = replace(decoding, samples=1).options()
    progress = Progress()

    def plain(put: Callable[[str], None], stop: StoppingCriteriaList) -> None:
        torch.manual_seed(decoding.seed)
        streamer = _Pieces(TokenSpeller(target.tokenizer), put)
        generate_tokens(target.model, [ids], (), padding, streamer=streamer, stopping_criteria=stop, **options)

    def fused(put: Callable[[StepTrace], None], stop: StoppingCriteriaList) -> None:
        trace_generation(
            target.model,
            target.tokenizer,
            fusion,
            ids,
            seed=decoding.seed,
            on_step=put,
            stopping_criteria=stop,
            pad_token_id=padding if padding is not None else 0,
            **options,
        )

    for piece in _in_background(plain):
        progress = replace(progress, plain=progress.plain + piece)
        yield progress
    for step in _in_background(fused):
        progress = replace(progress, steps=(*progress.steps, step))
        yield progress
    yield replace(progress, is_done=True)


class _Pieces(BaseStreamer):
    """Hands on the text of each new token; the first call brings the prompt."""

    def __init__(self, speller: TokenSpeller, put: Callable[[str], None]) -> None:
        self._text = speller.stream()
        self._put = put
        self._is_prompt = True

    def put(self, value: Any) -> None:  # noqa: ANN401
        """Take the prompt, or a token."""
        pieces = [self._text(int(each)) for each in value.flatten().tolist()]
        if not self._is_prompt:
            self._put("".join(pieces))
        self._is_prompt = False

    def end(self) -> None:
        """The generation is over."""


def _in_background(work: Callable[[Callable[[Any], None], StoppingCriteriaList], None]) -> Iterator[Any]:
    """Run a generation in a thread and yield what it puts; its error is raised here, closing stops it."""
    queue: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    stop = threading.Event()

    def is_stopped(input_ids: Any, scores: Any, **_: object) -> Any:  # noqa: ANN401
        return torch.full((input_ids.shape[0],), stop.is_set(), dtype=torch.bool, device=input_ids.device)

    def run() -> None:
        try:
            work(lambda each: queue.put(("item", each)), StoppingCriteriaList([is_stopped]))
            queue.put(("end", None))
        except BaseException as error:  # whatever it is, the reader must not wait for ever
            queue.put(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = queue.get()
            if kind == "item":
                yield value
            elif kind == "error":
                raise value
            else:
                return
    finally:
        stop.set()
        thread.join()
