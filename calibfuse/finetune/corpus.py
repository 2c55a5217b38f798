"""The corpus of a fine-tuning: documents one after the other, with the model's marks between them, cut into blocks."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calibfuse import hub
from calibfuse.errors import DataError, InputError

_AT_ONCE = 256  # documents tokenized, and judged by `keep`, at a time

Keep = Callable[[Sequence[str]], NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class PackedCorpus:
    """Blocks of token ids."""

    train: Tensor  # int32 [blocks, block_length]
    held_out: Tensor  # int32 [held-out blocks, block_length], of documents that `train` does not contain; may be empty
    documents: int  # how many were read, held-out ones among them
    dropped: int = 0  # how many of them `keep` refused

    @property
    def block_length(self) -> int:
        """Tokens of a block."""
        return int(self.train.shape[1])

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        counts = torch.tensor([self.documents, self.dropped])
        hub.write_tensors(path, {"train": self.train, "held_out": self.held_out, "counts": counts})

    @classmethod
    def load(cls, path: Path) -> PackedCorpus:
        """Read what `save` wrote."""
        tensors = hub.read_tensors(path)
        documents, dropped = (int(count) for count in tensors["counts"])
        return cls(tensors["train"], tensors["held_out"], documents, dropped)


def pack_corpus(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_length: int = 128,
    held_out_share: float = 0.05,
    keep: Keep | None = None,
    show_progress: bool = False,
) -> PackedCorpus:
    """Tokenize documents and pack them into blocks.

    A share of the documents (in [0, 0.5]) is held out; `keep` says of the others which to train on, bool [documents].
    """
    if block_length < 2:
        raise InputError(f"A block needs at least 2 tokens, got block_length {block_length}.")
    if not 0.0 <= held_out_share <= 0.5:
        raise InputError(f"held_out_share must be in [0, 0.5], got {held_out_share}.")
    every = round(1.0 / held_out_share) if held_out_share else 0
    train, held_out = array("i"), array("i")
    number = dropped = 0
    source = iter(documents)
    with tqdm(desc="reading the corpus", unit="document", leave=False, disable=not show_progress) as bar:
        while texts := list(islice(source, _AT_ONCE)):
            is_held_out = [every > 0 and place % every == every - 1 for place in range(number, number + len(texts))]
            asked = [text for text, held in zip(texts, is_held_out, strict=True) if not held]
            answers = iter(keep(asked).tolist() if keep is not None and asked else [True] * len(asked))
            for text, held in zip(_encoded(tokenizer, texts), is_held_out, strict=True):
                if held:
                    held_out.extend(text)
                elif next(answers):
                    train.extend(text)
                else:
                    dropped += 1
            number += len(texts)
            bar.update(len(texts))
    if not number:
        raise DataError("The corpus has no documents. Give files with text.")
    corpus = PackedCorpus(_blocks(train, block_length), _blocks(held_out, block_length), number, dropped)
    for name, blocks, tokens in (("training", corpus.train, train), ("held-out", corpus.held_out, held_out)):
        if not len(blocks) and (name == "training" or every):
            raise DataError(
                f"The {name} part of the corpus has {len(tokens)} tokens ({number} documents, {dropped} of them "
                f"filtered out), fewer than one block of {block_length}. Give more text, or a smaller block length."
            )
    return corpus


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    """Ids of each text between the model's marks; a single mark where begin and end are the same (GPT-2)."""
    rows: Any = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for row in rows:
        ids = list(row)
        if begin is not None:
            ids.insert(0, begin)
        if end is not None and end != begin:
            ids.append(end)
        yield ids


def _blocks(ids: array[int], length: int) -> Tensor:
    count = len(ids) // length
    flat = np.frombuffer(ids, dtype=np.int32)[: count * length] if count else np.empty(0, dtype=np.int32)
    return torch.from_numpy(flat.reshape(count, length).copy())


@torch.no_grad()
def corpus_perplexity(model: PreTrainedModel, blocks: Tensor, *, batch_size: int = 16) -> float:
    """Perplexity per token of a model on packed blocks."""
    if not len(blocks):
        return math.nan
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    nats, tokens = 0.0, 0
    for start in range(0, len(blocks), batch_size):
        ids = blocks[start : start + batch_size].to(model.device, torch.long)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nats += float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        tokens += ids[:, 1:].numel()
    model.train(was_training)
    return math.exp(nats / tokens) if nats / tokens < 700 else math.inf
