"""What every guide of the fusion offers: a calibrator bound to one target vocabulary, whatever stands behind it.

A *session* follows generations through their token ids; nothing here knows text or `generate()`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, wraps
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from calibfuse.errors import MissingHeadError, VocabularyMismatchError
from calibfuse.vocabulary import Vocabulary

CALIBRATOR_HEAD, REFERENCE_HEAD, VALUE_HEAD = "calibrator", "reference", "value"
OF_VALUE_HEAD = ("value_weight", "harm_threshold", "max_excused")
"""Options of FusionConfig by which mode "contrast" asks the head "value"."""
SPECIAL_MASS = 1e-4
"""The probability that all tokens which a guide does not cover share in `log_probs`."""
_SEQUENCE_CHUNK = 4_000_000  # elements of a [positions, vocabulary] block in log_probs


P = ParamSpec("P")
R = TypeVar("R")

_KINDS = tuple(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def isolated(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run without gradients, outside inference mode and without autocast.

    `generate()` may run inside one of these, and a cache filled there could not be used outside, or would be rounded.
    """

    @wraps(function)
    def shielded(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as modes:
            if torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(False))  # which turns gradients on: no_grad comes after it
            for kind in _KINDS:
                if torch.is_autocast_enabled(kind):
                    modes.enter_context(torch.autocast(kind, enabled=False))
            modes.enter_context(torch.no_grad())
            return function(*args, **kwargs)

    return shielded


class NextTokenScores(ABC):
    """What a guide says of the next token at some positions (leading axes `...`: rows, or rows and positions)."""

    @abstractmethod
    def log_scores(self, head: str, token_ids: Tensor | None = None) -> Tensor:
        """Log-probabilities up to one constant per position; of the head "value" log R, at most 0.

        Of `token_ids`, int64 [..., k], or of the whole vocabulary (None): float32, nats. Ids that the guide does not
        cover get some finite number without meaning.
        """

    @abstractmethod
    def positions(self, start: int, stop: int) -> NextTokenScores:
        """What it says at some of the positions of whole sequences (leading axes rows and positions)."""

    def log_scores_at(self, heads: Sequence[str], places: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        """The same of several heads for a list of tokens, int64 [n], at positions `places`, int64 [n], which rise.

        Positions are counted over all leading axes.
        """
        whole = {head: self.log_scores(head).flatten(0, -2) for head in heads}
        return {head: each[places, token_ids.clamp(0, each.shape[-1] - 1)] for head, each in whole.items()}


class Request(NamedTuple):
    """One text of a session: a key that names it, and its token ids, all or the last ones, at least `Guide.reach`.

    `length`: tokens of the whole text; None: `ids` is the whole text.
    """

    key: Hashable
    ids: Sequence[int]
    length: int | None = None


class Part(NamedTuple):
    """One guide among several that act as one: how it counts in mode "contrast"."""

    number: int
    alpha: float
    margin: float
    one_sided: bool  # its contrast never raises a token
    value_weight: float = 0.0
    harm_threshold: float = 0.5
    max_excused: float = 10.0

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that it is asked for."""
        return (self.calibrator, self.reference, *((self.value,) if self.value_weight else ()))

    @property
    def value(self) -> str:
        """Likewise of its head "value"."""
        return f"{VALUE_HEAD} {self.number}"

    @property
    def calibrator(self) -> str:
        """Name of its head "calibrator" among those of all."""
        return f"{CALIBRATOR_HEAD} {self.number}"

    @property
    def reference(self) -> str:
        """Likewise of its head "reference"."""
        return f"{REFERENCE_HEAD} {self.number}"


class GuideSession(ABC):
    """Follows texts that come, grow, shrink and go independently: what a serving engine's batch is.

    A step names every text that wants scores, by a key of the caller's choice, with the ids it has now: what is new
    is found by comparing ids, and only the last `guide.reach` tokens need be passed. An exception at any moment
    leaves the session as it was or empty. A session belongs to one thread; a guide may have any number of them.

        session, config = guide.session(), recommended_config(guide.recommended, {})
        while texts:                                                 # a dictionary, request -> its token ids so far
            requests = [Request(key, ids) for key, ids in texts.items()]
            said = session.step(requests)                            # one forward, whatever the lengths
            logits = engine.forward(texts)                           # [rows, vocabulary], row i for requests[i]
            fused = fuse(logits, said.log_scores, guide.covers, config, guide.always_candidates(logits.shape[-1]),
                         pick=said.log_scores_at, alpha=strengths, keep_scale=True)
            for request, token in zip(requests, sample(fused)):
                texts[request.key] = [*request.ids, token]
            session.drop(finished)                                   # keys; their memory is free for the next texts
    """

    @abstractmethod
    def step(self, requests: Sequence[Request]) -> NextTokenScores:
        """Read what is new of some texts, each named once; row i of the answer is that of requests[i]."""

    @abstractmethod
    def copy(self, pairs: Mapping[Hashable, Hashable]) -> None:
        """Let new texts (keys) begin as copies of others (values), as the beams of a search do."""

    @abstractmethod
    def drop(self, keys: Iterable[Hashable]) -> None:
        """Forget texts and free what they held; unknown keys do not matter."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""


class Guide(ABC):
    """A `calibrator` bound to the `vocabulary` of one target."""

    vocabulary: Vocabulary
    calibrator: Any
    missing_head_hint: ClassVar[str] = ""
    """What to do about a missing head, behind the sentence that says so."""

    @property
    @abstractmethod
    def heads(self) -> tuple[str, ...]:
        """Names of the heads that can be asked for."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it runs."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Guide:
        """The same object where it is there already, else a copy on the device."""

    @abstractmethod
    def covers(self, token_ids: Tensor) -> Tensor:
        """Bool, same shape: True where the guide knows the token; ids beyond the vocabulary are not covered."""

    @abstractmethod
    def session(self) -> GuideSession:
        """A new session."""

    @abstractmethod
    def read_sequence(self, input_ids: Tensor, masked: Tensor | None) -> NextTokenScores:
        """All positions of sequences on the guide's device; bool `masked` is True for left padding."""

    @property
    def reach(self) -> int | None:
        """How many of a text's last tokens matter to what is said next; None: all of them."""
        return None

    @property
    def parts(self) -> tuple[Part, ...]:
        """How each of several guides in one counts; empty: it is one."""
        return ()

    @property
    def recommended(self) -> Mapping[str, Any]:
        """Options of FusionConfig that suit this guide; what is missing is the default of the mode."""
        return {}

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tables that were made for this vocabulary."""
        return 0

    @property
    def target_vocab_size(self) -> int:
        """Number of ids that were bound."""
        return len(self.vocabulary)

    @property
    def coverage(self) -> float:
        """Share of the vocabulary's ids that the guide covers, in [0, 1]; the rest are special tokens and holes."""
        return 1.0 - float(self._uncovered.double().mean())

    def always_candidates(self, vocab_size: int) -> Tensor | None:
        """Ids below `vocab_size` that are candidates in any case, int64 [n]; None: there are none."""
        return None

    @property
    def protected(self) -> Tensor | None:
        """Bool [target_vocab_size], True for tokens that contrast never raises (names); None: there are none."""
        return None

    def misfit(self, width: int) -> str:
        """Why a head of `width` scores cannot be that of the tokenizer; empty where it can.

        Heads are padded, by up to 2 % in known models, and some leave out a few tokens at the end (image marks).
        """
        size = self.target_vocab_size
        beyond = int((~self.vocabulary.is_special[width:]).sum()) if size > width else 0
        if beyond <= max(256, size // 100) and width <= size + max(4096, size // 10):
            return ""
        return (
            f"The scores have {width} entries, which cannot be those of the tokenizer {self.vocabulary.name!r} "
            f"with {size} ids."
        )

    def sequence(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> NextTokenScores:
        """What is said after each token of whole sequences, [batch, length]; arguments as in `log_probs`."""
        if input_ids.ndim != 2:
            raise VocabularyMismatchError(f"input_ids must be [batch, length], got shape {tuple(input_ids.shape)}.")
        masked = None
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise VocabularyMismatchError(
                    f"attention_mask has shape {tuple(attention_mask.shape)} but input_ids {tuple(input_ids.shape)}."
                )
            masked = attention_mask.to(self.device) == 0
        return self.read_sequence(input_ids.to(self.device), masked)

    def log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Next-token log-probabilities under the non-toxic head.

        Args:
            input_ids: int64 [batch, length], the target's ids.
            attention_mask: [batch, length], 0 for left padding; only needed where padding is not a special token.

        Returns:
            float32 [batch, length, target_vocab_size], nats; row i scores token i + 1. Normalised; the tokens that are
            not covered share the probability 1e-4.

        Raises:
            MissingHeadError: the guide has no such head.
            VocabularyMismatchError: ids outside the vocabulary, or shapes that do not fit.
        """
        return self._all_log_probs(CALIBRATOR_HEAD, input_ids, attention_mask)

    def reference_log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The same under the reference head (unfiltered text)."""
        return self._all_log_probs(REFERENCE_HEAD, input_ids, attention_mask)

    @isolated
    def first_log_probs(self, head: str = CALIBRATOR_HEAD) -> Tensor:
        """Log-probabilities of a text's first token: float32 [target_vocab_size], nats."""
        self.check_head(head, predicts=True)
        return self.normalise(self.session().step([Request(None, ())]).log_scores(head))[0]

    def normalise(self, scores: Tensor) -> Tensor:
        """Scores [..., target_vocab_size] -> log-probabilities in which uncovered tokens share SPECIAL_MASS."""
        count = int(self._uncovered.sum())
        scores = scores.masked_fill(self._uncovered, -torch.inf).log_softmax(dim=-1)
        if count == 0:
            return scores
        return (scores + math.log1p(-SPECIAL_MASS)).masked_fill(self._uncovered, math.log(SPECIAL_MASS / count))

    def check_head(self, head: str, *, predicts: bool = False) -> None:
        """Make sure that there is a head, where `predicts` is set one whose scores are those of a distribution."""
        if head in self.heads and not (predicts and head == VALUE_HEAD):
            return
        if predicts and self.heads == (VALUE_HEAD,):
            raise MissingHeadError("This guide has no head that predicts tokens: it values them.")
        raise MissingHeadError(
            f"This needs the head {head!r}, but the calibrator has only {', '.join(map(repr, self.heads))}"
            f"{self.missing_head_hint}."
        )

    @cached_property
    def _uncovered(self) -> Tensor:
        return ~self.covers(torch.arange(self.target_vocab_size, device=self.device))

    @isolated
    def _all_log_probs(self, head: str, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        self.check_head(head, predicts=True)
        size = self.target_vocab_size
        if input_ids.numel():
            low, high = (int(value) for value in torch.aminmax(input_ids))
            if low < 0 or high >= size:
                raise VocabularyMismatchError(
                    f"Token id {low if low < 0 else high} is outside the vocabulary of {size} ids (tokenizer "
                    f"{self.vocabulary.name!r}). Is the calibrator bound to another tokenizer than the model's?"
                )
        said = self.sequence(input_ids, attention_mask)
        batch, length = input_ids.shape
        result = torch.empty(batch, length, size, dtype=torch.float32, device=self.device)
        step = max(1, _SEQUENCE_CHUNK // max(1, batch * size))
        for start in range(0, length, step):
            result[:, start : start + step] = self.normalise(said.positions(start, start + step).log_scores(head))
        return result
