"""Words that the training text tells apart by themselves, recognised in whatever pieces a vocabulary spells them.

The bias of a word is added to the calibrator head's score of each token that completes it. Left out: words of other
letters than a to z, and words over more than `REACH` tokens.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibfuse.calibrator.masked_words import LEAST_ADDED, SEPARATORS, SIGNS, MaskedWords, masked_variants
from calibfuse.errors import InputError
from calibfuse.vocabulary import Vocabulary

REACH = 8
"""How many tokens before the next one are looked at."""

PROTECTED_PIECE = 0.3
"""What a token that leads on to a protected name ("imm" + "igr") gets at most, nats: it leads to other words, too."""
LOWERED, PROTECTED = -6.0, 1.0
"""Bias of a word, and of a name, where none is given, nats."""

_LEAST_LETTERS = 3  # of a beginning that is given something


def read_words(path: str | os.PathLike[str], bias: float = LOWERED) -> dict[str, float]:
    """Words in lower case with their biases in nats: a word a line, and perhaps its bias (above 0: a protected name).

    What follows a # is left out; `bias` is that of words without one.

    Raises:
        InputError: the file cannot be read, or a line is something else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read words from {os.fspath(path)!r}: {error}.") from error
    words: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        parts = line.partition("#")[0].split()
        try:
            if parts:
                word, given = parts if len(parts) > 1 else (parts[0], bias)
                words[word.lower()] = float(given)
        except ValueError:
            raise InputError(
                f"Expected a word, or a word and a number, in line {number} of {os.fspath(path)!r}, got {line!r}."
            ) from None
    return words


class Completions(NamedTuple):
    """Tokens that would complete a word: ids [n] and what they are given, nats [n]."""

    token_ids: NDArray[np.int64]
    shifts: NDArray[np.float32]


class Spelled(NamedTuple):
    """Tokens that would complete a word with a bias: a sparse [rows, positions, vocabulary] in nats, on the host."""

    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    shifts: NDArray[np.float32]

    @classmethod
    def of(cls, places: Iterable[tuple[int, int, Completions | None]]) -> Spelled | None:
        """Gather (row, position, completions); None where nothing would complete a word."""
        found = [(row, position, each) for row, position, each in places if each is not None]
        if not found:
            return None
        counts = [len(each.shifts) for _, _, each in found]
        return cls(
            np.repeat(np.array([row for row, _, _ in found]), counts),
            np.repeat(np.array([position for _, position, _ in found]), counts),
            np.concatenate([each.token_ids for _, _, each in found]),
            np.concatenate([each.shifts for _, _, each in found]),
        )

    def part(self, start: int, stop: int) -> Spelled | None:
        """The entries of positions start to stop - 1, counted from start."""
        inside = (self.positions >= start) & (self.positions < stop)
        if not inside.any():
            return None
        return Spelled(self.rows[inside], self.positions[inside] - start, self.token_ids[inside], self.shifts[inside])

    def add_to(self, scores: Tensor, token_ids: Tensor | None, vocab_size: int) -> None:
        """Add the shifts to scores [rows, (positions,) k] of the given ids, or of the whole vocabulary, in place."""
        width = scores.shape[1] if scores.ndim == 3 else 1
        lines = scores.view(-1, scores.shape[-1])
        # What needs counting is counted on the host, and no copy is waited for: the device need not stop.
        rows, line_of = np.unique(self.rows * width + self.positions, return_inverse=True)
        touched, line, ids, shifts = (
            torch.from_numpy(each).to(scores.device, non_blocking=True)
            for each in (rows, line_of, self.token_ids, self.shifts)
        )
        dense = torch.zeros(len(rows), vocab_size, dtype=torch.float32, device=scores.device)
        dense.index_put_((line, ids), shifts, accumulate=True)
        if token_ids is not None:
            dense = dense.gather(1, token_ids.reshape(-1, token_ids.shape[-1])[touched].clamp(0, vocab_size - 1))
        lines.index_add_(0, touched, dense)

    def add_at(self, scores: Tensor, places: Tensor, token_ids: Tensor, width: int) -> None:
        """Add the shifts to scores [n] of tokens that are listed place by place with rising ids, in place.

        A place is row * width + position, where rows have `width` positions.
        """
        if not len(token_ids):
            return
        size = max(int(self.token_ids.max()), int(token_ids.max())) + 1
        wanted = (self.rows * width + self.positions) * size + self.token_ids
        listed = (places * size + token_ids).cpu().numpy()
        at = np.minimum(np.searchsorted(listed, wanted), len(listed) - 1)
        found = listed[at] == wanted
        index, shifts = (torch.from_numpy(each[found]).to(scores.device) for each in (at, self.shifts))
        scores.index_add_(0, index, shifts)


class WordBias:
    """The words of one calibrator (`CalibratorConfig.words`) in one vocabulary."""

    def __init__(self, words: Mapping[str, float], vocabulary: Vocabulary) -> None:
        spellings = {**masked_variants(words), **words}
        self._shifts = {word.encode(): float(shift) for word, shift in spellings.items()}
        self._vocabulary = vocabulary
        self._longest = max(map(len, self._shifts), default=0)
        self._tails: dict[int, tuple[bytes, int, bytes]] = {}

    def __len__(self) -> int:
        return len(self._shifts)

    def whole(self) -> Completions:
        """The tokens that are a space and a word, perhaps with other characters than letters behind it."""
        spaced, _ = self._tokens
        shifts = {**self._protected_beginnings, **self._shifts}
        return _completions([(token, shifts[run]) for run, ids in spaced.items() for token in ids if run in shifts])

    @cached_property
    def token_ids(self) -> NDArray[np.int64]:
        """All tokens that are a word with a shift below 0, with a space before it or without; rising."""
        found = (ids for runs in self._tokens for run, ids in runs.items() if self._shifts.get(run, 0.0) < 0.0)
        return np.unique(np.array([token for ids in found for token in ids], dtype=np.int64))

    def after(self, token_ids: Sequence[int]) -> Completions | None:
        """The tokens that would complete a word after a text's last tokens, REACH or fewer; None: there are none.

        Special tokens and ids outside the vocabulary end a word.
        """
        letters, before = b"", -1
        for token in reversed(token_ids):
            tail, before, _ = self._tail(token)
            letters = tail + letters
            if before >= 0 or len(letters) >= self._longest:
                break
        else:
            if len(token_ids) >= REACH:
                return None  # where the word begins is out of sight
        plain = self._beginnings.get(letters)
        is_split = before in SEPARATORS and len(letters) < 2 < len(token_ids) and len(self._tail(token_ids[-2])[0]) < 2
        if is_split or before in SIGNS:
            text = b"".join(self._tail(token)[2] for token in token_ids)
            # A digit in place of what is out of sight: what the text begins with then begins no word.
            if masked := self._masked.after(b"0" + text if len(token_ids) >= REACH else text):
                return _lowered(plain, masked)
        return plain

    def _tail(self, token: int) -> tuple[bytes, int, bytes]:
        """The letters at a token's end, the byte before them (-1: there is none), and all its text, in lower case."""
        known = self._tails.get(token)
        if known is None:
            inside = 0 <= token < len(self._vocabulary) and not self._vocabulary.is_special[token]
            text = (self._vocabulary.token_bytes(token).lower() if inside else b"") or b"\n"
            start = len(text)
            while start and 97 <= text[start - 1] <= 122:
                start -= 1
            known = self._tails[token] = (text[start:], text[start - 1] if start else -1, text)
        return known

    @cached_property
    def _masked(self) -> MaskedWords:
        return MaskedWords(self._shifts, *self._tokens, self._vocabulary)

    @cached_property
    def _beginnings(self) -> dict[bytes, Completions]:
        """Letters that stand before -> what would complete a word; the empty string for text that ends in none."""
        _, bare = self._tokens
        found: dict[bytes, list[tuple[int, float]]] = defaultdict(list)
        for word, shift in self._shifts.items():
            for cut in range(len(word)):
                beginning = word[:cut]
                begun = self._shifts.get(beginning, 0.0)
                # What a beginning of the same kind has brought is not brought again.
                added = shift - begun if shift * begun > 0.0 else shift
                if added * shift > 0.0 and abs(added) >= LEAST_ADDED:
                    found[beginning] += [(token, added) for token in bare.get(word[cut:], ())]
        for reached, shift in self._protected_beginnings.items():
            for cut in range(len(reached)):
                found[reached[:cut]] += [(token, shift) for token in bare.get(reached[cut:], ())]
        for beginning, token, shift in self._masked.openings():
            found[beginning].append((token, shift))
        return {beginning: _completions(pairs) for beginning, pairs in found.items() if pairs}

    @cached_property
    def _protected_beginnings(self) -> dict[bytes, float]:
        """Beginnings of protected names that are no words themselves -> what a token that leads there gets."""
        found: dict[bytes, float] = {}
        for word, shift in self._shifts.items():
            for length in range(_LEAST_LETTERS, len(word)):
                beginning = word[:length]
                if shift > 0.0 and beginning not in self._shifts:
                    found[beginning] = max(min(shift, PROTECTED_PIECE), found.get(beginning, 0.0))
        return found

    @cached_property
    def _tokens(self) -> tuple[dict[bytes, list[int]], dict[bytes, list[int]]]:
        """Ends of words (and whole words) -> tokens whose first letters they are, behind a space and without one."""
        spaced: dict[bytes, list[int]] = defaultdict(list)
        bare: dict[bytes, list[int]] = defaultdict(list)
        ends = {word[cut:] for word in (*self._shifts, *self._protected_beginnings) for cut in range(len(word))}
        text, starts, stops = _letter_runs(self._vocabulary)
        offsets, longest = self._vocabulary.offsets, max(map(len, ends), default=0)
        likely = np.flatnonzero((stops > starts) & (stops - starts <= longest))
        for token, start, stop in zip(likely.tolist(), starts[likely].tolist(), stops[likely].tolist(), strict=True):
            if (run := text[start:stop]) in ends:
                (spaced if start > offsets[token] else bare)[run].append(token)
        return spaced, bare


def _completions(pairs: Iterable[tuple[int, float]]) -> Completions:
    """By rising ids, which are found in others several times as fast."""
    ordered = sorted(pairs)
    return Completions(
        np.array([token for token, _ in ordered], dtype=np.int64), np.array([s for _, s in ordered], dtype=np.float32)
    )


def _lowered(plain: Completions | None, masked: Mapping[int, float]) -> Completions:
    """Completions with further ones below 0; of two of a token, the lower one."""
    shifts: dict[int, float] = defaultdict(float)
    if plain is not None:
        for token, shift in zip(plain.token_ids.tolist(), plain.shifts.tolist(), strict=True):
            shifts[token] += shift
    for token, shift in masked.items():
        shifts[token] = min(shift, shifts[token])
    return _completions(shifts.items())


def _letter_runs(vocabulary: Vocabulary) -> tuple[bytes, NDArray[np.int64], NDArray[np.int64]]:
    """All tokens' text in lower case, and where the first letters of each, behind at most one space, start and stop."""
    text, begins, ends = vocabulary.data.tobytes().lower(), vocabulary.offsets[:-1], vocabulary.offsets[1:]
    data = np.frombuffer(text + b"\n", dtype=np.uint8)  # a byte more: empty tokens at the end point there
    is_letter = (data >= 97) & (data <= 122)
    others = np.flatnonzero(~is_letter)
    starts = begins + ((data[begins] == 32) & (ends > begins))
    stops = np.minimum(others[np.searchsorted(others, starts)], ends)
    return text, starts, stops
