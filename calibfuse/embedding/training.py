"""Fit the alignment matrix A of mode "embedding" by negative sampling (Tian et al. 2025).

Of a token t, the target's embedding e2 and those of K random other tokens, <e1(t) A, e2(t)> is to be the largest; e1
is what the calibrator's body is fed.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from calibfuse.calibrator.binding import BoundCalibrator
from calibfuse.embedding.alignment import (
    Alignment,
    AlignmentMetadata,
    alignable,
    common_tokens,
    sketch_of,
    target_embeddings,
)
from calibfuse.errors import InputError
from calibfuse.guide import Guide

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEGATIVES = 10  # K, random other tokens for each token
BATCH_SIZE = 32  # tokens
LEARNING_RATE = 1e-3  # of Adam
HELD_OUT = 0.05  # share of the common tokens kept from training, by which the fit is measured
_START_SCALE = 0.1  # spread of the first inner products
_LAST_STEPS = 100
_EVALUATION_BLOCK = 64
_FEWEST_TOKENS = 20


@dataclass(frozen=True, eq=False)
class _Pairs:
    source: Tensor  # float32 [common, width], the calibrator's
    rows: Tensor  # [target rows, hidden_size], the target's, in its own dtype
    ids: Tensor  # int64 [common], the row of each common token

    def target(self, tokens: Tensor) -> Tensor:
        """float32 [..., hidden_size] of common tokens [...] (positions, not ids)."""
        return functional.embedding(self.ids[tokens], self.rows).float()


def train_alignment(
    guide: Guide,
    target: PreTrainedModel,
    *,
    epochs: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> Alignment:
    """Fit the alignment of a calibrator with a target, which is not changed; the fit runs where its embeddings are.

    Args:
        guide: a universal calibrator, bound to the target's vocabulary.
        target: the model whose hidden states are to be fused.
        epochs: passes over the training tokens; 1 or more.
        seed: of the start, the order, the negatives and the choice of held-out tokens.
        progress: show a bar on standard error.

    Raises:
        InputError: no universal calibrator, bad options, embeddings that cannot be read, or a fit that diverged.
    """
    if type(epochs) is not int or epochs < 1:
        raise InputError(f"epochs must be a positive integer, got {epochs!r}.")
    bound, rows = alignable(guide), target_embeddings(target)
    ids = common_tokens(bound.vocabulary, rows)
    if len(ids) < _FEWEST_TOKENS:
        raise InputError(
            f"The calibrator and the target have only {len(ids)} tokens in common; {_FEWEST_TOKENS} are needed."
        )
    source = source_embeddings(bound)[ids]
    pairs = _Pairs(source.to(rows.device), rows, ids.to(rows.device))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(ids), generator=generator)
    held = order[: math.ceil(HELD_OUT * len(ids))]
    train = order[len(held) :]
    matrix = _fit(pairs, train, generator, epochs=epochs, progress=progress)
    metadata = AlignmentMetadata(
        target=_name_of(target),
        calibrator_fingerprint=bound.calibrator.fingerprint,
        vocabulary_fingerprint=bound.vocabulary.fingerprint,
        width=matrix.shape[0],
        hidden_size=matrix.shape[1],
        common_tokens=len(ids),
        held_out_tokens=len(held),
        epochs=epochs,
        seed=seed,
        held_out_loss=_held_out_loss(pairs, matrix, held, generator),
    )
    return Alignment(matrix.cpu(), sketch_of(rows, ids), metadata)


@torch.no_grad()
def source_embeddings(bound: BoundCalibrator) -> Tensor:
    """The calibrator's embeddings of all ids, special ones without meaning: float32 [target_vocab_size, width], CPU."""
    return bound.vectors.to("cpu", torch.float32) @ bound.calibrator.token_in.weight.T.to("cpu", torch.float32)


def _name_of(target: PreTrainedModel) -> str:
    """Hub id or last part of the folder (a published alignment should not tell the paths of a machine)."""
    name = str(getattr(target, "name_or_path", "") or type(target).__name__)
    return Path(name).resolve().name if Path(name).is_dir() else name


def _fit(pairs: _Pairs, train: Tensor, generator: torch.Generator, *, epochs: int, progress: bool) -> Tensor:
    device = pairs.rows.device
    norms = pairs.source.norm(dim=-1).mean() * pairs.target(train[:1024].to(device)).norm(dim=-1).mean()
    start = torch.randn(pairs.source.shape[1], pairs.rows.shape[1], generator=generator)
    matrix: Tensor = (start.to(device) * (_START_SCALE / norms.clamp(min=1e-12))).requires_grad_()
    optimizer = torch.optim.Adam([matrix], lr=LEARNING_RATE)
    steps = epochs * math.ceil(len(train) / BATCH_SIZE)
    recent: deque[Tensor] = deque(maxlen=_LAST_STEPS)
    with tqdm(total=steps, desc="aligning", unit="step", disable=not progress) as bar, torch.enable_grad():
        for _ in range(epochs):
            shuffled = train[torch.randperm(len(train), generator=generator)]
            for first in range(0, len(train), BATCH_SIZE):
                batch = shuffled[first : first + BATCH_SIZE]
                others = _other_tokens(batch, train, NEGATIVES, generator)
                loss = _loss(pairs, matrix, batch.to(device), others.to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                recent.append(loss.detach())
                bar.update()
    last = float(torch.stack(list(recent)).mean())
    if not last < 10 * math.log(1 + NEGATIVES):  # far worse than guessing is as useless as nan
        raise InputError(f"The alignment diverged (loss {last:g}): the target's embeddings are far larger than usual.")
    return matrix.detach()


def _other_tokens(batch: Tensor, tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random members of `tokens` for each token of the batch, none of them the token itself: [batch, count]."""
    others = tokens[torch.randint(len(tokens), (len(batch), count), generator=generator)]
    own = others == batch[:, None]
    while bool(own.any()):
        others[own] = tokens[torch.randint(len(tokens), (int(own.sum()),), generator=generator)]
        own = others == batch[:, None]
    return others


def _loss(pairs: _Pairs, matrix: Tensor, positives: Tensor, others: Tensor) -> Tensor:
    choices = pairs.target(torch.cat([positives[:, None], others], dim=1))
    scores = torch.einsum("bd,bkd->bk", pairs.source[positives] @ matrix, choices)
    return functional.cross_entropy(scores, torch.zeros(len(positives), dtype=torch.int64, device=scores.device))


@torch.no_grad()
def _held_out_loss(pairs: _Pairs, matrix: Tensor, held: Tensor, generator: torch.Generator) -> float:
    everything = torch.arange(len(pairs.ids))
    total = 0.0
    for block in torch.split(held, _EVALUATION_BLOCK):
        others = _other_tokens(block, everything, NEGATIVES, generator)
        device = pairs.rows.device
        total += float(_loss(pairs, matrix, block.to(device), others.to(device))) * len(block)
    return total / len(held)
