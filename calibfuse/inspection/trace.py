"""What the fusion did at each step of a generation, or at each token of a given text.

A logits processor stands in for CalibFusion, calls it, and keeps what came in, what went out, and what the calibrator's
heads said of the same candidates. Temperature and top-p, which come later in `generate()`, are not part of it. One row
at a time: no batches, no beams, no assisted decoding.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from calibfuse.candidates import choose_candidates
from calibfuse.errors import InputError
from calibfuse.guide import VALUE_HEAD
from calibfuse.inspection.spelling import TokenSpeller
from calibfuse.prefix_cache import RowSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from calibfuse.processor import CalibFusion


@dataclass(frozen=True)
class CandidateTrace:
    """One candidate for the next token."""

    token_id: int
    text: str  # as people read it
    is_movable: bool  # among the target's candidates and covered by the calibrator; others keep their probability
    plain: float  # log-probability under the target, nats
    fused: float  # after fusion, nats
    plain_rank: int  # 1 is the target's best token
    fused_rank: int  # 1 is the best token after fusion
    # What each head of the calibrator said, by name: log-probability among the movable candidates, nats (the head
    # "value": log R). Empty for tokens that are not movable.
    heads: Mapping[str, float] = field(default_factory=dict)

    @property
    def shift(self) -> float:
        """How far fusion moved it: fused - plain, nats; 0 for a token that both exclude."""
        return 0.0 if self.fused == self.plain else self.fused - self.plain


@dataclass(frozen=True)
class StepTrace:
    """One step."""

    position: int  # index of the chosen token in the whole sequence, prompt included
    token_id: int  # the chosen token
    text: str  # what it adds to the text; empty for special tokens and unfinished characters
    chosen: CandidateTrace  # it as a candidate
    candidates: tuple[CandidateTrace, ...]  # the best before and after fusion and the chosen one, by plain probability
    divergence: float  # KL(fused || plain), nats: how much this step was changed
    moved_mass: float  # probability that fusion moved from some tokens to others, in [0, 1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary; the log-probability of an excluded token is null."""
        values = asdict(self)
        rows = [*values["candidates"], values["chosen"]]
        for candidate, row in zip((*self.candidates, self.chosen), rows, strict=True):
            row["shift"] = candidate.shift
            row |= {key: None for key in ("plain", "fused", "shift") if math.isinf(row[key])}
        return values


@torch.no_grad()
def trace_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fusion: CalibFusion,
    prompt: str | Sequence[int],
    *,
    continuation: str | None = None,
    top: int = 8,
    seed: int | None = None,
    on_step: Callable[[StepTrace], None] | None = None,
    **generate_options: object,
) -> list[StepTrace]:
    """Follow the fusion through a generation, or through a given continuation: one trace per chosen token.

    Args:
        model: the target.
        tokenizer: of the target.
        fusion: bound to that tokenizer; its generation state is used, its settings are not changed.
        prompt: text, or token ids.
        continuation: a text that follows a text prompt; nothing is generated, its tokens count as chosen. A token that
            spans the end of the prompt counts to the continuation.
        top: candidates kept per step, before and after fusion; at least 1.
        seed: of torch's generators, set before sampling; None leaves them alone.
        on_step: gets each step as soon as its token is known, which is when the next one begins; for those who stream.
        **generate_options: for `model.generate`: max_new_tokens, do_sample, temperature, ...

    Raises:
        InputError: a prompt without tokens, a continuation of a prompt given as ids or one that adds no token, `top`
            below 1, options that make several rows, or options together with a continuation.
    """
    if top < 1:
        raise InputError(f"A trace keeps at least 1 candidate per step, got top={top}.")
    ids = list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else _row(prompt)
    if not ids:
        raise InputError(f"The tokenizer finds no token in the prompt {prompt!r}.")
    if continuation is not None:
        if generate_options or not isinstance(prompt, str):
            raise InputError("A given continuation needs a prompt in text and no options of generate().")
        ids, sequence = _join(tokenizer, ids, prompt, continuation)
    recorder = _Recorder(fusion, TokenSpeller(tokenizer), ids, top, on_step)
    if continuation is None:
        sequence = _generate(model, ids, recorder, seed, generate_options)
    else:
        input_ids = torch.tensor([sequence], device=model.device)
        logits = model(input_ids=input_ids).logits[0]
        for place in range(len(ids), len(sequence)):
            recorder(input_ids[:, :place], logits[place - 1 : place])
    return recorder.finish(sequence)


def _row(prompt: Any) -> list[int]:  # noqa: ANN401
    """Token ids as a list; a tensor of one row, [1, length], is taken as that row."""
    ids = prompt.tolist() if isinstance(prompt, torch.Tensor) else list(prompt)
    if len(ids) == 1 and isinstance(ids[0], list):
        ids = ids[0]
    if not all(isinstance(each, numbers.Integral) for each in ids):
        raise InputError("Expected a prompt of one row: a text, or its token ids [length] or [1, length].")
    return [int(each) for each in ids]


def _generate(
    model: PreTrainedModel, ids: list[int], recorder: _Recorder, seed: int | None, options: Mapping[str, object]
) -> list[int]:
    input_ids = torch.tensor([ids], device=model.device)
    if seed is not None:
        torch.manual_seed(seed)
    with recorder.fusion.required():
        generate: Any = model.generate
        output = generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), logits_processor=[recorder], **options
        )
    return [int(each) for each in output[0].tolist()]


def _join(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt: str, continuation: str
) -> tuple[list[int], list[int]]:
    """The ids before the first traced token, and all ids: where words are cut depends on what follows the prompt."""
    sequence = list(tokenizer(prompt + continuation)["input_ids"])
    shared = 0
    while shared < min(len(ids), len(sequence)) and ids[shared] == sequence[shared]:
        shared += 1
    if not shared:
        # Without a begin mark, a continuation may merge with a prompt of one token.
        raise InputError(f"The continuation changes the first token of the prompt {prompt!r}; give a longer prompt.")
    if shared == len(sequence):
        raise InputError(f"The continuation {continuation!r} adds no token to the prompt.")
    return sequence[:shared], sequence


class _Pending(NamedTuple):
    """A step whose choice is not known yet: everything [target_vocab_size] on the model's device."""

    plain: Tensor
    fused: Tensor
    movable: Tensor
    heads: Mapping[str, Tensor]

    def candidate(self, token_id: int, text: str) -> CandidateTrace:
        plain, fused = self.plain[token_id], self.fused[token_id]
        is_movable = bool(self.movable[token_id])
        return CandidateTrace(
            token_id=token_id,
            text=text,
            is_movable=is_movable,
            plain=float(plain),
            fused=float(fused),
            plain_rank=int((self.plain > plain).sum()) + 1,
            fused_rank=int((self.fused > fused).sum()) + 1,
            heads={head: float(values[token_id]) for head, values in self.heads.items()} if is_movable else {},
        )


class _Recorder(LogitsProcessor):
    """Stands in for a CalibFusion and keeps what it did."""

    def __init__(
        self,
        fusion: CalibFusion,
        speller: TokenSpeller,
        prompt_ids: Sequence[int],
        top: int,
        on_step: Callable[[StepTrace], None] | None,
    ) -> None:
        self.fusion, self._speller, self._top, self._on_step = fusion, speller, top, on_step
        self._guide = fusion.guide
        self._session = RowSession(self._guide)
        self._pending: _Pending | None = None
        self._steps: list[StepTrace] = []
        self._prompt_length = len(prompt_ids)
        self._text = speller.stream()
        for each in prompt_ids:  # a character that they begin belongs to the token that completes it
            self._text(each)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """One step; see CalibFusion."""
        if scores.shape[0] != 1:
            raise InputError(f"A trace follows one row, got {scores.shape[0]}.")
        if self._pending is not None:
            self._settle(self._pending, int(input_ids[0, -1]))
        fused = self.fusion(input_ids, scores)
        plain = scores[0].float().log_softmax(dim=-1)
        movable = self._movable(plain)
        self._pending = _Pending(plain, fused[0], movable, self._ask_heads(input_ids, movable))
        return fused

    def _movable(self, plain: Tensor) -> Tensor:
        """Bool [target_vocab_size]: the tokens that fusion re-ranks."""
        token_ids, _, is_candidate, _ = choose_candidates(
            plain, self.fusion.config.candidates, self.fusion.guide.always_candidates(plain.shape[-1])
        )
        among = torch.full_like(plain, token_ids is None, dtype=torch.bool)
        if token_ids is not None:
            among[token_ids if is_candidate is None else token_ids[is_candidate]] = True
        elif is_candidate is not None:
            among = is_candidate
        covered = self.fusion.guide.covers(torch.arange(len(plain), device=plain.device))
        return among & covered & (plain > -torch.inf)

    def _ask_heads(self, input_ids: Tensor, movable: Tensor) -> dict[str, Tensor]:
        if self._guide is not self.fusion.guide:  # the fusion moved it to the scores' device at its first call
            self._guide = self.fusion.guide
            self._session = RowSession(self._guide)
        said, _ = self._session.step(input_ids, torch.zeros(0, device=input_ids.device))
        token_ids = movable.nonzero()[:, 0]
        heads = {}
        for head in self._guide.heads:
            values = said.log_scores(head, token_ids[None])[0]
            if head != VALUE_HEAD:
                values = values.log_softmax(dim=-1)
            full = torch.full_like(movable, torch.nan, dtype=torch.float32)
            full[token_ids] = values
            heads[head] = full
        return heads

    def _settle(self, pending: _Pending, token_id: int) -> None:
        """Keep of a step what is shown, now that its choice is known."""
        plain, fused = pending.plain, pending.fused
        count = min(self._top, len(plain))
        shown = {*plain.topk(count).indices.tolist(), *fused.topk(count).indices.tolist(), token_id}
        shown = {each for each in shown if plain[each] > -torch.inf or each == token_id}
        ordered = sorted(shown, key=lambda each: (-float(plain[each]), each))
        candidates = {each: pending.candidate(each, self._speller.label(each)) for each in ordered}
        change = fused.exp() * (fused - plain)
        step = StepTrace(
            position=self._prompt_length + len(self._steps),
            token_id=token_id,
            text=self._text(token_id),
            chosen=candidates[token_id],
            candidates=tuple(candidates.values()),
            divergence=max(0.0, float(change.nan_to_num(nan=0.0).sum())),
            moved_mass=float((fused.exp() - plain.exp()).abs().sum()) / 2,
        )
        self._steps.append(step)
        self._pending = None
        if self._on_step is not None:
            self._on_step(step)

    def finish(self, sequence: Sequence[int]) -> list[StepTrace]:
        """The steps, now that the whole sequence is known."""
        last = self._prompt_length + len(self._steps)
        if self._pending is not None and last < len(sequence):  # on MPS, generate() runs one step too many
            self._settle(self._pending, sequence[last])
        return self._steps
