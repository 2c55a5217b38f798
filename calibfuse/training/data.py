"""The store of passages that training draws from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from calibfuse.errors import CheckpointError, DataError
from calibfuse.scorers.checks import check_scores
from calibfuse.textfiles import expand_source, iter_documents, split_passages, up_to
from calibfuse.training.config import TrainingText
from calibfuse.training.work_folder import new_folder

logger = logging.getLogger(__name__)

STORE_FORMAT = 1
PASSAGE_BYTES = 600  # the longest
_LEAST_BYTES = 16  # shorter passages are left out
VALIDATION_SHARE = 0.005
_LEAST_VALIDATION_BYTES, _MOST_VALIDATION_BYTES = 65_536, 2_000_000  # of no more than a twentieth of the text
_SORTED_AT_ONCE = 8_192  # a scorer that reads sentences batches them by length, which needs many to choose from


class PassageStore:
    """Passages of the training text in memory-mapped files, with random access.

    A passage carries a label: 1 for wanted text (both heads learn from it), 0 for text that only the reference head
    sees. A small share, chosen by a hash of the passage, is kept for validation; equal passages always fall on the
    same side.

    Files: `data.bin` (UTF-8 bytes of all passages), `offsets.npy` (int64, passages + 1), `labels.npy` (uint8),
    `is_validation.npy` (bool), `meta.json`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.meta: dict[str, Any] = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self._offsets: np.ndarray = np.load(self.folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
            self.labels: np.ndarray = np.load(self.folder / "labels.npy", allow_pickle=False)
            is_validation: np.ndarray = np.load(self.folder / "is_validation.npy", allow_pickle=False)
            self._data = np.memmap(self.folder / "data.bin", dtype=np.uint8, mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"The passage store {self.folder} is missing or damaged ({error}). Delete the folder to build it again."
            ) from error
        count = len(self._offsets) - 1
        is_whole = len(self.labels) == len(is_validation) == count and self._offsets[-1] == len(self._data)
        if not is_whole or self.meta.get("format") != STORE_FORMAT:
            raise DataError(
                f"The files of the passage store {self.folder} do not fit together, or are of another version of "
                "calibfuse. Delete the folder to build it again."
            )
        self.train_indices: np.ndarray = np.flatnonzero(~is_validation)
        self.validation_indices: np.ndarray = np.flatnonzero(is_validation)

    @classmethod
    def build(
        cls,
        text: TrainingText,
        cache_folder: str | os.PathLike[str],
        *,
        show_progress: bool = True,
    ) -> PassageStore:
        """Read and sort the text once and write the store, or reuse the one of the same files and options."""
        options = {
            "text_field": text.text_field,
            "passage_bytes": PASSAGE_BYTES,
            "min_bytes": _LEAST_BYTES,
            "sorter": f"{text.scorer.name} < {text.threshold:g}" if text.scorer else "",
            "validation_share": VALIDATION_SHARE,
            "max_validation_bytes": _MOST_VALIDATION_BYTES,
        }
        files = [(file, is_wanted) for path, is_wanted in text.sources for file in expand_source(path)]
        fingerprint = _fingerprint(files, options)
        folder = Path(cache_folder) / f"passages-{fingerprint[:16]}"
        if (folder / "meta.json").is_file():
            logger.info("Reusing the passages in %s", folder)
            return cls(folder)
        passages = _passages(files, text, show_progress=show_progress)
        try:
            with new_folder(folder, "the passages") as temporary:
                _write_store(temporary, passages, text, fingerprint)
        except CheckpointError:
            # another process may have finished the same store first; its files are equal to ours
            if not (folder / "meta.json").is_file():
                raise
        store = cls(folder)
        share = 100 * float((store.labels == 1).mean())
        logger.info("%s passages, %.1f MB, %.1f %% wanted", f"{len(store):,}", store.total_bytes / 1e6, share)
        return store

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def total_bytes(self) -> int:
        """Bytes of all passages, validation included."""
        return len(self._data)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the sources (names, sizes, times of change) and options."""
        return str(self.meta["fingerprint"])

    def text(self, index: int) -> str:
        """The passage number `index`, 0 <= index < len(self)."""
        start, end = self._offsets[index], self._offsets[index + 1]
        return bytes(self._data[start:end]).decode()

    def texts(self, indices: Iterable[int]) -> list[str]:
        """Several passages at once."""
        return [self.text(int(index)) for index in indices]

    def byte_lengths(self, indices: np.ndarray) -> np.ndarray:
        """Bytes of the passages `indices`; int64, same shape."""
        return np.asarray(self._offsets[np.asarray(indices) + 1] - self._offsets[np.asarray(indices)])

    def permutation(self, epoch: int, seed: int, label: int | None = None) -> np.ndarray:
        """The order of the training passages in one epoch, of one label or all: int64 indices."""
        indices = self.train_indices
        if label is not None:
            indices = indices[self.labels[indices] == label]
        return np.random.default_rng([seed, epoch]).permutation(indices)

    def sample_texts(self, byte_budget: int, seed: int) -> Iterator[str]:
        """Random training passages up to a number of bytes, each at most once; for training tokenizers."""
        return up_to(map(self.text, self.permutation(0, seed).tolist()), byte_budget)


def _passages(
    files: Sequence[tuple[str, bool]], text: TrainingText, *, show_progress: bool
) -> Iterator[tuple[str, bool]]:
    """All passages of the files, and whether each was given as wanted."""
    for file, is_wanted in tqdm(files, desc="reading text", unit="file", disable=not show_progress):
        for document in iter_documents([file], text_field=text.text_field):
            for passage in split_passages(document, PASSAGE_BYTES):
                stripped = passage.strip()
                if len(stripped.encode()) >= _LEAST_BYTES:
                    yield stripped, is_wanted


def _write_store(folder: Path, passages: Iterator[tuple[str, bool]], text: TrainingText, fingerprint: str) -> None:
    # array: 8 bytes a passage, against some 36 in a list of ints
    offsets, hashes, labels = array("q", [0]), array("Q"), bytearray()
    with (folder / "data.bin").open("wb") as file:
        while batch := list(islice(passages, _SORTED_AT_ONCE)):
            for passage, _ in batch:
                data = passage.encode()
                file.write(data)
                offsets.append(offsets[-1] + len(data))
                hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))
            if text.scorer is None:
                labels.extend(is_wanted for _, is_wanted in batch)
            else:
                scores = check_scores(text.scorer.score([each for each, _ in batch]), len(batch), text.scorer.name)
                labels.extend((scores < text.threshold).astype(np.uint8).tobytes())
    if len(hashes) < 2:
        raise DataError(
            f"The training text gives {len(hashes)} passage(s); at least 2 are needed, one of them for validation. "
            "Give more text."
        )
    ends = np.frombuffer(offsets, dtype=np.int64)
    chosen = choose_validation(np.frombuffer(hashes, dtype=np.uint64), np.diff(ends), VALIDATION_SHARE)
    np.save(folder / "offsets.npy", ends)
    np.save(folder / "labels.npy", np.frombuffer(bytes(labels), dtype=np.uint8))
    np.save(folder / "is_validation.npy", chosen)
    meta = {"format": STORE_FORMAT, "fingerprint": fingerprint, "passages": len(hashes)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def choose_validation(
    hashes: np.ndarray, byte_lengths: np.ndarray, share: float, max_bytes: int = _MOST_VALIDATION_BYTES
) -> np.ndarray:
    """Choose the passages of the validation set: those with the lowest hashes."""
    total = int(byte_lengths.sum())
    budget = min(max(share * total, min(_LEAST_VALIDATION_BYTES, total // 20)), max_bytes)
    order = np.argsort(hashes, kind="stable")
    taken = max(1, int(np.searchsorted(np.cumsum(byte_lengths[order]), budget, side="right")))
    chosen = hashes <= hashes[order[taken - 1]]
    if chosen.all():
        raise DataError("All passages of the training text are equal; at least two different ones are needed.")
    return np.asarray(chosen)


def _fingerprint(files: Sequence[tuple[str, bool]], options: dict[str, Any]) -> str:
    """Hex sha256 over names, sizes and times of change of the files, and the options."""
    entries: list[list[Any]] = []
    for file, is_wanted in files:
        status = os.stat(file)
        entries.append([os.path.abspath(file), status.st_size, status.st_mtime_ns, is_wanted])
    text = json.dumps([STORE_FORMAT, entries, options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
