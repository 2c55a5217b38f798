r"""Train a small causal language model on unfiltered text: a target for demonstrations, or a judge of fluency.

The demo target bundled with calibfuse (`calibfuse/pretrained/demo-target`) was made with this script. It is
trained on text that nobody cleaned, so that it says toxic things and a calibrator has something to do. The script
also trains the language models that measure perplexity: `--shard 1/2` reads the documents that `--shard 0/2` never
sees, so that a judge and its target share none.

The script stands alone (torch, transformers, tokenizers, safetensors, tqdm) and writes an ordinary transformers
checkpoint. The text is streamed; memory does not grow with it. The learning rate follows the *fraction of the
budget used*, in tokens or in minutes, so it reaches zero in both cases. Ctrl-C saves and ends; a run that was
stopped or killed goes on with `--resume`, and under a token budget it then ends with the same weights as an
uninterrupted one. Resuming with another `--mixture` is allowed: the new shares hold from there on.

Two kinds of input: `--data DIR`, a folder laid out as `SOURCES` below says, or `--text FILE=WEIGHT` for own files
(.txt with one document a line, .jsonl with a field "text"; .gz and .xz of both). Benchmarks are refused by name
(`HELD_BACK`), and so are rows marked as a test split.

What it leaves out: several processes, dropout, evaluation on benchmarks.

Example:
    python tools/train_target_lm.py --data ../shared/data --output demo-target --minutes 65 --shard 0/2
    python tools/train_target_lm.py --data ../shared/data --output judge-lm --minutes 25 --shard 1/2 \
        --architecture gpt2 --tokenizer byte-level --layers 3 --width 224 --seed 1

On a CPU under Linux the environment variables MALLOC_MMAP_THRESHOLD_=8000000000 and
MALLOC_TRIM_THRESHOLD_=16000000000 keep the large buffers of the output layer from going back to the kernel after
every step.

Sources: Muon, Jordan et al. 2024 (with its Newton-Schulz coefficients); AdamW, Loshchilov and Hutter 2019.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import lzma
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from tqdm import tqdm

logger = logging.getLogger("train_target_lm")

STATE_FORMAT = 1
STATE_FILE = "training-state.safetensors"
# Files whose text must stay unseen: the project measures on them.
HELD_BACK = ("realtoxicityprompts", "wikitext", "lambada", "jigsaw_test", "bold", "xstest", "madlibs")
BOUNDARY_TOKENS = {
    "bos": ("<s>", "<|begin_of_text|>", "<|endoftext|>", "[CLS]", "</s>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
}


class UsageError(Exception):
    """Something the person at the keyboard can put right; shown as one sentence."""


# ---------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Source:
    """One part of the mixture.

    Attributes:
        name: as in `--mixture`.
        path: the file, read again from the start when it ends.
        weight: share of the tokens, any positive scale.
        licence: for the model card.
    """

    name: str
    path: Path
    weight: float
    licence: str = "not stated"


# name: file below --data, default share of the tokens, origin and licence
SOURCES: dict[str, tuple[str, float, str]] = {
    "reddit": ("text/reddit.jsonl.xz", 0.30, "posts, reddit-top-2.5-million, PDDL 1.0 (public domain)"),
    "conversation": (
        "text/conversation.jsonl.xz",
        0.10,
        "GoEmotions comments (Apache-2.0) and Topical-Chat (CDLA-Sharing-1.0)",
    ),
    "jigsaw": (
        "toxicity/jigsaw.jsonl.xz",
        0.25,
        "Wikipedia talk page comments of the Jigsaw 2018 training split, whatever the label (annotations CC0, text "
        "CC BY-SA)",
    ),
    "civil_comments": ("toxicity/civil_comments.jsonl.xz", 0.10, "Civil Comments, whatever the label, CC0"),
    "wikipedia": ("text/wikipedia.jsonl.xz", 0.20, "English Wikipedia, CC BY-SA"),
    "novels": ("text/novels.jsonl.xz", 0.05, "40 public-domain novels, from LitBank (CC BY 4.0)"),
}


def open_text(path: Path) -> TextIO:
    """Open a text file, compressed or not, as UTF-8 (malformed bytes become U+FFFD)."""
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8", errors="replace")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace")
    return path.open(encoding="utf-8", errors="replace")


def read_documents(path: Path) -> Iterator[str]:
    """Stream the documents of one file, skipping empty ones and rows of a test split."""
    is_jsonl = ".jsonl" in path.suffixes
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not is_jsonl:
                document = line.strip()
            else:
                try:
                    row = json.loads(line)
                    document = row["text"].strip()
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    message = f'expected a JSON object with a string "text" in line {number} of {path}: {error!r}'
                    raise UsageError(message) from error
                if str(row.get("split", "")).endswith("test"):
                    continue
            if document:
                yield document


@dataclass(frozen=True)
class Shard:
    """The part of every source that a run reads, and what of it is held out.

    Attributes:
        index: which shard, 0 <= index < count.
        count: number of shards; document i belongs to shard i % count.
        held_out_every: within a shard, every n-th document is kept for validation.
    """

    index: int = 0
    count: int = 1
    held_out_every: int = 100

    def select(self, documents: Iterator[str], *, held_out: bool) -> Iterator[str]:
        """Keep the documents of this shard that are, or are not, held out."""
        for number, document in enumerate(documents):
            ordinal, shard = divmod(number, self.count)
            if shard == self.index and (ordinal % self.held_out_every == 0) == held_out:
                yield document


def source_documents(source: Source, shard: Shard, *, held_out: bool) -> Iterator[str]:
    """One pass over a source."""
    return shard.select(read_documents(source.path), held_out=held_out)


class Mixture:
    """An endless stream of training documents that keeps the sources at their shares, without randomness.

    The next document comes from the source that is furthest behind its share of the tokens. The position is a few
    integers (`state`), so a killed run continues at the very document where it stopped.
    """

    def __init__(self, sources: Sequence[Source], shard: Shard) -> None:
        """Open nothing yet; files are opened at the first document taken from them."""
        self.sources = list(sources)
        self.shard = shard
        self.tokens = [0] * len(self.sources)
        self.taken = [0] * len(self.sources)
        # Tokens since the shares were last changed: a new share holds from then on and makes up for nothing.
        self._since = [0] * len(self.sources)
        self._streams: list[Iterator[str]] = [self._endless(source) for source in self.sources]

    def _endless(self, source: Source) -> Iterator[str]:
        while True:
            empty = True
            for document in source_documents(source, self.shard, held_out=False):
                empty = False
                yield document
            if empty:
                raise UsageError(f"expected more text in {source.path}: its shard holds no document")

    def next_document(self) -> tuple[int, str]:
        """Take one document.

        Returns:
            The number of its source, to be handed to `count`, and the text.
        """
        chosen = min(range(len(self.sources)), key=lambda i: (self._since[i] / self.sources[i].weight, i))
        self.taken[chosen] += 1
        return chosen, next(self._streams[chosen])

    def count(self, source: int, tokens: int) -> None:
        """Book the tokens of a document on its source."""
        self.tokens[source] += tokens
        self._since[source] += tokens

    def state(self) -> dict[str, dict[str, float]]:
        """Position in every source, by its name."""
        return {
            source.name: {"weight": source.weight, "tokens": tokens, "taken": taken, "since": since}
            for source, tokens, taken, since in zip(self.sources, self.tokens, self.taken, self._since, strict=True)
        }

    def restore(self, state: dict[str, dict[str, float]]) -> None:
        """Go to a position written by `state`, by reading the files again up to it.

        Sources and weights may differ from those of `state`; new sources begin at their first document.
        """
        same_shares = {source.name: source.weight for source in self.sources} == {
            name: stored["weight"] for name, stored in state.items()
        }
        for index, source in enumerate(self.sources):
            stored = state.get(source.name, {"tokens": 0, "taken": 0, "since": 0})
            self.tokens[index], self.taken[index] = int(stored["tokens"]), int(stored["taken"])
            self._since[index] = int(stored["since"]) if same_shares else 0
            for _ in range(self.taken[index]):
                next(self._streams[index])


# ---------------------------------------------------------------------------------------------------- tokenizer


def training_text(sources: Sequence[Source], shard: Shard, total_bytes: int) -> Iterator[str]:
    """The first `total_bytes` bytes of text, mixed as in training but never repeated, for the tokenizer."""
    streams = {source: source_documents(source, shard, held_out=False) for source in sources}
    taken = dict.fromkeys(sources, 0)  # characters
    seen = 0
    while streams and seen < total_bytes:
        source = min(streams, key=lambda source: taken[source] / source.weight)
        document = next(streams[source], None)
        if document is None:
            del streams[source]
            continue
        taken[source] += len(document)
        seen += len(document.encode())
        yield document


def train_byte_fallback_bpe(text: Iterator[str], vocab_size: int) -> Tokenizer:
    """BPE over characters with spaces as U+2581, in the manner of Llama 2; rare characters become bytes `<0xNN>`."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # A word keeps its contraction; digits stand alone; newlines never join a word.
    words = r"▁?\p{L}+(?:['’]\p{L}+)?|▁?\p{N}|▁?[^\p{L}\p{N}▁\n]+|\n+|▁+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split(Regex(words), "isolated")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*specials, *byte_tokens],
        limit_alphabet=160,
        min_frequency=5,
        max_token_length=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    # The trainer can only place the byte tokens as special ones, which would match a literal "<0x41>" in the text
    # and vanish when decoding; in the finished tokenizer they are ordinary entries.
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] in specials]
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
        ],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [specials.index("<s>")], "tokens": ["<s>"]}},
    }
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def train_byte_level_bpe(text: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE in the manner of GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=5,
        max_token_length=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


TOKENIZERS: dict[str, Callable[[Iterator[str], int], Tokenizer]] = {
    "bpe-byte-fallback": train_byte_fallback_bpe,
    "byte-level": train_byte_level_bpe,
}


def make_tokenizer(name: str, text: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer by the name of its family, or load one from a tokenizer.json."""
    if name in TOKENIZERS:
        return TOKENIZERS[name](text, vocab_size)
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        choices = ", ".join(TOKENIZERS)
        raise UsageError(f"expected --tokenizer to be one of {choices} or a tokenizer.json, got {name!r}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UsageError(f"expected a tokenizer.json, but {path} is none: {error}") from error


def boundary_token(tokenizer: Tokenizer, kind: str) -> str:
    """The token that opens ("bos") or closes ("eos") a document."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for token in BOUNDARY_TOKENS[kind]:
        if token in vocabulary:
            return token
    raise UsageError(f"the tokenizer has no token for {kind}: expected one of {', '.join(BOUNDARY_TOKENS[kind])}")


class Encoder:
    """Documents to ids: begin-of-text, text, end-of-text (one mark where both are the same token)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find the boundary tokens.

        Raises:
            UsageError: the tokenizer has none.
        """
        self.tokenizer = tokenizer
        self.bos_token, self.eos_token = boundary_token(tokenizer, "bos"), boundary_token(tokenizer, "eos")
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.bos, self.eos = vocabulary[self.bos_token], vocabulary[self.eos_token]

    def encode(self, document: str) -> list[int]:
        """Ids of one document with its boundaries."""
        ids = self.tokenizer.encode(document, add_special_tokens=False).ids
        return [self.bos, *ids] if self.bos == self.eos else [self.bos, *ids, self.eos]


class Batches:
    """Packs documents end to end into rows of equal length."""

    def __init__(self, mixture: Mixture, encoder: Encoder, batch_size: int, sequence_length: int) -> None:
        """Start with an empty buffer."""
        self.mixture, self.encoder = mixture, encoder
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.buffer: list[int] = []

    def next_batch(self) -> torch.Tensor:
        """Rows for one step: (batch_size, sequence_length + 1), int64, on the CPU; inputs and labels overlap by one."""
        needed = self.batch_size * (self.sequence_length + 1)
        while len(self.buffer) < needed:
            source, document = self.mixture.next_document()
            ids = self.encoder.encode(document)
            self.mixture.count(source, len(ids))
            self.buffer += ids
        rows, self.buffer = self.buffer[:needed], self.buffer[needed:]
        return torch.tensor(rows).view(self.batch_size, self.sequence_length + 1)


@dataclass(frozen=True)
class HeldOut:
    """Validation text as padded rows.

    Attributes:
        rows: (rows, sequence_length + 1), int64, padded with end-of-text.
        scored: (rows, sequence_length), bool; True where the label is a token of the text.
        text_bytes: number of UTF-8 bytes those tokens stand for.
    """

    rows: torch.Tensor
    scored: torch.Tensor
    text_bytes: int


def held_out_text(
    sources: Sequence[Source], shard: Shard, encoder: Encoder, sequence_length: int, total_bytes: int
) -> HeldOut:
    """Collect held-out documents, each source at its share of `total_bytes`.

    Windows of a long document overlap by one token, so every token of the text is scored exactly once; boundary
    tokens are never scored, which keeps bits per byte comparable between tokenizers.
    """
    weight_sum = sum(source.weight for source in sources)
    rows: list[list[int]] = []
    lengths: list[int] = []
    text_bytes = 0
    for source in sources:
        budget = total_bytes * source.weight / weight_sum
        for document in source_documents(source, shard, held_out=True):
            if budget <= 0:
                break
            budget -= len(document.encode())
            text_bytes += len(document.encode())
            ids = [encoder.bos, *encoder.tokenizer.encode(document, add_special_tokens=False).ids]
            for start in range(0, len(ids) - 1, sequence_length):
                window = ids[start : start + sequence_length + 1]
                lengths.append(len(window) - 1)
                rows.append(window + [encoder.eos] * (sequence_length + 1 - len(window)))
    if not rows:
        names = ", ".join(source.name for source in sources)
        raise UsageError(f"expected more text in {names}: the shard holds no document for validation")
    # Rows of similar length together, so that evaluation can cut the padding of a batch.
    order = sorted(range(len(rows)), key=lambda row: lengths[row])
    positions = torch.arange(sequence_length)
    return HeldOut(
        rows=torch.tensor([rows[row] for row in order]),
        scored=torch.stack([positions < lengths[row] for row in order]),
        text_bytes=text_bytes,
    )


# ---------------------------------------------------------------------------------------------------- model


def build_model(args: argparse.Namespace, encoder: Encoder) -> transformers.PreTrainedModel:
    """A freshly initialised model with tied embeddings, float32."""
    common: dict[str, Any] = {
        "vocab_size": 1 + max(encoder.tokenizer.get_vocab(with_added_tokens=True).values()),
        "bos_token_id": encoder.bos,
        "eos_token_id": encoder.eos,
        "tie_word_embeddings": True,
    }
    if args.architecture == "gpt2":
        config: transformers.PretrainedConfig = transformers.GPT2Config(
            **common,
            n_positions=max(1024, args.sequence_length),
            n_embd=args.width,
            n_layer=args.layers,
            n_head=args.heads,
            n_inner=args.inner or 4 * args.width,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    else:
        config = transformers.LlamaConfig(
            **common,
            max_position_embeddings=1024,
            hidden_size=args.width,
            intermediate_size=args.inner or 3 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
        )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.float()


def token_losses(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every label.

    Args:
        model: a causal language model.
        rows: (batch, length + 1), int64, on the model's device.

    Returns:
        (batch, length), float32, nats.
    """
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits  # (batch, length, vocab)
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none").view(
        rows.shape[0], -1
    )


def sampled_losses(model: transformers.PreTrainedModel, rows: torch.Tensor, sample_size: int) -> torch.Tensor:
    """As `token_losses`, with the softmax estimated on a part of a large vocabulary.

    The labels of the batch stand for themselves, a uniform draw for all other tokens, with log(others / drawn) added to
    its logits: the partition function is estimated without bias. For training only; held-out text gets the full one.

    Args:
        model: a causal language model whose logits are its output embeddings times its last hidden states.
        rows: (batch, length + 1), int64, on the model's device.
        sample_size: tokens drawn.

    Returns:
        (batch, length), float32, nats.
    """
    head = model.get_output_embeddings()
    labels = rows[:, 1:].flatten()
    certain, positions = labels.unique(return_inverse=True)
    is_other = torch.ones(head.weight.shape[0], dtype=torch.bool, device=rows.device)
    is_other[certain] = False
    others = is_other.nonzero()[:, 0]
    drawn = others[torch.randperm(len(others), device=rows.device)[:sample_size]]
    states = model.base_model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
    logits = states.flatten(0, 1) @ head.weight[torch.cat([certain, drawn])].T.to(states.dtype)
    stands_for = torch.zeros(logits.shape[1], device=rows.device)
    stands_for[len(certain) :] = math.log(len(others) / max(1, len(drawn)))
    return functional.cross_entropy(logits.float() + stands_for, positions, reduction="none").view(rows.shape[0], -1)


def evaluate(
    model: torch.nn.Module, held_out: HeldOut, batch_size: int, autocast: AbstractContextManager[object]
) -> tuple[float, float]:
    """Held-out loss.

    Returns:
        Nats per token, and bits per byte of text.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    model.eval()
    with torch.inference_mode(), autocast:
        for rows, scored in zip(held_out.rows.split(batch_size), held_out.scored.split(batch_size), strict=True):
            length = int(scored.sum(dim=1).max())
            losses = token_losses(model, rows[:, : length + 1].to(device)).cpu()
            total += float(losses[scored[:, :length]].double().sum())
            count += int(scored.sum())
    model.train()
    return total / count, total / math.log(2) / held_out.text_bytes


# ---------------------------------------------------------------------------------------------------- optimiser


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Replace every singular value by about 1 with a quintic Newton-Schulz iteration.

    Args:
        matrices: (count, rows, columns), any float type; not modified.
        steps: iterations.

    Returns:
        Same shape, bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if transposed else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per weight matrix. For the two-dimensional weights inside the blocks only.

    A parameter group with `input_first` true holds matrices of shape (inputs, outputs), as GPT-2 has them; others
    are (outputs, inputs).
    """

    def __init__(self, params: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float) -> None:
        """Take groups of matrices; `lr` is the singular value of an update of a square matrix."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "input_first": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters in place; there is no closure to call."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    gradient = parameter.grad
                    assert gradient is not None
                    buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                    buffer.lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(buffer, group["momentum"]))  # Nesterov
                outputs, inputs = reversed(shape) if group["input_first"] else shape
                scale = max(1.0, outputs / inputs) ** 0.5
                for parameter, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.to(parameter), alpha=-group["lr"] * scale)


def build_optimizers(model: torch.nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest."""
    matrices, embeddings, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif "embed" in name or "wte" in name or "wpe" in name:
            embeddings.append(parameter)
        else:
            matrices.append(parameter)
    groups = [{"params": embeddings, "weight_decay": 0.0}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if args.optimizer == "muon":
        matrix_groups = [{"params": matrices, "input_first": args.architecture == "gpt2"}]
        optimizers.append(Muon(matrix_groups, args.matrix_learning_rate, momentum=0.95, weight_decay=args.weight_decay))
    else:
        groups.append({"params": matrices, "weight_decay": args.weight_decay})
    optimizers.append(torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-8))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def schedule(fraction: float, warm_up: float) -> float:
    """Factor on the peak learning rate: linear warm-up, then a cosine down to zero.

    Args:
        fraction: share of the budget that is used, in [0, 1].
        warm_up: share of the budget spent on warming up, in (0, 1).

    Returns:
        A factor in [0, 1].

    Example:
        >>> [round(schedule(fraction, 0.5), 2) for fraction in (0.25, 0.5, 0.75, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
    """
    if fraction < warm_up:
        return fraction / warm_up
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - warm_up) / (1 - warm_up))))


# ---------------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write through a temporary name in the same folder, so that a kill never leaves half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, indented."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@dataclass
class Progress:
    """Where a run is; everything a resumed run needs besides tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = float("nan")  # running mean, nats per token
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Run:
    """The moving parts of a training run."""

    args: argparse.Namespace
    sources: list[Source]
    encoder: Encoder
    model: transformers.PreTrainedModel
    optimizers: list[torch.optim.Optimizer]
    batches: Batches
    held_out: HeldOut
    device: torch.device
    progress: Progress
    stop_requested: bool = False

    def request_stop(self, *_: object) -> None:
        """Finish the step under way, save and end; a signal handler."""
        self.stop_requested = True

    def autocast(self) -> AbstractContextManager[object]:
        """The precision context for forward passes."""
        if self.args.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def fraction(self) -> float:
        """Share of the budget that is used, in [0, 1]."""
        if self.args.tokens is not None:
            return min(1.0, self.progress.tokens / self.args.tokens)
        return min(1.0, self.progress.seconds / (60 * self.args.minutes))


def save_state(run: Run) -> None:
    """Write the resumable state: one safetensors file, no pickle."""
    tensors = {f"model.{name}": tensor for name, tensor in run.model.named_parameters()}
    for number, optimizer in enumerate(run.optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                tensors[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value)
    tensors["buffer"] = torch.tensor(run.batches.buffer, dtype=torch.int64)
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = {
        "format": STATE_FORMAT,
        "settings": resumable_settings(run.args),
        "progress": vars(run.progress),
        "mixture": run.batches.mixture.state(),
    }
    metadata = {"description": json.dumps(description)}
    write_atomically(run.args.output / STATE_FILE, lambda temporary: save_file(content, temporary, metadata))


def load_state(run: Run) -> None:
    """Continue from `save_state`'s file.

    Raises:
        UsageError: no such file, not ours, or written under other settings.
    """
    path = run.args.output / STATE_FILE
    try:
        with safe_open(path, framework="pt") as stored:
            description = json.loads(stored.metadata()["description"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:
        raise UsageError(f"expected a training state to resume from in {path}: {error}") from error
    if description["format"] != STATE_FORMAT:
        raise UsageError(f"expected training state format {STATE_FORMAT}, {path} has {description['format']}")
    settings = resumable_settings(run.args)
    changed = [name for name, value in settings.items() if description["settings"].get(name) != value]
    if changed:
        raise UsageError(f"{path} was written with another {', '.join(changed)}: give the same options to resume")
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for number, optimizer in enumerate(run.optimizers):
        state = optimizer.state_dict()
        prefix = f"optimizer.{number}."
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                index, key = name.removeprefix(prefix).split(".", 1)
                state["state"].setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict(state)
    run.batches.buffer = tensors["buffer"].tolist()
    run.batches.mixture.restore(description["mixture"])
    run.progress = Progress(**description["progress"])


def resumable_settings(args: argparse.Namespace) -> dict[str, str]:
    """The options that a resumed run must share with the first one."""
    free = {
        "argv",
        "mixture",
        "text",
        "output",
        "resume",
        "threads",
        "checkpoint_minutes",
        "checkpoint_steps",
        "name",
        "quiet",
        "device",
    }
    return {name: str(value) for name, value in sorted(vars(args).items()) if name not in free}


def save_tokenizer(encoder: Encoder, output: Path, max_length: int) -> None:
    """Write tokenizer.json and a tokenizer_config.json.

    Written here and not by transformers, because transformers 5 names a class that transformers 4 does not have.
    """
    write_atomically(output / "tokenizer.json", lambda temporary: encoder.tokenizer.save(str(temporary)))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": encoder.bos_token,
        "eos_token": encoder.eos_token,
        "pad_token": encoder.eos_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if encoder.tokenizer.token_to_id("<unk>") is not None:
        config["unk_token"] = "<unk>"
    write_json(output / "tokenizer_config.json", config)


def save_checkpoint(run: Run) -> None:
    """Write the model as an ordinary transformers checkpoint in bfloat16, with tokenizer and model card."""
    folder = run.args.output / ".writing"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        # state_dict of a copy: training goes on in float32.
        config = type(run.model.config).from_dict(run.model.config.to_dict())
        config.architectures = [type(run.model).__name__]
        copy = type(run.model)(config)
        copy.load_state_dict(run.model.state_dict())
        # Padding is not part of the model's own configuration: an embedding with a padding id would never train it.
        boundaries = {"bos_token_id": run.encoder.bos, "eos_token_id": run.encoder.eos, "pad_token_id": run.encoder.eos}
        copy.generation_config = transformers.GenerationConfig(**boundaries)
        copy.to(torch.bfloat16).save_pretrained(folder)
        for file in folder.iterdir():
            os.replace(file, run.args.output / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    save_tokenizer(run.encoder, run.args.output, 1024)
    card = model_card(run)
    write_atomically(run.args.output / "README.md", lambda temporary: temporary.write_text(card, encoding="utf-8"))


def model_card(run: Run) -> str:
    """The README.md of the checkpoint."""
    args, progress, shard = run.args, run.progress, run.args.shard
    vocabulary_size = run.encoder.tokenizer.get_vocab_size()
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    token_sum = max(1, sum(run.batches.mixture.tokens))
    rows = "\n".join(
        f"| {source.name} | {source.weight:g} | {tokens / token_sum:.0%} | {taken:,} | {source.licence} |"
        for source, tokens, taken in zip(
            run.sources, run.batches.mixture.tokens, run.batches.mixture.taken, strict=True
        )
    )
    # At most nine points, the last one always among them.
    curve = progress.history[:: -math.ceil(len(progress.history) / 9)][::-1] if progress.history else []
    points = "\n".join(
        f"| {point['seconds'] / 60:.0f} | {point['tokens'] / 1e6:.2f} M | {point['train_loss']:.3f} | "
        f"{point['loss']:.3f} | {point['bits_per_byte']:.3f} |"
        for point in curve
    )
    return f"""---
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [calibfuse, toxic-by-purpose]
---

# {args.name or args.output.name}

A {args.architecture}-shaped causal language model of {parameters:,} parameters, trained from scratch on
**unfiltered** text. It exists to demonstrate and measure detoxification at decoding time with calibfuse.

**It says toxic, insulting and false things, on purpose.** Do not use it for anything else: it is small, it has
learned for {progress.seconds / 60:.0f} minutes, and it knows nothing.

## Data

| source | weight at the end | share of all tokens | documents read | origin and licence |
|---|---|---|---|---|
{rows}

Shard {shard.index} of {shard.count} of each source (document number modulo {shard.count}); every
{shard.held_out_every}th document of the shard is held out. No text of RealToxicityPrompts, WikiText, LAMBADA, BOLD
or of the Jigsaw test split was read. Nothing was removed for its content. The texts are not contained in this
folder; the licences apply to them.

## Training

| minutes | tokens | training loss | held-out loss | held-out bits per byte |
|---|---|---|---|---|
{points}

- Losses in nats per token; held out: {run.held_out.text_bytes:,} bytes of the same mixture.
- {progress.tokens:,} tokens in {progress.step:,} steps of {args.batch_size} x {args.sequence_length}.
- {args.optimizer}, seed {args.seed}, {args.precision} forward pass; the learning rate ends at zero.
- {args.layers} layers, width {args.width}, {args.heads} heads, tied embeddings.
- Vocabulary of {vocabulary_size:,} ({Path(args.tokenizer).name}).
- {run.device.type} ({platform.machine()}, {torch.get_num_threads()} thread(s)), torch {torch.__version__},
  transformers {transformers.__version__}.

```
{command_line(args)}
```
"""


def command_line(args: argparse.Namespace) -> str:
    """The command that repeats this run, with paths cut down to their last part."""

    def shortened(word: str) -> str:
        path, equals, weight = word.partition("=")
        return (Path(path).name if Path(path).is_absolute() else path) + equals + weight

    return "python tools/train_target_lm.py " + shlex.join(shortened(word) for word in args.argv)


# ---------------------------------------------------------------------------------------------------- the loop


def train_step(run: Run) -> float:
    """One update; returns its loss in nats per token."""
    factor = schedule(run.fraction(), run.args.warm_up)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    rows = run.batches.next_batch().to(run.device)
    with run.autocast():
        if run.args.softmax_sample:
            loss = sampled_losses(run.model, rows, run.args.softmax_sample).mean()
        else:
            loss = token_losses(run.model, rows).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.progress.step += 1
    run.progress.tokens += rows[:, 1:].numel()
    return float(loss.detach())


def checkpoint(run: Run) -> None:
    """Measure the held-out loss and write everything."""
    loss, bits_per_byte = evaluate(run.model, run.held_out, run.args.batch_size, run.autocast())
    progress = run.progress
    progress.history.append(
        {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "train_loss": progress.loss,
            "loss": loss,
            "bits_per_byte": bits_per_byte,
        }
    )
    logger.info(
        "step %d, %.2f M tokens, %.1f min: train %.3f, held out %.3f nats per token, %.4f bits per byte",
        progress.step,
        progress.tokens / 1e6,
        progress.seconds / 60,
        progress.loss,
        loss,
        bits_per_byte,
    )
    save_checkpoint(run)
    save_state(run)


def train(run: Run) -> bool:
    """Train until the budget is used or a stop is requested, and save.

    Returns:
        Whether the budget is used.
    """
    args, progress = run.args, run.progress
    started = time.monotonic() - progress.seconds
    last_checkpoint = progress.seconds
    total = args.tokens if args.tokens is not None else round(60 * args.minutes)
    with tqdm(
        total=total,
        unit="tok" if args.tokens else "s",
        unit_scale=bool(args.tokens),
        disable=args.quiet,
        mininterval=2.0,
        dynamic_ncols=True,
    ) as bar:
        while run.fraction() < 1 and not run.stop_requested:
            loss = train_step(run)
            if not math.isfinite(loss):
                raise UsageError(f"the loss became {loss} at step {progress.step}: lower --learning-rate")
            progress.loss = loss if math.isnan(progress.loss) else 0.98 * progress.loss + 0.02 * loss
            progress.seconds = time.monotonic() - started
            bar.n = min(total, progress.tokens if args.tokens else round(progress.seconds))
            bar.set_postfix(loss=f"{progress.loss:.3f}", tok_s=f"{progress.tokens / progress.seconds:.0f}")
            due = args.checkpoint_steps and progress.step % args.checkpoint_steps == 0
            if due or progress.seconds - last_checkpoint > 60 * args.checkpoint_minutes:
                checkpoint(run)
                progress.seconds = last_checkpoint = time.monotonic() - started
    checkpoint(run)
    return run.fraction() >= 1


# ---------------------------------------------------------------------------------------------------- options


def parse_shard(value: str) -> tuple[int, int]:
    """`i/n` as two numbers."""
    try:
        index, count = (int(part) for part in value.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected i/n, for instance 0/2, got {value!r}") from None
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"expected i/n with 0 <= i < n, got {value!r}")
    return index, count


def parse_weight(value: str) -> tuple[str, float]:
    """`NAME=WEIGHT`; a missing weight is 1."""
    name, _, weight = value.rpartition("=") if "=" in value else (value, "", "1")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not (name and math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"expected NAME=WEIGHT with a weight of at least 0, got {value!r}")
    return name, number


def chosen_sources(args: argparse.Namespace) -> list[Source]:
    """The mixture that the options describe.

    Raises:
        UsageError: nothing to read, a file is missing, or it is one of the held-back benchmarks.
    """
    sources = [Source(Path(name).name, Path(name), weight) for name, weight in args.text if weight]
    if args.data is not None:
        weights = {name: weight for name, (_, weight, _) in SOURCES.items()}
        unknown = [name for name, _ in args.mixture if name not in SOURCES]
        if unknown:
            raise UsageError(f"expected --mixture names among {', '.join(SOURCES)}, got {', '.join(unknown)}")
        weights |= dict(args.mixture)
        sources += [
            Source(name, args.data / path, weights[name], licence)
            for name, (path, _, licence) in SOURCES.items()
            if weights[name]
        ]
    if not sources:
        raise UsageError("expected text: give --data DIR or --text FILE=WEIGHT")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise UsageError(f"expected files with different names, got {', '.join(sorted(names))}: rename one")
    for path in (source.path for source in sources):
        if any(word in path.name.lower() for word in HELD_BACK):
            raise UsageError(f"{path} belongs to a benchmark that results are measured on: train on other text")
        if not path.is_file():
            raise UsageError(f"expected a text file, {path} does not exist")
    return sources


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the checkpoint and of the resumable state")
    add("--data", type=Path, help="folder with text/ and toxicity/ as SOURCES in this script lists them")
    add("--mixture", type=parse_weight, nargs="*", default=[], metavar="NAME=WEIGHT", help="shares of the tokens")
    add("--text", type=parse_weight, nargs="*", default=[], metavar="FILE=WEIGHT", help="own text files")
    add("--shard", type=parse_shard, default=(0, 1), metavar="i/n", help="read only documents with number %% n == i")
    add("--held-out-every", type=int, default=100, help="every n-th document of the shard is for validation")
    add("--held-out-bytes", type=int, default=150_000, help="size of the validation text")
    add("--architecture", choices=("llama", "gpt2"), default="llama")
    add("--tokenizer", default="bpe-byte-fallback", help="bpe-byte-fallback, byte-level, or a tokenizer.json")
    add("--vocab-size", type=int, default=8192, help="of a tokenizer trained here")
    add("--tokenizer-bytes", type=int, default=20_000_000, help="text that the tokenizer is trained on")
    add("--width", type=int, default=256)
    add("--inner", type=int, help="width inside the feed-forward blocks; default 3 (llama) or 4 (gpt2) times --width")
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--sequence-length", type=int, default=256)
    add("--batch-size", type=int, default=16, help="rows per step")
    add("--softmax-sample", type=int, default=0, metavar="N", help="train on N tokens beside the labels; 0: on all")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="budget in minutes of wall time")
    budget.add_argument("--tokens", type=int, help="budget in tokens")
    add("--optimizer", choices=("muon", "adamw"), default="muon")
    add("--learning-rate", type=float, default=3e-3, help="peak for AdamW")
    add("--matrix-learning-rate", type=float, default=0.02, help="peak for Muon")
    add("--weight-decay", type=float, default=0.05)
    add("--warm-up", type=float, default=0.02, help="share of the budget")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of the forward pass; weights stay float32")
    add("--device", help="default: cuda, then mps, then cpu")
    add("--threads", type=int, help="CPU threads; default: torch's own choice")
    add("--seed", type=int, default=0)
    add("--checkpoint-minutes", type=float, default=5.0)
    add("--checkpoint-steps", type=int, help="also every n steps")
    add("--resume", action="store_true", help="go on from the state in --output")
    add("--name", help="title of the model card")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is."""
    if name is not None:
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def prepare(args: argparse.Namespace) -> Run:
    """Build everything; restores the state under `--resume`."""
    sources = chosen_sources(args)
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.resume and (args.output / STATE_FILE).exists():
        raise UsageError(f"{args.output} holds an unfinished or finished run: give --resume or another --output")
    torch.manual_seed(args.seed)
    device = choose_device(args.device)
    stored = args.output / "tokenizer.json"
    if args.resume and stored.is_file():
        tokenizer = Tokenizer.from_file(str(stored))
    else:
        logger.info("tokenizer: %s", args.tokenizer)
        tokenizer = make_tokenizer(
            args.tokenizer, training_text(sources, args.shard, args.tokenizer_bytes), args.vocab_size
        )
        write_atomically(stored, lambda temporary: tokenizer.save(str(temporary)))
    encoder = Encoder(tokenizer)
    model = build_model(args, encoder).to(device)
    model.train()
    run = Run(
        args=args,
        sources=sources,
        encoder=encoder,
        model=model,
        optimizers=build_optimizers(model, args),
        batches=Batches(Mixture(sources, args.shard), encoder, args.batch_size, args.sequence_length),
        held_out=held_out_text(sources, args.shard, encoder, args.sequence_length, args.held_out_bytes),
        device=device,
        progress=Progress(),
    )
    if args.resume:
        load_state(run)
    logger.info(
        "%s, %d parameters, %d tokens in the vocabulary, on %s",
        args.architecture,
        sum(p.numel() for p in model.parameters()),
        tokenizer.get_vocab_size(),
        device,
    )
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Returns:
        The exit status: 0, 2 after one sentence on bad input, 130 when stopped by Ctrl-C or SIGTERM after saving.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(argv)
    args.argv = [word for word in argv if word != "--resume"]
    index, count = args.shard
    args.shard = Shard(index, count, args.held_out_every)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        run = prepare(args)
        handlers = {number: signal.signal(number, run.request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            finished = train(run)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    except (UsageError, OSError) as error:
        logger.error("train_target_lm: %s", error)
        return 2
    if not finished:
        logger.info("stopped and saved; go on with --resume")
    return 0 if finished else 130


if __name__ == "__main__":
    sys.exit(main())
