"""A store of passages that are flagged by one word, for tests of what training derives from the sorting."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from calibfuse.training.data import PassageStore, TextSource


def build_sorted_store(folder: Path, lines: Sequence[str], insult: str) -> PassageStore:
    """One passage a line; flagged are those that hold the insult."""
    (folder / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")

    def sorter(passages):
        return np.array([insult not in passage for passage in passages])

    source = TextSource(str(folder / "text.txt"), is_non_toxic=False)
    return PassageStore.build([source], folder / "cache", sorter=sorter, sorter_name=insult, show_progress=False)
