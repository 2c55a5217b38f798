"""The pool of tokenizers that the universal calibrator is trained on: one is drawn for each batch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tqdm import tqdm

from calibfuse import hub
from calibfuse.errors import CheckpointError, CheckpointFormatError, DataError, InputError, check_ranges
from calibfuse.textfiles import up_to
from calibfuse.training.tokenizers.negatives import frequent_words, negative_byte_strings, text_pieces
from calibfuse.training.tokenizers.styles import STYLES, check_style, train_tokenizer
from calibfuse.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

POOL_FORMAT = 1
POOL_FILE = "pool.json"
COUNT_BYTES = 4_000_000  # of text in which tokens are counted
MAX_SAMPLE_BYTES = 20_000_000


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """What to train: style, size, and how often to draw it."""

    style: str  # key of STYLES
    vocab_size: int  # the most tokens, special ones included
    draw_weight: float = 1.0  # relative frequency of being drawn

    def __post_init__(self) -> None:
        check_style(self.style, self.vocab_size)
        check_ranges(self, draw_weight="(0, inf)")


DEFAULT_POOL: tuple[PoolSpec, ...] = (
    PoolSpec(style="byte-level", vocab_size=50_000),
    PoolSpec(style="byte-level", vocab_size=12_000),
    PoolSpec(style="byte-level-triple-digits", vocab_size=64_000),
    PoolSpec(style="byte-level-single-digits", vocab_size=48_000),
    PoolSpec(style="byte-level-case-split", vocab_size=64_000),
    PoolSpec(style="byte-level-digits-first", vocab_size=32_000),
    PoolSpec(style="byte-level-punctuation", vocab_size=40_000),
    PoolSpec(style="metaspace-bytes", vocab_size=20_000),
    PoolSpec(style="metaspace-newlines", vocab_size=40_000),
    PoolSpec(style="unigram", vocab_size=24_000),
    PoolSpec(style="word-piece-lower", vocab_size=24_000),
    PoolSpec(style="word-piece-cased", vocab_size=16_000, draw_weight=0.5),
    PoolSpec(style="byte-level", vocab_size=2_000, draw_weight=0.5),
    PoolSpec(style="byte-level", vocab_size=257, draw_weight=0.25),  # bytes only
)
"""Every style, small and large. Sizes are those a vocabulary of that family spends on English."""


@dataclass(frozen=True, eq=False)
class SplitTable:
    """All ways to cut a token into two tokens of the same vocabulary, with weights.

    The BPE dropout of `tokenizers` (Provilkov et al. 2020, arXiv 1910.13267) cannot be seeded, and is for BPE alone.
    """

    counts: npt.NDArray[np.int64]  # [size], number of ways per token
    starts: npt.NDArray[np.int64]  # [size], first way of each token in the arrays below
    left: npt.NDArray[np.int64]  # [ways], id of the left half
    right: npt.NDArray[np.int64]  # [ways], id of the right half
    # [ways], cumulative share of the way within its token, ending at 1; shifted by the token id, so that the whole
    # array rises and one search serves all tokens
    cumulative: npt.NDArray[np.float64]

    @classmethod
    def of(cls, vocabulary: Vocabulary, unigram_counts: npt.NDArray[np.int64]) -> SplitTable:
        """Find the ways; one weighs the geometric mean of its halves' counts, as merges of common pieces come first."""
        tokens = [vocabulary.token_bytes(index) for index in range(len(vocabulary))]
        by_bytes: dict[bytes, int] = {}
        for index, token in enumerate(tokens):
            # Of equal byte strings (a letter and its byte token) the one that the text produces counts.
            if token and (token not in by_bytes or unigram_counts[index] > unigram_counts[by_bytes[token]]):
                by_bytes[token] = index
        ways = [
            (index, by_bytes[token[:cut]], by_bytes[token[cut:]])
            for index, token in enumerate(tokens)
            for cut in range(1, len(token))
            if token[:cut] in by_bytes and token[cut:] in by_bytes
        ]
        owner, heads, tails = np.asarray(ways, dtype=np.int64).reshape(-1, 3).T.copy()
        weights = np.sqrt((unigram_counts[heads] + 1.0) * (unigram_counts[tails] + 1.0))
        counts = np.bincount(owner, minlength=len(tokens)).astype(np.int64)
        starts = np.cumsum(counts) - counts
        totals = np.bincount(owner, weights=weights, minlength=len(tokens))
        running = np.cumsum(weights)
        before = np.concatenate([[0.0], running])[starts]
        share = (running - before[owner]) / totals[owner]
        return cls(counts=counts, starts=starts, left=heads, right=tails, cumulative=np.minimum(share, 1.0) + owner)

    def split_randomly(
        self, ids: npt.NDArray[np.int64], rate: float, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Cut a share of the tokens in two: ids, and for each the place in `ids` that it comes from."""
        draws, choices = rng.random(len(ids)), rng.random(len(ids))
        is_cut = (draws < rate) & (self.counts[ids] > 0)
        cut_ids = ids[is_cut]
        way = np.searchsorted(self.cumulative, cut_ids + choices[is_cut], side="left")
        # Rounding of the shifted shares may point one way outside the token's own.
        way = np.clip(way, self.starts[cut_ids], self.starts[cut_ids] + self.counts[cut_ids] - 1)
        sources = np.repeat(np.arange(len(ids)), 1 + is_cut)
        first = np.flatnonzero(np.concatenate([[True], np.diff(sources) > 0])) if len(ids) else sources
        result = ids[sources]
        result[first[is_cut]] = self.left[way]
        result[first[is_cut] + 1] = self.right[way]
        return result, sources


class PoolEntry:
    """One tokenizer of the pool."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, spec: PoolSpec, *, unigram_counts: npt.NDArray[np.int64]
    ) -> None:
        self.tokenizer, self.spec, self.unigram_counts = tokenizer, spec, unigram_counts

    @property
    def name(self) -> str:
        """Style and size, for tables."""
        return f"{self.spec.style}-{len(self.unigram_counts)}"

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes of each id."""
        return Vocabulary.from_tokenizer(self.tokenizer)

    @cached_property
    def _splits(self) -> SplitTable:
        return SplitTable.of(self.vocabulary, self.unigram_counts)

    def encode_batch(
        self, texts: Sequence[str], *, split_rate: float = 0.0, rng: np.random.Generator | None = None
    ) -> list[list[int]]:
        """Encode texts, without special tokens.

        A share `split_rate` of the tokens is cut in two, twice, so that pieces may be cut again: what BPE dropout is
        to BPE, for every kind of model. It depends on `rng` alone, so that a resumed run repeats it exactly.
        """
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [encoding.ids for encoding in encodings]
        if split_rate == 0.0 or not rows:
            return rows
        if rng is None:
            raise InputError("encode_batch needs rng when split_rate is above 0.")
        ids = np.fromiter((index for row in rows for index in row), dtype=np.int64)
        row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        for _ in range(2):
            ids, sources = self._splits.split_randomly(ids, split_rate, rng)
            row_of = row_of[sources]
        ends = np.cumsum(np.bincount(row_of, minlength=len(rows)))
        return [part.tolist() for part in np.split(ids, ends[:-1])]

    def extended_vocabulary(self, negatives: Sequence[bytes], total_size: int) -> Vocabulary:
        """The vocabulary, then byte strings that the tokenizer never produces, up to `total_size` ids."""
        room = total_size - len(self.vocabulary)
        known = {self.vocabulary.token_bytes(index) for index in range(len(self.vocabulary))}
        fresh = (candidate for candidate in dict.fromkeys(negatives) if candidate not in known)
        chosen = list(islice(fresh, max(0, room)))
        return self.vocabulary.extended(chosen) if chosen else self.vocabulary


class TokenizerPool(tuple[PoolEntry, ...]):
    """The tokenizers of one training run, in a fixed order."""

    def __init__(self, entries: Sequence[PoolEntry]) -> None:
        if not entries:
            raise InputError("A tokenizer pool needs at least one entry, got none.")
        weights = np.array([entry.spec.draw_weight for entry in entries], dtype=np.float64)
        self._cumulative = np.cumsum(weights / weights.sum())

    def draw(self, rng: np.random.Generator) -> int:
        """Position of a random entry, by draw weight; one number is taken from `rng`."""
        return int(np.searchsorted(self._cumulative[:-1], rng.random(), side="right"))

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over the tokenizers, in order."""
        digest = hashlib.sha256(b"calibfuse pool 1")
        for entry in self:
            digest.update(hashlib.sha256(entry.tokenizer.to_str().encode()).digest())
        return digest.hexdigest()

    def negatives(self, count: int, sample: Sequence[str], seed: int) -> list[bytes]:
        """Byte strings that no tokenizer of the pool and no text of the sample holds."""
        texts = list(up_to(sample, 2 * COUNT_BYTES))
        words = frequent_words(up_to(texts, COUNT_BYTES))
        exclude = text_pieces(texts)
        for entry in self:
            exclude.update(entry.vocabulary.token_bytes(index) for index in range(len(entry.vocabulary)))
        return negative_byte_strings(count, np.random.default_rng(seed), words, exclude=exclude)

    @classmethod
    def train(
        cls, sample: Sequence[str], specs: Sequence[PoolSpec] = DEFAULT_POOL, *, show_progress: bool = True
    ) -> TokenizerPool:
        """Train every tokenizer of the pool."""
        sample_bytes = sum(len(text.encode()) for text in sample)
        if sample_bytes < 2_000:
            raise DataError(
                f"A pool of tokenizers needs at least 2000 bytes of text, got {sample_bytes} in {len(sample)} passages."
            )
        entries: dict[tuple[str, int], PoolEntry] = {}
        bar = tqdm(specs, desc="training tokenizers", unit="tokenizer", disable=not show_progress)
        for spec in bar:
            bar.set_postfix_str(f"{spec.style} {spec.vocab_size}")
            entry = _train_entry(spec, sample, sample_bytes)
            size = len(entry.unigram_counts)
            if size < spec.vocab_size:
                logger.warning("%s: %d tokens instead of %d, the text holds no more", spec.style, size, spec.vocab_size)
            if (spec.style, size) in entries:
                logger.warning("%s with %d tokens is in the pool already, left out", spec.style, size)
            entries.setdefault((spec.style, size), entry)
        return cls(list(entries.values()))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the pool: one tokenizer.json and one file of counts per entry, and `pool.json` last."""
        rows: list[dict[str, Any]] = []
        contents: dict[str, bytes] = {}
        for index, entry in enumerate(self):
            stem = f"{index:02d}-{entry.name}"
            text = entry.tokenizer.to_str().encode()
            contents |= {f"{stem}.json": text, f"{stem}.counts": entry.unigram_counts.astype("<i8").tobytes()}
            about = {"size": len(entry.unigram_counts), "sha256": hashlib.sha256(text).hexdigest()}
            rows.append({"file": stem, **asdict(entry.spec), **about})
        contents[POOL_FILE] = json.dumps({"format": POOL_FORMAT, "entries": rows}, indent=1).encode()
        hub.write_files(folder, contents)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TokenizerPool:
        """Read a pool written by `save`."""
        source = Path(folder)
        try:
            content = json.loads((source / POOL_FILE).read_text(encoding="utf-8"))
            if content["format"] > POOL_FORMAT:
                raise CheckpointFormatError(
                    f"The tokenizer pool {source} has format {content['format']}; this version reads {POOL_FORMAT}. "
                    "Update calibfuse."
                )
            return cls([_load_entry(source, row) for row in content["entries"]])
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"The tokenizer pool {source} is missing or damaged ({type(error).__name__}: {error}). Train it again."
            ) from error


def _train_entry(spec: PoolSpec, sample: Sequence[str], sample_bytes: int) -> PoolEntry:
    style = STYLES[spec.style]
    # A vocabulary much larger than the text can support would only memorise it.
    size = min(spec.vocab_size, max(style.smallest_size, sample_bytes // 16))
    budget = min(MAX_SAMPLE_BYTES, 1_000_000 + size * style.bytes_per_token)
    tokenizer = train_tokenizer(spec.style, list(up_to(sample, budget)), size)
    counts = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    counted = list(up_to(sample, COUNT_BYTES))
    for start in range(0, len(counted), 256):
        encodings = tokenizer.encode_batch_fast(counted[start : start + 256], add_special_tokens=False)
        ids = np.concatenate([encoding.ids for encoding in encodings])
        counts += np.bincount(ids.astype(np.int64), minlength=len(counts))
    return PoolEntry(tokenizer, spec, unigram_counts=counts)


def _load_entry(folder: Path, row: dict[str, Any]) -> PoolEntry:
    text = (folder / f"{row['file']}.json").read_text(encoding="utf-8")
    if hashlib.sha256(text.encode()).hexdigest() != row["sha256"]:
        raise CheckpointError(f"{row['file']}.json in {folder} is not the file that was saved. Train the pool again.")
    counts = np.frombuffer((folder / f"{row['file']}.counts").read_bytes(), dtype="<i8").astype(np.int64)
    if len(counts) != row["size"]:
        raise CheckpointError(f"{row['file']}.counts in {folder} has {len(counts)} numbers, expected {row['size']}.")
    spec = PoolSpec(style=row["style"], vocab_size=row["vocab_size"], draw_weight=row["draw_weight"])
    return PoolEntry(tokenizers.Tokenizer.from_str(text), spec, unigram_counts=counts)
