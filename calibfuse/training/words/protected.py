"""Names that a calibrator is to leave alone, and what it must give them back.

What the heads have learned of a name in spite of the balance (balance.py), or carry over from words like it, is nearly
the same shift in every context. So it is measured once, after training, and travels with the calibrator as a word with
a shift above 0, which calibrator/word_bias.py adds wherever the name is completed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from calibfuse.calibrator.binding import BoundCalibrator, GuideStates
from calibfuse.guide import CALIBRATOR_HEAD, REFERENCE_HEAD
from calibfuse.training.data import PassageStore
from calibfuse.training.tokenizers.pool import PoolEntry

OCCURRENCES = 40
"""Passages that are looked at for each name, at most; a name with fewer than LEAST_OCCURRENCES is left out."""
LEAST_OCCURRENCES = 5
QUANTILE = 0.25
"""So many of the occurrences may keep a shift below 0."""
LEAST_SHIFT = 0.1
"""What is less is not given back, nats."""
LISTED_SHIFT = 0.3
"""A listed name of a group (balance.TERMS) is given this at least: an unseen vocabulary may cut it as none that was
measured does, and then its end looks like that of other words ("home" + "less"). Nats."""
_CONTEXT_CHARACTERS = 400
_BATCH = 16


def protected_shifts(
    bound: BoundCalibrator,
    entry: PoolEntry,
    store: PassageStore,
    holders: Mapping[str, NDArray[np.int64]],
    *,
    excluded: NDArray[np.bool_] | None,
    seed: int,
    show_progress: bool = False,
) -> dict[str, float]:
    """Name -> shift above 0, nats: what brings calibrator minus reference to 0 in all but QUANTILE of its occurrences.

    `bound` has no words of its own; `holders` gives for each lower-case name the passages that hold it; `excluded` bool
    [passages] were left out of the training.
    """
    is_used = np.zeros(len(store), dtype=bool)
    is_used[store.train_indices] = True
    if excluded is not None:
        is_used &= ~excluded
    rng = np.random.default_rng([seed, 6])
    found: dict[str, float] = {}
    for name, passages in tqdm(holders.items(), desc="names", unit="name", leave=False, disable=not show_progress):
        chosen = rng.permutation(passages[is_used[passages]])[:OCCURRENCES]
        # Small letters are other bytes, and what they bring along may be worse: "jewish".
        for sequences in _occurrences(name, store, entry, chosen):
            shifts = _shifts(bound, sequences)
            missing = -float(np.quantile(shifts, QUANTILE)) if len(shifts) >= LEAST_OCCURRENCES else 0.0
            if missing >= max(LEAST_SHIFT, found.get(name, 0.0)):
                found[name] = round(missing, 2)
    return found


def _occurrences(
    name: str, store: PassageStore, entry: PoolEntry, passages: NDArray[np.int64]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of texts that end in the name: as it is written, and in small letters."""
    pattern = re.compile(rf"(?<![a-z]){name}(?![a-z])")
    texts: list[str] = []
    for index in passages.tolist():
        text = store.text(index)
        folded = text.lower()
        match = pattern.search(folded)
        if match is None or len(folded) != len(text):  # where lower-casing changes lengths, places do not fit
            continue
        start, end = match.span()
        space = start - (text[start - 1 : start] == " ")
        before = text[max(0, space - _CONTEXT_CHARACTERS) : space]
        texts += [before, before + text[space:end], before + folded[space:end]]
    rows = [list(ids) for ids in entry.encode_batch(texts)]

    def continuing(endings: Sequence[list[int]]) -> list[list[int]]:
        pairs = zip(rows[::3], endings, strict=True)
        return [ids for before, ids in pairs if before and len(ids) > len(before) and ids[: len(before)] == before]

    return continuing(rows[1::3]), continuing(rows[2::3])


@torch.no_grad()
def _shifts(bound: BoundCalibrator, sequences: Sequence[list[int]]) -> NDArray[np.float64]:
    """Calibrator minus reference of each sequence's last token, which completes the name, nats: [sequences]."""
    result: list[Tensor] = []
    ordered = sorted(sequences, key=len)
    for start in range(0, len(ordered), _BATCH):
        group = ordered[start : start + _BATCH]
        width = len(group[-1])
        ids = torch.tensor([row + [0] * (width - len(row)) for row in group])
        last = torch.tensor([len(row) - 1 for row in group])
        rows = torch.arange(len(group))
        states = GuideStates(bound, bound.read_sequence(ids.to(bound.device), None).hidden[rows, last - 1])
        own = ids[rows, last].to(bound.device)[:, None]
        calibrator, reference = (
            bound.normalise(states.log_scores(head)).gather(1, own)[:, 0] for head in (CALIBRATOR_HEAD, REFERENCE_HEAD)
        )
        result.append((calibrator - reference).cpu())
    return torch.cat(result).double().numpy() if result else np.zeros(0)
