"""A store of passages that are flagged by one word, for tests of what training derives from the sorting."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from calibfuse.training.config import TrainingText
from calibfuse.training.data import PassageStore


class WordScorer:
    """1.0 for texts with the word, else 0.0."""

    def __init__(self, word: str) -> None:
        self.name = word
        self.batches: list[int] = []

    def score(self, texts: Sequence[str]) -> np.ndarray:
        self.batches.append(len(texts))
        return np.array([float(self.name in text) for text in texts])


def build_sorted_store(folder: Path, lines: Sequence[str], insult: str) -> PassageStore:
    """One passage a line; flagged are those that hold the insult."""
    (folder / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    text = TrainingText(unfiltered=[str(folder / "text.txt")], scorer=WordScorer(insult))
    return PassageStore.build(text, folder / "cache", show_progress=False)
