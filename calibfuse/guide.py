"""What every guide of the fusion offers, whatever stands behind it (universal calibrator, any causal LM).

A *guide* is a calibrator bound to one target vocabulary. A *session* follows one or more generations through their
token ids. `NextTokens` is what it says about the token that comes next. Nothing here knows text or `generate()`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class NextTokens(Protocol):
    """What a guide says of the next token at some positions (leading axes `...`: rows, or rows and positions)."""

    def log_scores(self, head: str, token_ids: Tensor | None = None) -> Tensor:
        """Log-probabilities up to one constant per position; of the head "value" log R, at most 0.

        Args:
            head: "calibrator", "reference" or "value".
            token_ids: int64 [..., k], the wanted ids; None for the whole vocabulary. Ids that the guide does not
                cover get some finite number without meaning.

        Returns:
            float32 [..., k] or [..., target_vocab_size], nats.
        """
        ...

    def positions(self, start: int, stop: int) -> NextTokens:
        """What it says at some of the positions of whole sequences (leading axes rows and positions)."""
        ...


class GuideSession(Protocol):
    """Follows generations. Its state derives from the ids alone, so calls may repeat, shrink, reorder or start anew."""

    def step(self, input_ids: Tensor, readings: Tensor) -> tuple[NextTokens, list[float]]:
        """Advance to the given prefixes.

        Args:
            input_ids: int64 [rows, length], the whole sequences so far; length may be 0.
            readings: float [n] on the same device, read out together with the session's own, so that a GPU is waited
                for once.

        Returns:
            What the guide says of the next token of each row, and the values of `readings`.
        """
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...


class Guide(Protocol):
    """A calibrator bound to one target vocabulary."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads that can be asked for."""
        ...

    @property
    def target_vocab_size(self) -> int:
        """Number of ids that were bound."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        ...

    def to(self, device: torch.device) -> Guide:
        """The same guide on another device."""
        ...

    def covers(self, token_ids: Tensor) -> Tensor:
        """Bool, same shape: True where the guide knows the token; ids beyond the vocabulary are not covered."""
        ...

    def session(self) -> GuideSession:
        """A new session."""
        ...

    def sequence(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> NextTokens:
        """All positions of whole sequences at once; position i speaks of token i + 1."""
        ...
