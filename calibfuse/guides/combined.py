"""Several guides of one vocabulary as one: each adds its own shift of a token, in mode "contrast"."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from calibfuse.errors import VocabularyMismatchError
from calibfuse.guide import Guide, GuideSession, NextTokenScores, Part, Request


class CombinedGuide(Guide):
    """Guides of one vocabulary that are asked together; its heads are theirs, numbered as in `parts`."""

    def __init__(self, guides: Sequence[Guide], parts: Sequence[Part]) -> None:
        self.guides = tuple(guide.to(guides[0].device) for guide in guides)
        self.vocabulary = self.guides[0].vocabulary
        for guide, part in zip(self.guides, parts, strict=True):
            for head in part.heads:
                guide.check_head(head.rpartition(" ")[0])
            if guide.vocabulary.fingerprint != self.vocabulary.fingerprint:
                raise VocabularyMismatchError(
                    f"One calibrator is bound to the tokenizer {self.vocabulary.name!r}, another to "
                    f"{guide.vocabulary.name!r}: bind all of them to the target's own."
                )
        self.calibrator = tuple(guide.calibrator for guide in self.guides)
        self._parts = tuple(parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        return self._parts

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(head for part in self._parts for head in part.heads)

    @property
    def device(self) -> torch.device:
        return self.guides[0].device

    def to(self, device: torch.device | str) -> CombinedGuide:
        moved = [guide.to(device) for guide in self.guides]
        if all(new is old for new, old in zip(moved, self.guides, strict=True)):
            return self
        return CombinedGuide(moved, self._parts)

    def covers(self, token_ids: Tensor) -> Tensor:
        """Bool, same shape: True where all guides know the token."""
        return torch.stack([guide.covers(token_ids) for guide in self.guides]).all(dim=0)

    def session(self) -> CombinedSession:
        return CombinedSession([guide.session() for guide in self.guides])

    def read_sequence(self, input_ids: Tensor, masked: Tensor | None) -> CombinedScores:
        return CombinedScores([guide.read_sequence(input_ids, masked) for guide in self.guides])

    @property
    def reach(self) -> int | None:
        """The longest of the guides'."""
        reaches = [guide.reach for guide in self.guides]
        return None if None in reaches else max(reach for reach in reaches if reach is not None)

    @property
    def memory_bytes(self) -> int:
        return sum(guide.memory_bytes for guide in self.guides)

    def always_candidates(self, vocab_size: int) -> Tensor | None:
        """Those of all guides."""
        found = [ids for guide in self.guides if (ids := guide.always_candidates(vocab_size)) is not None]
        return torch.cat(found) if found else None

    @cached_property
    def protected(self) -> Tensor | None:
        """The names of all guides."""
        found = [names for guide in self.guides if (names := guide.protected) is not None]
        return torch.stack(found).any(dim=0) if found else None


class CombinedSession(GuideSession):
    """A session of each guide, in step."""

    def __init__(self, sessions: Sequence[GuideSession]) -> None:
        self._sessions = sessions

    def step(self, requests: Sequence[Request]) -> CombinedScores:
        return CombinedScores([session.step(requests) for session in self._sessions])

    def copy(self, pairs: Mapping[Hashable, Hashable]) -> None:
        for session in self._sessions:
            session.copy(pairs)

    def drop(self, keys: Iterable[Hashable]) -> None:
        gone = list(keys)
        for session in self._sessions:
            session.drop(gone)

    def reset(self) -> None:
        for session in self._sessions:
            session.reset()


class CombinedScores(NextTokenScores):
    """What each guide says."""

    def __init__(self, said: Sequence[NextTokenScores]) -> None:
        self._said = said

    def positions(self, start: int, stop: int) -> CombinedScores:
        return CombinedScores([each.positions(start, stop) for each in self._said])

    def log_scores(self, head: str, token_ids: Tensor | None = None) -> Tensor:
        said, own_head = self._of(head)
        return said.log_scores(own_head, token_ids)

    def log_scores_at(self, heads: Sequence[str], places: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
        found = {}
        for said, names in itertools.groupby(heads, key=lambda head: self._of(head)[0]):
            own = {self._of(head)[1]: head for head in names}
            scores = said.log_scores_at(list(own), places, token_ids)
            found.update({own[own_head]: each for own_head, each in scores.items()})
        return found

    def _of(self, head: str) -> tuple[NextTokenScores, str]:
        """Who says it, and under which name: of "calibrator 0" the first guide's "calibrator"."""
        own_head, _, number = head.rpartition(" ")
        return self._said[int(number)], own_head
