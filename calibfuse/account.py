"""The account of a text: what fusion did to it, in a few figures and the tokens that lost most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from calibfuse.fusion import Moved
    from calibfuse.vocabulary import Vocabulary

TOUCHED_FROM = 0.01
"""Probability that a step must move to count as touched."""
_LEAST = 1e-3  # of probability that a token must lose in a step to be named
_STEPS_AT_ONCE = 64  # taken down before they are read from an accelerator


@dataclass(frozen=True)
class Report:
    """What fusion did."""

    steps: int  # tokens that were chosen with it
    touched: int  # of these, steps that moved at least TOUCHED_FROM of the probability
    moved_mass: float  # probability moved per step, mean, in [0, 1]
    left_alone: int  # steps that could not be judged and were left as the target had them
    lowered: tuple[tuple[str, float], ...]  # tokens that lost most, as text, and how much, summed over the steps

    @property
    def touched_share(self) -> float:
        """Share of the steps in which something moved, in [0, 1]."""
        return self.touched / self.steps if self.steps else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {**asdict(self), "touched_share": self.touched_share}

    def __str__(self) -> str:
        alone = f", {self.left_alone} left alone" if self.left_alone else ""
        told = f"{self.steps} steps, {self.touched} touched, {self.moved_mass:.1%} of the probability moved{alone}"
        named = ", ".join(f"{text!r} -{lost:.3f}" for text, lost in self.lowered)
        return f"{told}; most lowered: {named}" if named else told


class Account:
    """Adds up what fusion does to one text, or to several."""

    def __init__(self) -> None:
        self.steps = self.touched = self.left_alone = 0
        self.moved_mass = 0.0
        self.lowered: Counter[int] = Counter()

    def add(self, other: Account) -> None:
        """Add another account's figures."""
        for name in ("steps", "touched", "left_alone", "moved_mass"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lowered.update(other.lowered)

    def report(self, vocabulary: Vocabulary, *, mask: Callable[[str], str] | None = None, most: int = 5) -> Report:
        """The figures so far; without a mask all letters of a token but the first are stars, since it may be rude."""
        write = mask or (lambda text: text[:1] + "*" * (len(text) - 1))
        lowered = tuple(
            (write(vocabulary.token_bytes(token).decode("utf-8", "backslashreplace").strip()), lost)
            for token, lost in self.lowered.most_common(most)
        )
        mean = self.moved_mass / self.steps if self.steps else 0.0
        return Report(self.steps, self.touched, mean, self.left_alone, lowered)


class Ledger:
    """Enters steps into accounts, many at once: on an accelerator, reading figures would make the host wait."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Sequence[Account], Moved, Tensor | None]] = []

    def enter(self, accounts: Sequence[Account], moved: Moved, alone: Tensor | None = None) -> None:
        """Take a step down: the account of each row, and bool [rows] where a row could not be judged."""
        self._waiting.append((accounts, moved, alone))
        if len(self._waiting) >= _STEPS_AT_ONCE:
            self.settle()

    def settle(self) -> None:
        """Bring the accounts up to date."""
        waiting, self._waiting = self._waiting, []
        for accounts, moved, alone in waiting:
            left = alone.flatten().tolist() if alone is not None else [False] * len(accounts)
            for account, mass, is_left in zip(accounts, moved.mass.tolist(), left, strict=True):
                account.left_alone += is_left
                if not is_left:
                    account.steps += 1
                    account.touched += mass >= TOUCHED_FROM
                    account.moved_mass += mass
            columns = (each.tolist() for each in (moved.rows, moved.token_ids, moved.lost))
            for row, token, lost in zip(*columns, strict=True):
                if lost >= _LEAST and not left[row]:
                    accounts[row].lowered[token] += lost
