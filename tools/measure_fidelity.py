"""Bits per byte of held-out text when a calibrator is bound to tokenizers that it never saw.

    python tools/measure_fidelity.py --calibrator DIR --tokenizers shared/data/tokenizers \
        --pool POOL --store DIR/work/passages-* --text wikitext2-test.txt --candidates 500 --equal-strings

Prints Markdown tables, for every text one row per tokenizer:

* all: bits per byte over the full vocabulary, and the change against the mean of the pool's own tokenizers (those above
  8,000 tokens: small vocabularies and plain bytes are worse for every model).
* candidates (`--candidates N`): the same likelihood renormalised over the tokens that a target would consider, which
  is all that fusion asks for. They stand in for a target's top-k: the N tokens that followed the token before most
  often in training passages cut by that tokenizer, the N most frequent tokens, and the token that comes.
* equal strings (`--equal-strings`): what a map of equal token strings would give. The calibrator is bound to the first
  tokenizer of the pool and reads the text in its tokens (a token without an equal one as the longest pieces there are);
  a target's token with an equal one gets its probability, the others are neutral: together they get the share that
  such tokens have in training passages, each by its frequency.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from library.text_encoder import TextEncoder, text_encoder
from numpy.typing import NDArray
from torch import Tensor

from calibfuse import Calibrator, Vocabulary
from calibfuse.bits_per_byte import iter_scored, measure_fidelity
from calibfuse.calibrator.binding import BoundCalibrator, GuideStates
from calibfuse.errors import CalibfuseError
from calibfuse.textfiles import iter_documents, split_passages
from calibfuse.training.data import PassageStore
from calibfuse.training.tokenizers.pool import TokenizerPool

_SMALLEST_COMPARED = 8_000
_BLOCK = 128  # positions of which the source's whole distribution is held at once


class FrequentCandidates:
    """What a target would hold likely, by counts: the stand-in for its top-k where there is no target model.

    The candidates after a token are the tokens that followed it most often in some text of the tokenizer, and the
    tokens that are the most frequent of all.

    Args:
        sequences: token ids of the text that is counted.
        target_vocab_size: ids of the tokenizer.
        count: most followers of a token, and most frequent tokens.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], target_vocab_size: int, *, count: int) -> None:
        self.target_vocab_size = target_vocab_size
        previous = [-1, *(token for sequence in sequences for token in (*sequence, -1))][:-1]
        ids = np.array([token for sequence in sequences for token in (*sequence, -1)], dtype=np.int64)
        before = np.array(previous, dtype=np.int64)[ids >= 0]
        ids = ids[ids >= 0]
        frequencies = np.bincount(ids, minlength=target_vocab_size)
        self._frequent = torch.from_numpy(np.argsort(-frequencies, kind="stable")[:count].copy())
        pairs, pair_counts = np.unique((before + 1) * target_vocab_size + ids, return_counts=True)
        order = np.lexsort((-pair_counts, pairs // target_vocab_size))
        owners, followers = pairs[order] // target_vocab_size, pairs[order] % target_vocab_size
        starts = np.searchsorted(owners, np.arange(target_vocab_size + 2))
        kept = np.arange(len(owners)) - starts[owners] < count
        self._followers: NDArray[np.int64] = followers[kept]
        self._starts = np.searchsorted(owners[kept], np.arange(target_vocab_size + 2))

    def __call__(self, previous_ids: Tensor) -> Tensor:
        """Ids of the tokens before, [n] (-1: a text begins) -> which tokens are candidates, bool [n, vocabulary]."""
        before = previous_ids.cpu().numpy() + 1
        counts = self._starts[before + 1] - self._starts[before]
        rows = np.repeat(np.arange(len(before)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = self._followers[np.repeat(self._starts[before], counts) + within]
        mask = torch.zeros(len(before), self.target_vocab_size, dtype=torch.bool)
        mask[:, self._frequent] = True
        mask[torch.from_numpy(rows), torch.from_numpy(columns)] = True
        return mask.to(previous_ids.device)


@dataclass
class Row:
    """The figures of one tokenizer.

    Attributes:
        kind: "pool" or "unseen".
        name: of the tokenizer.
        size: its ids.
        texts: name of the text -> figure -> bits per byte.
    """

    kind: str
    name: str
    size: int
    texts: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokenizer:
    """What is needed of a tokenizer."""

    kind: str
    name: str
    vocabulary: Vocabulary
    encode: TextEncoder


class EqualStrings:
    """A calibrator bound to one vocabulary, carried over to another by equal byte strings.

    Args:
        source: bound to a vocabulary of the pool.
        target: the other vocabulary.
        counts: int64 [target ids], how often each came in training passages.
    """

    def __init__(self, source: BoundCalibrator, target: Vocabulary, counts: np.ndarray) -> None:
        self.source = source
        own = source.vocabulary
        id_of = {own.token_bytes(i): i for i in reversed(range(len(own))) if not own.is_special[i]}
        longest = max(map(len, id_of))
        self._pieces = [_longest_pieces(target.token_bytes(i), id_of, longest) for i in range(len(target))]
        ids = [id_of.get(target.token_bytes(i), -1) for i in range(len(target))]
        self._source_of = torch.tensor(ids)
        self._shares = torch.from_numpy(target.log_shares.copy())
        self._unreached = torch.tensor(sorted(set(range(len(own))) - set(ids)))
        covered = np.array(ids) >= 0
        frequencies = (counts + 1.0) * ~target.is_special
        self.uncovered_mass = float(frequencies[~covered].sum() / frequencies.sum())
        with np.errstate(divide="ignore"):
            self._neutral = torch.from_numpy(np.log(frequencies / max(frequencies[~covered].sum(), 1.0))).float()
        self.coverage = float(covered.mean())

    @torch.no_grad()
    def nats(self, sequences: Sequence[Sequence[int]], head: str) -> float:
        """Negative log-likelihood of token sequences, each from an empty context."""
        return sum(self._sequence_nats(sequence, head) for sequence in sequences if len(sequence))

    def _sequence_nats(self, sequence: Sequence[int], head: str) -> float:
        pieces = [self._pieces[token] for token in sequence]
        ids = torch.tensor([[piece for group in pieces for piece in group]])
        ends = np.cumsum([0, *map(len, pieces)])[:-1]  # state j follows j tokens of the source
        states = self.source.states(ids)
        states = states[0, torch.from_numpy(ends)]
        targets = torch.tensor(list(sequence))
        total = 0.0
        for start in range(0, len(targets), _BLOCK):
            block = targets[start : start + _BLOCK]
            scores = GuideStates(self.source, states[start : start + _BLOCK]).log_scores(head)
            norm = scores.index_fill_(1, self._unreached, -math.inf).logsumexp(dim=1)
            mapped = self._source_of[block]
            covered = scores.gather(1, mapped.clamp(min=0)[:, None])[:, 0] - norm + self._shares[block]
            covered += math.log1p(-self.uncovered_mass)
            neutral = self._neutral[block] + math.log(max(self.uncovered_mass, 1e-9))
            said = torch.where(mapped >= 0, covered, neutral)
            total -= float(said[said.isfinite()].double().sum())  # special tokens are skipped, as elsewhere
        return total


def _longest_pieces(text: bytes, id_of: dict[bytes, int], longest: int) -> list[int]:
    pieces = []
    while text:
        size = next((n for n in range(min(longest, len(text)), 0, -1) if text[:n] in id_of), 0)
        if not size:  # a byte that the source cannot spell
            text = text[1:]
            continue
        pieces.append(id_of[text[:size]])
        text = text[size:]
    return pieces


def main() -> None:
    """Measure and print."""
    args = _arguments()
    torch.set_num_threads(1)
    store = PassageStore(args.store) if args.store else None
    texts = _texts(store, args.text, args.bytes)
    counted = _up_to(store.sample_texts(args.counted_bytes, 0), args.counted_bytes) if store else []
    calibrator = Calibrator.from_pretrained(args.calibrator)
    pool = [
        Tokenizer("pool", entry.name, entry.vocabulary, entry.encode_batch)
        for entry in (TokenizerPool.load(args.pool) if args.pool else [])
    ]
    unseen = list(_unseen(args.tokenizers))
    source = calibrator.bind(pool[0].vocabulary, use_disk_cache=False) if args.equal_strings else None
    rows = []
    for tokenizer in (*pool, *unseen):
        if args.only and tokenizer.kind == "unseen" and tokenizer.name not in args.only:
            continue
        rows.append(_measure(calibrator, tokenizer, texts, counted, source, args))
        print(f"measured {tokenizer.name}", flush=True)
    for name in texts:
        _print_table(rows, name, with_candidates=args.candidates > 0, with_equal_strings=args.equal_strings)
    if args.json:
        args.json.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrator", help="folder or Hub id (default: the bundled one)")
    parser.add_argument("--tokenizers", type=Path, required=True, help="folder with tokenizer files")
    parser.add_argument("--only", nargs="*", default=[], metavar="FILE", help="of these files, only these")
    parser.add_argument("--pool", type=Path, help="pool of the training run: the rows to compare with")
    parser.add_argument(
        "--store", type=Path, help="passage store of the training run: its validation passages are read"
    )
    parser.add_argument("--text", nargs="*", default=[], help="further held-out files")
    parser.add_argument("--bytes", type=int, default=60_000, help="of each text (default: %(default)s)")
    parser.add_argument(
        "--head", default="reference", choices=("calibrator", "reference"), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--candidates", type=int, default=0, metavar="N", help="add the figure restricted to candidates (see above)"
    )
    parser.add_argument("--equal-strings", action="store_true", help="add the map of equal strings (see above)")
    parser.add_argument(
        "--counted-bytes", type=int, default=2_000_000, help="of training passages, for counts (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    if (args.candidates or args.equal_strings) and not args.store:
        parser.error("--candidates and --equal-strings count tokens in training passages: give --store")
    if args.equal_strings and not args.pool:
        parser.error("--equal-strings carries over the pool's first tokenizer: give --pool")
    return args


def _texts(store: PassageStore | None, files: Sequence[str], budget: int) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    if store:
        indices = np.random.default_rng(0).permutation(store.validation_indices)
        texts["held-out passages"] = _up_to((store.text(int(index)) for index in indices), budget)
    for file in files:
        # WikiText's mark for rare words is a control token of some tokenizers and text of others: left out for all.
        documents = (document.replace(" <unk>", "").replace("<unk>", "") for document in iter_documents([file]))
        passages = (p.strip() for document in documents for p in split_passages(document, 600))
        texts[Path(file).stem] = _up_to((p for p in passages if len(p) > 80), budget)
    return texts


def _up_to(passages: Iterable[str], budget: int) -> list[str]:
    chosen, total = [], 0
    for passage in passages:
        total += len(passage.encode())
        if total > budget:
            break
        chosen.append(passage)
    return chosen


def _unseen(folder: Path) -> Iterable[Tokenizer]:
    for path in sorted(folder.iterdir()):
        try:
            encode: Callable[[list[str]], list[list[int]]] = text_encoder(path)
        except CalibfuseError as error:
            print(f"left out: {error}")
            continue
        yield Tokenizer("unseen", path.name, Vocabulary.from_tokenizer(path), encode)


def restricted_nats(
    bound: BoundCalibrator, sequences: Sequence[Sequence[int]], candidates: FrequentCandidates, *, head: str
) -> float:
    """Negative log-likelihood with every distribution renormalised over the candidates and the token that comes."""
    nats = 0.0
    for scores, tokens, before in iter_scored(bound, sequences, head=head):
        mask = candidates(before).scatter_(1, tokens[:, None], True)
        chosen = scores.gather(1, tokens[:, None])[:, 0]
        nats += float((scores.masked_fill(~mask, -torch.inf).logsumexp(dim=1) - chosen).double().sum())
    return nats


def _measure(
    calibrator: Calibrator,
    tokenizer: Tokenizer,
    texts: dict[str, list[str]],
    counted: list[str],
    source: BoundCalibrator | None,
    args: argparse.Namespace,
) -> Row:
    vocabulary = tokenizer.vocabulary
    bound = calibrator.bind(vocabulary, use_disk_cache=False)
    row = Row(tokenizer.kind, tokenizer.name, len(vocabulary))
    candidates, carried = None, None
    if args.candidates or source is not None:
        sample = tokenizer.encode(counted)
        counts = np.bincount(
            np.concatenate([np.asarray(ids, dtype=np.int64) for ids in sample]), minlength=len(vocabulary)
        )
        if args.candidates:
            candidates = FrequentCandidates(sample, len(vocabulary), count=args.candidates)
        if source is not None:
            carried = EqualStrings(source, vocabulary, counts)
    for name, passages in texts.items():
        ids = tokenizer.encode(passages)
        result = measure_fidelity(bound, ids, head=args.head)
        figures = {
            "all": result.bits_per_byte,
            "bytes per token": result.bytes / result.tokens,
            "skipped": result.skipped / (result.skipped + result.tokens),
        }
        if candidates is not None:
            figures["candidates"] = restricted_nats(bound, ids, candidates, head=args.head) / result.bytes / math.log(2)
        if carried is not None:
            figures["equal strings"] = carried.nats(ids, args.head) / result.bytes / math.log(2)
            figures["equal strings, coverage"] = carried.coverage
        row.texts[name] = figures
    return row


def _print_table(rows: list[Row], text: str, *, with_candidates: bool, with_equal_strings: bool) -> None:
    compared = ["all", *(["candidates"] if with_candidates else [])]
    base = {
        key: np.mean([r.texts[text][key] for r in rows if r.kind == "pool" and r.size > _SMALLEST_COMPARED] or [np.nan])
        for key in compared
    }
    heads = ["tokenizer", "kind", "tokens", "bytes per token"]
    for key in compared:
        heads += [f"{key} (bits/byte)", "change"]
    heads += ["equal strings (bits/byte)", "share of its ids mapped"] if with_equal_strings else []
    print(f"\n{text}\n\n| " + " | ".join(heads) + " |\n|---|---|" + "---:|" * (len(heads) - 2))
    for row in rows:
        figures = row.texts[text]
        cells = [row.name, row.kind, f"{row.size:,}", f"{figures['bytes per token']:.2f}"]
        for key in compared:
            cells += [f"{figures[key]:.3f}", f"{100 * (figures[key] / base[key] - 1):+.1f} %"]
        if with_equal_strings:
            cells += [f"{figures['equal strings']:.3f}", f"{100 * figures['equal strings, coverage']:.0f} %"]
        print("| " + " | ".join(cells) + " |")
    for key in compared:
        changes = [100 * (row.texts[text][key] / base[key] - 1) for row in rows if row.kind == "unseen"]
        if changes:
            print(
                f"\n{text}, {key}: pool mean {base[key]:.3f}; unseen on average {np.mean(changes):+.1f} %, "
                f"worst {np.max(changes):+.1f} %"
            )


if __name__ == "__main__":
    main()
