"""The auxiliary model: R(x_<=i, y) for every next token y of a target's vocabulary in one forward (NADO).

R(x_<=i) = E_p[C | x_<=i] (Meng et al. 2022, arXiv 2205.14219) is the head "value" of a universal calibrator. Body,
composer and the other heads stay as they are, and the result is a calibrator that binds to any vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from calibfuse.calibrator import Calibrator, load_universal
from calibfuse.calibrator.composer import token_features
from calibfuse.calibrator.model import Head
from calibfuse.errors import MissingHeadError, VocabularyMismatchError
from calibfuse.guide import VALUE_HEAD
from calibfuse.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import TokenizerLike


class AuxiliaryModel(nn.Module):
    """Log R over a target's vocabulary, on the calibrator's device; its value head learns, all else is frozen.

    Tokens without bytes are neutral: R of them is R of the prefix.

    `target_vocab_size` is the width of the target's output head, at least the size of the vocabulary.
    """

    def __init__(self, calibrator: Calibrator, vocabulary: Vocabulary, target_vocab_size: int) -> None:
        super().__init__()
        if VALUE_HEAD not in calibrator.config.heads:
            raise MissingHeadError(
                f"An auxiliary model needs the head {VALUE_HEAD!r}, but the calibrator has only "
                f"{', '.join(map(repr, calibrator.config.heads))}."
            )
        self.calibrator = calibrator.float().requires_grad_(False)
        self.vocabulary = vocabulary
        self.target_vocab_size = target_vocab_size
        self.head = cast(Head, calibrator.heads[VALUE_HEAD]).requires_grad_(True)
        config, device = calibrator.config, calibrator.boundary.device
        self._column = config.token_width + config.heads.index(VALUE_HEAD)
        # The table is one parameter of all heads; its column of this head learns on its own, and is put back on saving.
        self.bias_table = nn.Parameter(calibrator.composer.table[:, self._column].detach().clone())
        self.bound = calibrator.bind(vocabulary, use_disk_cache=False)
        self.vectors = self.bound.vectors
        self._has_bytes = torch.from_numpy(~vocabulary.is_special).to(device)
        features = token_features(vocabulary.data, vocabulary.offsets, config.bucket_count)
        self._buckets, self._weights = (
            torch.from_numpy(part).to(device) for part in (features.buckets, features.weights)
        )
        self._offsets = torch.from_numpy(features.offsets[:-1]).int().to(device)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read whole texts: queries [batch, length + 1, token_width]; slot 0 speaks of the first token.

        `input_ids` int64 [batch, length] are the target's; `attention_mask` is 0 for padding, on either side.
        """
        masked = None if attention_mask is None else attention_mask == 0
        queries: Tensor = self.head(self.bound.states(input_ids, masked))
        return queries

    def of_next(self, states: Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Log R of the tokens that follow in the text, without the work for all others."""
        return self._prefix_log_r(input_ids, states, self._token_biases()).roll(-1, dims=1)[positions]

    def of_all(self, states: Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Log R of all next tokens at some positions: float32 [number of positions, target_vocab_size], nats."""
        biases = self._token_biases()
        log_r = functional.logsigmoid((states[:, 1:][positions] @ self.vectors.T + biases).float())
        prefix = self._prefix_log_r(input_ids, states, biases)[positions]
        size = len(self.vocabulary)
        log_r = torch.where(self._has_bytes, log_r, prefix[:, None])
        return torch.cat([log_r, prefix[:, None].expand(-1, self.target_vocab_size - size)], dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log R at all positions: float32 [batch, length, target_vocab_size], nats, at most 0; arguments of `states`.

        Entry [b, i, y] is log R(x_<=i, y).
        """
        everywhere = torch.ones_like(input_ids, dtype=torch.bool)
        log_r = self.of_all(self.states(input_ids, attention_mask), input_ids, everywhere)
        return log_r.view(*input_ids.shape, self.target_vocab_size)

    def _prefix_log_r(self, input_ids: Tensor, queries: Tensor, biases: Tensor) -> Tensor:
        """Log R of each prefix x_<=i, float32 [batch, length]: what was said of its latest token with bytes.

        Before the first such token it is the mean over the vocabulary.
        """
        size = len(self.vocabulary)
        known = input_ids.clamp(0, size - 1)
        own = (queries[:, :-1] * functional.embedding(known, self.vectors)).sum(dim=-1) + biases[known]
        text = self._has_bytes
        average = queries[:, 1:] @ self.vectors[text].mean(dim=0) + biases[text].mean()
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        latest = torch.where(self.bound.covers(input_ids), places, -1).cummax(dim=1).values
        scores = torch.where(latest >= 0, own.gather(1, latest.clamp(min=0)), average)
        return functional.logsigmoid(scores.float())

    def _token_biases(self) -> Tensor:
        """Of the head "value" for every token of the vocabulary, [len(vocabulary)]."""
        sums = functional.embedding_bag(
            self._buckets, self.bias_table[:, None], self._offsets, mode="sum", per_sample_weights=self._weights
        )
        return sums[:, 0]

    @property
    def is_fresh(self) -> bool:
        """Whether it has learned nothing yet: its last matrix is zero."""
        return not bool(self.head.query.weight.any())

    def set_prior(self, satisfaction: float) -> None:
        """Make a fresh model say the same R, in (0, 1), everywhere, as closely as a linear map can."""
        vectors = self.vectors[self._has_bytes].double()
        gram = vectors.T @ vectors
        ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        direction = torch.linalg.solve(gram + ridge, vectors.sum(dim=0))  # <direction, vector> is about 1
        with torch.no_grad():
            self.head.query.bias.copy_(float(torch.logit(torch.tensor(satisfaction), eps=1e-3)) * direction)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        fusion: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write an ordinary calibrator."""
        with torch.no_grad():
            self.calibrator.composer.table[:, self._column] = self.bias_table
        config = self.calibrator.config
        self.calibrator.config = replace(
            config,
            fusion={"mode": VALUE_HEAD} if fusion is None else dict(fusion),
            training=config.training if training is None else dict(training),
        )
        return self.calibrator.save_pretrained(folder, dtype=torch.float32)


def make_auxiliary_model(
    target: PreTrainedModel, tokenizer: TokenizerLike, *, seed: int, calibrator: Calibrator | None = None
) -> AuxiliaryModel:
    """A fresh auxiliary model for a target, in float32, on the target's device, in training mode.

    A copy of the calibrator (None: the bundled one) gets the value head, fresh from `seed`. A tokenizer with more
    tokens than the target has scores is a VocabularyMismatchError.
    """
    return _for_target((calibrator or load_universal()).with_value_head(seed), target, tokenizer).train()


def load_auxiliary_model(
    folder: str | os.PathLike[str], target: PreTrainedModel, tokenizer: TokenizerLike
) -> AuxiliaryModel:
    """What `AuxiliaryModel.save_pretrained` wrote, for the same target, in evaluation mode."""
    return _for_target(load_universal(folder), target, tokenizer).eval()


def _for_target(calibrator: Calibrator, target: PreTrainedModel, tokenizer: TokenizerLike) -> AuxiliaryModel:
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    output = getattr(target.get_output_embeddings(), "weight", None)  # type: ignore[no-untyped-call]
    size = int(output.shape[0]) if output is not None else int(target.config.get_text_config().vocab_size)
    last_text = int(np.flatnonzero(~vocabulary.is_special)[-1])  # a model may lack the added marks behind it
    if last_text >= size:
        raise VocabularyMismatchError(
            f"The tokenizer {vocabulary.name} has {len(vocabulary)} ids, but the target scores only {size}; do they "
            "belong together?"
        )
    return AuxiliaryModel(calibrator.to(target.device), vocabulary, max(size, len(vocabulary)))
