"""A language model's next-token distribution carried over to another vocabulary, by bytes.

The marginal of a target token c is the probability that the text goes on with the bytes of c. An own token u adds to it
its whole probability where u begins with c, and where u is shorter than c, its probability times that of the rest after
u. For the few most probable such u the model is asked (one further step); for the others the rest is taken to be
equally likely among the target's tokens that go on from u, which is the same for every head and so moves nothing.

Marginals overlap: " th" holds all of " the". Where the target has " the" as a token it says that, so the share of
" th" as a token is its marginal less those of the target's longer tokens: `token_masses`. These sum to one.

The last word of the text is open: the model may spell it otherwise once it goes on. So a distribution after fewer of
its own tokens counts too, weighted by the probability of these tokens, with the own tokens that spell the remaining
bytes of the word and run past its end (`crossing`). Left out: unusual spellings of the open word by several tokens that
end inside it. (Phan et al. 2024 and Vieira et al. 2024 sum over all spellings; the tests do so on small vocabularies.)

Everything here is arithmetic on probabilities; texts and models are elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibfuse.vocabulary import Vocabulary

# How much of an own token's probability goes to targets that are longer, where the model is not asked: where a longer
# word was meant, the model would mostly have said a longer token.
GOES_ON = 0.1
_LEAST_SHARE = 1e-3  # of its marginal that a token keeps beside longer ones: bounds what rounding can do
_LEAST_MASS = 1e-30  # of a string, when all of them sum to one
_LEAST_TOTAL = 1e-300

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class SortedStrings:
    """Distinct byte strings in order; the ones that begin with a prefix lie side by side.

    Args:
        strings: any; equal ones count once.
    """

    def __init__(self, strings: Sequence[bytes]) -> None:
        self.strings = sorted(set(strings))
        self.index = {text: at for at, text in enumerate(self.strings)}

    def __len__(self) -> int:
        """Number of distinct strings."""
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


@dataclass(frozen=True)
class Nesting:
    """Which strings of two sorted lists begin which; made in one pass over both.

    A range holds the strings that begin with a string, itself included. A parent is the longest other string that
    begins it; -1: none.

    Attributes:
        own_ranges: int64 [targets, 2], of each target string, among the own ones.
        target_stops: int64 [targets], of each target string, the end of its range among the targets.
        own_parents: int64 [targets], of each target string, among the own ones.
        target_parents: int64 [targets], of each target string, among the targets.
        ranges_of_own: int64 [own, 2], of each own string, among the targets.
        parents_of_own: int64 [own], of each own string, among the own ones.
    """

    own_ranges: Ints
    target_stops: Ints
    own_parents: Ints
    target_parents: Ints
    ranges_of_own: Ints
    parents_of_own: Ints

    @classmethod
    def of(cls, own: Sequence[bytes], targets: Sequence[bytes]) -> Nesting:
        """Of two sorted lists of distinct strings."""
        own_starts, own_stops, target_stops, own_parents, target_parents = ([-1] * len(targets) for _ in range(5))
        starts_of_own, stops_of_own, parents_of_own = ([-1] * len(own) for _ in range(3))
        # The strings that begin the present one, shortest first: text, place among own and targets (-1: not there),
        # and the longest own and target string that begins what comes next, itself included.
        open_texts: list[tuple[bytes, int, int, int, int]] = []
        at, place = 0, 0  # next own string, next target

        def close(at: int, place: int) -> None:
            _, mine, its, _, _ = open_texts.pop()
            if its >= 0:
                own_stops[its], target_stops[its] = at, place
            if mine >= 0:
                stops_of_own[mine] = place

        while at < len(own) or place < len(targets):
            is_own = place == len(targets) or (at < len(own) and own[at] <= targets[place])
            text = own[at] if is_own else targets[place]
            is_target = place < len(targets) and targets[place] == text
            while open_texts and not text.startswith(open_texts[-1][0]):
                close(at, place)
            near_own, near_target = open_texts[-1][3:] if open_texts else (-1, -1)
            mine = its = -1
            if is_own:
                mine, parents_of_own[at], starts_of_own[at] = at, near_own, place
            if is_target:
                its, own_parents[place], target_parents[place] = place, near_own, near_target
                own_starts[place] = at
            open_texts.append((text, mine, its, mine if is_own else near_own, its if is_target else near_target))
            at, place = at + is_own, place + is_target
        while open_texts:
            close(at, place)

        def columns(*lists: list[int]) -> Ints:
            return np.stack([np.array(each, dtype=np.int64) for each in lists], axis=-1)

        return cls(
            columns(own_starts, own_stops),
            columns(target_stops)[:, 0],
            columns(own_parents)[:, 0],
            columns(target_parents)[:, 0],
            columns(starts_of_own, stops_of_own),
            columns(parents_of_own)[:, 0],
        )

    def shorter(self) -> tuple[Ints, Ints]:
        """All pairs of a target and an own string that begins it and is shorter."""
        places, own = np.arange(len(self.own_parents)), self.own_parents
        found: list[tuple[Ints, Ints]] = []
        while len(places):
            places, own = places[own >= 0], own[own >= 0]
            found.append((places, own))
            own = self.parents_of_own[own]
        first, second = (np.concatenate([each[side] for each in found] or [own]) for side in (0, 1))
        return first, second


@dataclass(frozen=True)
class Pairs:
    """Own strings that add to target strings: target[i] gets weight[i] times the probability of own[i]."""

    target: Tensor
    own: Tensor
    weight: Tensor

    @classmethod
    def of(
        cls, target: Sequence[int] | Ints, own: Sequence[int] | Ints, weight: Sequence[float] | Floats,
        device: torch.device,
    ) -> Pairs:  # fmt: skip
        """From lists or arrays."""
        return cls(
            torch.from_numpy(np.asarray(target, dtype=np.int64)).to(device),
            torch.from_numpy(np.asarray(own, dtype=np.int64)).to(device),
            torch.from_numpy(np.asarray(weight, dtype=np.float64)).to(device),
        )

    @property
    def memory_bytes(self) -> int:
        """Bytes of the lists."""
        return self.target.nbytes + self.own.nbytes + self.weight.nbytes

    def add(self, masses: Tensor, probs: Tensor) -> None:
        """Add to `masses` [..., targets] what `probs` [..., own] give; in place."""
        masses.index_add_(-1, self.target, probs[..., self.own] * self.weight)


class Marginals:
    """Which own strings add to the marginals of a set of target strings.

    Args:
        own: strings of the own vocabulary.
        targets: strings to be continued with; `order[i]` is the place of the i-th of them among `marginals`' results.
        device: of the tensors.
    """

    def __init__(self, own: SortedStrings, targets: Sequence[bytes], device: torch.device) -> None:
        in_order = SortedStrings(targets)
        self.nesting = nesting = Nesting.of(own.strings, in_order.strings)
        order = np.array([in_order.index[text] for text in targets], dtype=np.int64)
        begun, shorter = nesting.shorter()
        # Of the targets that go on from an own string, how many begin with the target: its share of what goes on.
        ranges = nesting.ranges_of_own[shorter]
        weights = GOES_ON * (nesting.target_stops[begun] - begun) / (ranges[:, 1] - ranges[:, 0] + 1)
        # Several targets may be the same string: back from strings to targets.
        by_string = np.argsort(order, kind="stable")
        starts, stops = (np.searchsorted(order[by_string], begun, side=side) for side in ("left", "right"))
        copies = stops - starts
        first = np.repeat(starts - np.cumsum(copies) + copies, copies)
        places = by_string[first + np.arange(len(first))]
        self._ranges = torch.from_numpy(nesting.own_ranges[order]).to(device)
        self._shorter = Pairs.of(places, np.repeat(shorter, copies), np.repeat(weights, copies), device)
        # Own strings that some target goes on from: a further step can tell something there.
        self.goes_on = torch.unique(self._shorter.own)
        self.memory_bytes = self._ranges.nbytes + self.goes_on.nbytes + self._shorter.memory_bytes

    def __call__(self, probs: Tensor) -> Tensor:
        """float64 [..., own strings] -> float64 [..., targets]."""
        # Differences of running sums: in double precision they lose nothing that matters.
        sums = torch.nn.functional.pad(probs.cumsum(dim=-1), (1, 0))
        masses = (sums[..., self._ranges[:, 1]] - sums[..., self._ranges[:, 0]]).clamp_(min=0.0)
        self._shorter.add(masses, probs)
        return masses


@dataclass(frozen=True)
class Crossing:
    """What follows an open word through own strings that begin with it and run past its end.

    Attributes:
        pairs: what they add to the target strings after the word.
        goes_on: int64 [n], those own strings behind which some target string goes on.
    """

    pairs: Pairs
    goes_on: Tensor


@dataclass(frozen=True)
class Continuations:
    """The target strings that go on from an own string, and how the own vocabulary spells their rests.

    Attributes:
        targets: int64 [n], which.
        shares: float64 [n], what they get without a further step.
        marginals: of the rests.
    """

    targets: Tensor
    shares: Tensor
    marginals: Marginals


class Projection:
    """The tables of one own and one target vocabulary.

    Args:
        own: vocabulary of the language model.
        target: the other one.
        device: of the tensors.
        initial_space: the own tokenizer begins every text with a space that the text has not.
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
        nesting = self.following.nesting
        shorter = torch.from_numpy(nesting.target_parents).to(device)
        self._shorter_target = torch.where(shorter < 0, len(self.target), shorter)
        # How many target strings begin with each of them.
        self._reach: list[int] = (nesting.target_stops - np.arange(len(self.target))).tolist()
        self.initial_space = initial_space
        self.spelled = self._spelled()
        tables = [self._own_place, self.target_place, self._log_copies, self._shorter_target, self.spelled]
        self.memory_bytes: int = sum(each.nbytes for each in tables) + self.following.memory_bytes
        self.crossing = lru_cache(maxsize=1024)(self._crossing)
        self.continuations = lru_cache(maxsize=1024)(self._continuations)

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
        """Marginals [..., target strings] -> what is left for each string beside the longer ones; same shape."""
        longer = marginals.new_zeros(*marginals.shape[:-1], len(self.target) + 1)
        longer.index_add_(-1, self._shorter_target, marginals)
        return torch.maximum(marginals - longer[..., :-1], marginals * _LEAST_SHARE)

    def log_by_id(self, masses: Tensor, *, split_copies: bool) -> Tensor:
        """Masses [..., target strings] -> log, float32 [..., target ids]; finite, without meaning for special ids.

        Args:
            masses: at least 0.
            split_copies: ids of the same bytes share the mass; else each gets all of it.
        """
        masses = masses / masses.sum(dim=-1, keepdim=True).clamp(min=_LEAST_TOTAL)
        logs = torch.nn.functional.pad(masses, (0, 1)).clamp(min=_LEAST_MASS).log()[..., self.target_place]
        return (logs - self._log_copies if split_copies else logs).float()

    def _crossing(self, word: bytes) -> Crossing:
        """Of the own strings that begin with `word` and are longer."""
        start, stop = self.own.begin_with(word)
        targets: list[int] = []
        owns: list[int] = []
        weights: list[float] = []
        goes_on: list[int] = []
        for place in range(start, stop):
            rest = self.own.strings[place][len(word) :]
            if not rest:
                continue
            inside = self.target.within(rest)
            first, end = self.target.begin_with(rest)
            exact = first < end and self.target.strings[first] == rest
            targets += inside + ([first] if exact else [])
            weights += [1.0] * (len(inside) + exact)
            targets += range(first + exact, end)
            weights += [GOES_ON * count / (end - first + 1) for count in self._reach[first + exact : end]]
            if first + exact < end:
                goes_on.append(place)
            owns += [place] * (len(targets) - len(owns))
        pairs = Pairs.of(targets, owns, weights, self.device)
        return Crossing(pairs, torch.tensor(goes_on, dtype=torch.int64, device=self.device))

    def _continuations(self, begun: bytes) -> Continuations:
        """The target strings that begin with `begun` and are longer."""
        start, stop = self.target.begin_with(begun)
        shares = [GOES_ON * count / (stop - start + 1) for count in self._reach[start:stop]]
        if start < stop and self.target.strings[start] == begun:
            start, shares = start + 1, shares[1:]
        rests = [text[len(begun) :] for text in self.target.strings[start:stop]]
        return Continuations(
            torch.arange(start, stop, device=self.device),
            torch.tensor(shares, dtype=torch.float64, device=self.device),
            Marginals(self.own, rests, self.device),
        )

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
