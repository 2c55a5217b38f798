"""A language model's next-token distribution carried over to another vocabulary, by bytes.

The marginal of a target token c is the probability that the text goes on with the bytes of c: an own token u adds all
of its own where u begins with c, and where u is shorter, a share (`GOES_ON`). See docs/guides/any-causal-lm.md.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from calibfuse.vocabulary import Vocabulary

# How much of an own token's probability goes to targets that are longer: where a longer word was meant, the model would
# mostly have said a longer token.
GOES_ON = 0.1
_LEAST_SHARE = 1e-3  # of its marginal that a token keeps beside longer ones: bounds what rounding can do
_LEAST_MASS = 1e-30  # of a string, when all of them sum to one
_LEAST_TOTAL = 1e-300


class SortedStrings:
    """Distinct byte strings in order; the ones that begin with a prefix lie side by side."""

    def __init__(self, strings: Sequence[bytes]) -> None:
        self.strings = sorted(set(strings))
        self.index = {text: at for at, text in enumerate(self.strings)}

    def __len__(self) -> int:
        return len(self.strings)

    def begin_with(self, prefix: bytes) -> tuple[int, int]:
        """Range of the strings that begin with `prefix`, itself included."""
        start = bisect_left(self.strings, prefix)
        after = prefix.rstrip(b"\xff")
        if not after:
            return start, len(self.strings)
        return start, bisect_left(self.strings, after[:-1] + bytes([after[-1] + 1]), lo=start)

    def within(self, text: bytes) -> list[int]:
        """The strings that are shorter than `text` and begin it, shortest first."""
        index = self.index
        return [index[text[:end]] for end in range(1, len(text)) if text[:end] in index]


class Pairs(NamedTuple):
    """Own strings that add to target strings: target[i] gets weight[i] times the probability of own[i]."""

    target: Tensor
    own: Tensor
    weight: Tensor

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int, float]], device: torch.device) -> Pairs:
        """From (target, own, weight)."""
        target, own, weight = zip(*pairs, strict=True) if pairs else ((), (), ())
        return cls(
            torch.tensor(target, dtype=torch.int64, device=device),
            torch.tensor(own, dtype=torch.int64, device=device),
            torch.tensor(weight, dtype=torch.float64, device=device),
        )

    def add(self, masses: Tensor, probs: Tensor) -> None:
        """Add to `masses` [..., targets] what `probs` [..., own] give; in place."""
        masses.index_add_(-1, self.target, probs[..., self.own] * self.weight)


class Marginals:
    """Which own strings add to the marginals of a set of target strings, several of which may be the same."""

    def __init__(self, own: SortedStrings, targets: Sequence[bytes], device: torch.device) -> None:
        in_order = SortedStrings(targets)
        ranges = {text: own.begin_with(text) for text in in_order.strings}
        going_on: dict[int, int] = {}  # how many targets begin with an own string
        pairs: list[tuple[int, int, float]] = []
        for place, text in enumerate(targets):
            shorter = own.within(text)
            if shorter:
                at = in_order.index[text]
                alike = in_order.begin_with(text)[1] - at
            for each in reversed(shorter):
                if each not in going_on:
                    first, stop = in_order.begin_with(own.strings[each])
                    going_on[each] = stop - first
                # Of the targets that go on from the own string, how many begin with this one: its share.
                pairs.append((place, each, GOES_ON * alike / (going_on[each] + 1)))
        self.ranges = torch.tensor([ranges[text] for text in targets], dtype=torch.int64, device=device).reshape(-1, 2)
        self.shorter = Pairs.of(pairs, device)

    def __call__(self, probs: Tensor) -> Tensor:
        """float64 [..., own strings] -> float64 [..., targets]."""
        # Differences of running sums: in double precision they lose nothing that matters.
        sums = torch.nn.functional.pad(probs.cumsum(dim=-1), (1, 0))
        masses = (sums[..., self.ranges[:, 1]] - sums[..., self.ranges[:, 0]]).clamp_(min=0.0)
        self.shorter.add(masses, probs)
        return masses


class Projection:
    """The tables of the language model's own and of the target's vocabulary.

    `initial_space`: the own tokenizer begins every text with a space that the text has not.
    """

    def __init__(
        self, own: Vocabulary, target: Vocabulary, device: torch.device, *, initial_space: bool = False
    ) -> None:
        self.device = device
        own_bytes = [own.token_bytes(token_id) for token_id in range(len(own))]
        target_bytes = [target.token_bytes(token_id) for token_id in range(len(target))]
        self.own = SortedStrings([text for text in own_bytes if text])
        self.target = SortedStrings([text for text in target_bytes if text])
        # One entry more than strings: tokens without bytes go there.
        self._own_place = torch.tensor(
            [self.own.index.get(text, len(self.own)) for text in own_bytes], dtype=torch.int64, device=device
        )
        self.target_place = torch.tensor(
            [self.target.index.get(text, len(self.target)) for text in target_bytes], dtype=torch.int64, device=device
        )
        counts = torch.bincount(self.target_place, minlength=len(self.target) + 1)
        self._log_copies = counts.clamp(min=1).double().log()[self.target_place]
        self.following = Marginals(self.own, self.target.strings, device)
        strings, count = self.target.strings, len(self.target)
        longest = [(self.target.within(text) or [count])[-1] for text in strings]  # that begins each; `count`: none
        self._shorter_target = torch.tensor(longest, dtype=torch.int64, device=device)
        # How many target strings begin with each of them.
        self._reach = [self.target.begin_with(text)[1] - place for place, text in enumerate(strings)]
        self.initial_space = initial_space
        self.spelled = self._spelled()
        self.crossing = lru_cache(maxsize=1024)(self._crossing)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tables that are made at once."""
        tables = [*vars(self).values(), *vars(self.following).values(), *self.following.shorter]
        return sum(each.nbytes for each in tables if isinstance(each, Tensor))

    @cached_property
    def initial(self) -> Marginals:
        """Of a text's first token; made when it is first asked for, since most texts begin with a prompt."""
        if not self.initial_space:
            return self.following
        spaced = [text if text.startswith(b" ") else b" " + text for text in self.target.strings]
        return Marginals(self.own, spaced, self.device)

    def own_masses(self, probs: Tensor) -> Tensor:
        """Probabilities of own ids [..., n] -> of own strings, float64 [..., own strings]; equal strings are added.

        Ids beyond the vocabulary (a padded head) and special ones are left out.
        """
        count = len(self._own_place)
        probs = probs[..., :count].double()
        masses = probs.new_zeros(*probs.shape[:-1], len(self.own) + 1)
        return masses.index_add_(-1, self._own_place[: probs.shape[-1]], probs)[..., :-1]

    def token_masses(self, marginals: Tensor) -> Tensor:
        """Marginals [..., target strings] -> what is left for each string beside the longer ones; they sum to one."""
        longer = marginals.new_zeros(*marginals.shape[:-1], len(self.target) + 1)
        longer.index_add_(-1, self._shorter_target, marginals)
        return torch.maximum(marginals - longer[..., :-1], marginals * _LEAST_SHARE)

    def log_by_id(self, masses: Tensor) -> Tensor:
        """Masses [..., target strings] -> log, float32 [..., target ids]; ids of the same bytes share their mass.

        Finite, and without meaning for special ids.
        """
        masses = masses / masses.sum(dim=-1, keepdim=True).clamp(min=_LEAST_TOTAL)
        logs = torch.nn.functional.pad(masses, (0, 1)).clamp(min=_LEAST_MASS).log()[..., self.target_place]
        return (logs - self._log_copies).float()

    def _crossing(self, word: bytes) -> Pairs:
        """What own strings that begin with an open word and run past its end add to the target strings after it."""
        found: list[tuple[int, int, float]] = []
        for place in range(*self.own.begin_with(word)):
            rest = self.own.strings[place][len(word) :]
            if not rest:
                continue
            first, end = self.target.begin_with(rest)
            begun, count = self.target.within(rest), end - first
            if rest in self.target.index:
                begun, first = [*begun, first], first + 1
            found += [(target, place, 1.0) for target in begun]
            found += [(target, place, GOES_ON * self._reach[target] / (count + 1)) for target in range(first, end)]
        return Pairs.of(found, self.device)

    def _spelled(self) -> Tensor:
        """Bool [target ids]: special tokens and what the own vocabulary cannot spell are False."""
        known: dict[bytes, bool] = {b"": True}

        def can_spell(text: bytes) -> bool:
            if text not in known:
                start, stop = self.own.begin_with(text)
                known[text] = start < stop or any(
                    can_spell(text[len(self.own.strings[each]) :]) for each in reversed(self.own.within(text))
                )
            return known[text]

        bytewise = all(bytes([value]) in self.own.index for value in range(256))
        spelled = [bytewise or can_spell(text) for text in self.target.strings]
        return torch.tensor([*spelled, False], device=self.device)[self.target_place]
