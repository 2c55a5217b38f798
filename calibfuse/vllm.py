"""The fusion inside vLLM: a batch-level logits processor for both of its model runners.

Every request is followed by its own key in one session of the guide. vLLM documents this interface as unstable.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from calibfuse.account import Account, Ledger
from calibfuse.errors import InputError, MissingDependencyError
from calibfuse.fusion import MAX_ALPHA, MODES, Moved, fuse, unjudgeable
from calibfuse.guide import Request
from calibfuse.processor import CalibFusion

try:
    from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
    from vllm.v1.sample.logits_processor.interface import MoveDirectionality
except ImportError as error:
    raise MissingDependencyError("calibfuse.vllm needs vLLM: pip install 'calibfuse[vllm]'.") from error

try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor
except ImportError:  # an engine that has the first runner alone

    class V2LogitsProcessor:  # type: ignore[no-redef]
        """Stands for the second runner's base class."""


ALPHA_KEY, REPORT_KEY = "calibfuse_alpha", "calibfuse_report"
_PREFIX = "calibfuse_"
_ENVIRONMENT = "CALIBFUSE_VLLM"
_logger = logging.getLogger("vllm.calibfuse")  # below vLLM's logger, so that its handlers show it


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of the whole server; for those that are None, what the calibrator recommends."""

    calibrator: str | None = None  # folder or Hub id; None: the bundled one
    revision: str | None = None  # of the calibrator on the Hub
    alpha: float | None = None  # strength of requests that name none
    mode: str | None = None
    margin: float | None = None  # see FusionConfig
    max_shift: float | None = None
    log_requests: bool = False  # log what was done to each request when it ends

    @classmethod
    def of(cls, additional_config: Any) -> ServerOptions:  # noqa: ANN401
        """From the engine's additional configuration, else from the environment; an InputError for unknown keys."""
        values = additional_config.get("calibfuse") if isinstance(additional_config, Mapping) else None
        if values is None:
            try:
                values = json.loads(os.environ.get(_ENVIRONMENT, "{}"))
            except ValueError as error:
                raise InputError(f"Expected a JSON object in {_ENVIRONMENT}, but it is no JSON: {error}.") from None
        known = {item.name for item in fields(cls)}
        if not isinstance(values, Mapping) or set(values) - known:
            raise InputError(f"Expected an object of calibfuse's options ({', '.join(sorted(known))}), got {values!r}.")
        return cls(**values)


@dataclass
class _Served:
    key: int  # in the guide's session
    alpha: float  # its strength
    prompt: list[int] | None  # its token ids; None: the engine was given embeddings, so that the text is not known
    output: list[int]  # the engine's own list of the tokens so far (first runner), which grows
    is_reported: bool  # log its account at its end
    account: Account = field(default_factory=Account)

    def last_ids(self, count: int | None) -> tuple[list[int], int]:
        """The last `count` ids (None: all), and the length of the text."""
        assert self.prompt is not None
        output = [each for each in self.output if each >= 0]  # async scheduling holds places open with -1
        length = len(self.prompt) + len(output)
        if count is None or count >= length:
            return [*self.prompt, *output], length
        if count <= len(output):
            return output[-count:], length
        return [*self.prompt[len(output) - count :], *output], length


class CalibFusionProcessor(V1LogitsProcessor, V2LogitsProcessor):  # type: ignore[misc]
    """Fuses a calibrator into every request of a vLLM engine.

    `rest`: the first runner gives its device and whether memory is pinned, the second one its request states. Raises
    what `CalibFusion.from_pretrained` raises, and an InputError for mode "embedding".
    """

    def __init__(self, vllm_config: Any, *rest: Any) -> None:  # noqa: ANN401
        options = ServerOptions.of(vllm_config.additional_config)
        self._states: Any = rest[0] if len(rest) == 1 else None
        device = torch.device(rest[0] if self._states is None else self._states.device)
        tokenizer = _tokenizer_of(vllm_config.model_config)
        given = {name: getattr(options, name) for name in ("revision", "alpha", "mode", "margin", "max_shift")}
        fusion = CalibFusion.from_pretrained(
            options.calibrator,
            tokenizer=tokenizer,
            device=device,
            **{name: value for name, value in given.items() if value is not None},
        )
        if MODES[fusion.config.mode].fuse is None:
            raise InputError(f"Mode {fusion.config.mode!r} cannot be served: vLLM shows logits, not hidden states.")
        self._guide, self._config = fusion.guide, fusion.config
        self._logs = options.log_requests
        self._session = self._guide.session()
        self._served: dict[int, _Served] = {}
        self._keys = itertools.count()
        self._ledger = Ledger()
        self._failures = 0
        self._metrics = _Metrics()
        _logger.info("calibfuse: %r in every request of this engine", fusion)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:  # noqa: ANN401
        """Refuse a request whose options are off (ValueError); the server answers it with HTTP 400."""
        given = sampling_params.extra_args or {}
        unknown = [key for key in given if str(key).startswith(_PREFIX) and key not in (ALPHA_KEY, REPORT_KEY)]
        if unknown:
            raise ValueError(f"Unknown option {unknown[0]!r}; calibfuse knows {ALPHA_KEY!r} and {REPORT_KEY!r}.")
        alpha = given.get(ALPHA_KEY)
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if alpha is not None and not (is_number and math.isfinite(alpha) and 0.0 <= alpha <= MAX_ALPHA):
            raise ValueError(f"{ALPHA_KEY} must be a number from 0 (off) to {MAX_ALPHA:g}, got {alpha!r}.")
        if not isinstance(given.get(REPORT_KEY, False), bool | int):
            raise ValueError(f"{REPORT_KEY} must be true or false, got {given[REPORT_KEY]!r}.")

    def is_argmax_invariant(self) -> bool:
        """False: the best token may change."""
        return False

    def update_state(self, batch_update: Any) -> None:  # noqa: ANN401
        """First runner: requests that left, came and moved, in this order."""
        if batch_update is None:
            return
        gone = [self._served.pop(index) for index in batch_update.removed if index in self._served]
        for index, params, prompt, output in batch_update.added:
            if index in self._served:
                gone.append(self._served.pop(index))
            self._served[index] = self._admit(params, prompt, output)
        for one, other, direction in batch_update.moved:
            first, second = self._served.pop(one, None), self._served.pop(other, None)
            if first is not None:
                self._served[other] = first
            if second is not None:
                if direction == MoveDirectionality.SWAP:
                    self._served[one] = second
                else:
                    gone.append(second)
        self._end(gone)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:  # noqa: ANN401
        """Second runner: a request takes a slot; the one that had it before has ended."""
        self._end([self._served.pop(req_idx)] if req_idx in self._served else [])
        self._served[req_idx] = self._admit(sampling_params, [], [])
        return self._served[req_idx].alpha > 0.0

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:  # noqa: ANN401
        """One step; never raises, because an error here would end the engine for every request.

        `logits`: float32 [rows, vocabulary], changed in place and returned; `ctx` of the second runner: whose rows.
        """
        try:
            for rows, requests in self._steps(logits, ctx):
                self._fuse_rows(logits, rows, requests)
        except Exception:
            self._failures += 1
            self._metrics.failed_steps.inc()
            self._session.reset()  # the texts are read again at the next step
            if self._failures & (self._failures - 1) == 0:  # the 1st, 2nd, 4th, ... time
                _logger.exception("calibfuse: step left unfused, for the %d. time", self._failures)
        return logits

    def _admit(self, params: Any, prompt: Sequence[int] | None, output: list[int]) -> _Served:  # noqa: ANN401
        given = params.extra_args or {}
        alpha = float(given.get(ALPHA_KEY, self._config.alpha))
        if not MODES[self._config.mode].allows(alpha):  # the mode is the server's, and 1 is the end of some
            alpha = 1.0
        is_reported = self._logs or bool(given.get(REPORT_KEY, False))
        return _Served(next(self._keys), alpha, None if prompt is None else list(prompt), output, is_reported)

    def _end(self, gone: Sequence[_Served]) -> None:
        if not gone:
            return
        self._session.drop([each.key for each in gone])
        self._ledger.settle()
        for each in gone:
            self._metrics.add(each.account)
            if each.is_reported:
                told = each.account.report(self._guide.vocabulary)
                _logger.info("calibfuse: request %d, strength %g: %s", each.key, each.alpha, told)

    def _steps(self, logits: Tensor, ctx: Any) -> list[tuple[list[int], list[tuple[_Served, Request]]]]:  # noqa: ANN401
        """The rows that are fused together: parallel lists of rows and of requests, each of them once."""
        if ctx is not None:
            return self._draft_steps(ctx)
        rows, requests = [], []
        for row in range(logits.shape[0]):
            served = self._served.get(row)
            if served is None or served.alpha == 0.0:
                continue
            if served.prompt is None:
                served.account.left_alone += 1
                continue
            ids, length = served.last_ids(self._guide.reach)
            rows.append(row)
            requests.append((served, Request(served.key, ids, length)))
        return [(rows, requests)] if rows else []

    def _draft_steps(self, ctx: Any) -> list[tuple[list[int], list[tuple[_Served, Request]]]]:  # noqa: ANN401
        """Second runner: the rows of a request's drafts one after the other, since each goes on from the one before."""
        states, reach = self._states, self._guide.reach
        slots, offsets, positions, fed = (
            each.tolist() for each in (ctx.expanded_idx_mapping, ctx.expanded_local_pos, ctx.pos, ctx.input_ids)
        )
        steps: dict[int, tuple[list[int], list[tuple[_Served, Request]]]] = {}
        drafts: dict[int, list[int]] = {}
        for row, (slot, offset, position, token) in enumerate(zip(slots, offsets, positions, fed, strict=True)):
            served = self._served.get(slot)
            if offset == 0:
                drafts[slot] = []
            else:
                drafts[slot].append(token)
            if served is None or served.alpha == 0.0 or position + 1 < int(states.prefill_len.np[slot]):
                continue
            length = position + 1
            known = length - len(drafts[slot])
            start = 0 if reach is None else max(0, known - reach)
            committed = states.all_token_ids.gpu[slot, start:known].tolist()
            rows, requests = steps.setdefault(offset, ([], []))
            rows.append(row)
            requests.append((served, Request(served.key, [*committed, *drafts[slot]], length)))
        return [steps[offset] for offset in sorted(steps)]

    def _fuse_rows(self, logits: Tensor, rows: list[int], requests: list[tuple[_Served, Request]]) -> None:
        scores = logits if len(rows) == logits.shape[0] else logits[rows]
        unjudged = unjudgeable(scores)
        # None saves copies of all scores; on an accelerator asking would make the host wait.
        alone = unjudged if scores.device.type != "cpu" or bool(unjudged.any()) else None
        said = self._session.step([request for _, request in requests])

        def observe(moved: Moved) -> None:
            self._ledger.enter([served.account for served, _ in requests], moved, alone)

        fused = fuse(
            scores,
            said.log_scores,
            self._guide.covers,
            self._config,
            self._guide.always_candidates(scores.shape[-1]),
            pick=said.log_scores_at,
            alpha=torch.tensor([served.alpha for served, _ in requests]),
            keep_scale=True,
            in_place=True,
            alone=alone,
            observe=observe,
            protected=self._guide.protected,
            parts=self._guide.parts,
        )
        if scores is not logits:
            logits[rows] = fused
        elif fused is not logits:
            logits.copy_(fused)


class _Metrics:
    def __init__(self) -> None:
        from prometheus_client import REGISTRY, Counter

        def counter(name: str, text: str) -> Any:  # noqa: ANN401
            known = getattr(REGISTRY, "_names_to_collectors", {}).get(f"calibfuse:{name}")
            return known if known is not None else Counter(f"calibfuse:{name}", text)

        self.requests = counter("requests", "Requests that ended with the fusion on or off.")
        self.steps = counter("steps", "Tokens that were chosen with the fusion.")
        self.touched = counter("touched_steps", "Of these, steps that moved a hundredth of the probability or more.")
        self.left_alone = counter("steps_left_alone", "Steps that could not be judged and were left as they were.")
        self.failed_steps = counter("failed_steps", "Steps of the whole batch that were left unfused by an error.")

    def add(self, account: Account) -> None:
        """Enter a request that ended."""
        self.requests.inc()
        self.steps.inc(account.steps)
        self.touched.inc(account.touched)
        self.left_alone.inc(account.left_alone)


def _tokenizer_of(model_config: Any) -> Any:  # noqa: ANN401
    from transformers import AutoTokenizer

    if getattr(model_config, "skip_tokenizer_init", False):
        raise InputError("calibfuse needs the tokenizer's vocabulary; run the engine without skip_tokenizer_init.")
    return AutoTokenizer.from_pretrained(
        model_config.tokenizer,
        revision=model_config.tokenizer_revision,
        trust_remote_code=model_config.trust_remote_code,
    )
