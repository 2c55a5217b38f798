"""Any transformers causal LM as calibrator, with or without a reference model of the same vocabulary.

A target with the same vocabulary is followed in lock-step (shared_vocabulary.py); for any other one the LM reads the
text in its own tokens and its distribution is carried over by bytes (projected_lm.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calibfuse import hub
from calibfuse.errors import InputError, VocabularyError
from calibfuse.guide import CALIBRATOR_HEAD, REFERENCE_HEAD
from calibfuse.guides.bound_lm import BoundCausalLM, embeddings_of, moved_model
from calibfuse.guides.kv_cache import try_reading
from calibfuse.guides.lm_checkpoint import (
    ALLOWED_FILES,
    REFERENCE_FOLDER,
    is_transformers_checkpoint,
    load_model,
    load_tokenizer,
    save_lm,
)
from calibfuse.guides.projected_lm import ProjectedLM
from calibfuse.guides.shared_vocabulary import LockStepLM
from calibfuse.guides.source_text import MAX_WORD, SourceText
from calibfuse.hub.model_card import calibrator_card
from calibfuse.loading import Find, PretrainedCalibrator, as_device, as_dtype
from calibfuse.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import TokenizerLike

__all__ = ["BoundCausalLM", "CausalLMCalibrator", "CausalLMConfig", "same_ids"]

HEADS = (CALIBRATOR_HEAD, REFERENCE_HEAD)
_LEAST_LENGTH = MAX_WORD + 4  # a start token and the longest open word byte by byte


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """Metadata of a causal LM as calibrator, named as in CalibratorConfig; `shape` holds sizes of the model."""

    heads: tuple[str, ...]
    fusion: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary; the sizes stand beside the other keys, as in CalibratorConfig."""
        facts = {"heads": list(self.heads), "fusion": dict(self.fusion), "training": dict(self.training)}
        return {**self.shape, **facts}


class CausalLMCalibrator(PretrainedCalibrator):
    """A causal LM that can be bound to any vocabulary.

    Args:
        model: a transformers causal LM; used as it is, in evaluation mode.
        tokenizer: its own, a transformers tokenizer or a `tokenizers.Tokenizer`; without one it cannot be bound.
        reference: the model of the head "reference"; an InputError where it has another number of embeddings.
        name: for messages.
    """

    config: CausalLMConfig

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,  # noqa: ANN401
        *,
        reference: PreTrainedModel | None = None,
        name: str = "in memory",
    ) -> None:
        self.name = name
        self.models = {HEADS[0]: model.eval()}  # type: ignore[no-untyped-call]
        if reference is not None:
            self.models[HEADS[1]] = reference.eval()  # type: ignore[no-untyped-call]
        if reference is not None and embeddings_of(reference) != embeddings_of(model):
            raise InputError(
                f"The reference has {embeddings_of(reference)} token embeddings, the calibrator {name} "
                f"{embeddings_of(model)}; a reference must be a model of the same vocabulary."
            )
        self.tokenizer = tokenizer
        # transformers keeps what config.json holds beside its own keys.
        recommended, facts = (_mapping(getattr(model.config, key, None)) for key in ("fusion", "training"))
        if not recommended and reference is None:
            recommended = {"mode": "geometric"}  # contrast needs the reference
        self.config = CausalLMConfig(
            heads=tuple(self.models),
            fusion=recommended,
            training={"model_type": model.config.model_type, "name": name, **facts},
            shape=_shape_of(model),
        )

    @property
    def heads(self) -> tuple[str, ...]:
        return self.config.heads

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(b"calibfuse causal lm 1")
        for head, model in self.models.items():
            digest.update(head.encode())
            digest.update(hub.weights_fingerprint(model.state_dict()).encode())
        return digest.hexdigest()

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters of all models; names begin with the head."""
        for head, model in self.models.items():
            for name, parameter in model.named_parameters():
                yield f"{head}.{name}", parameter

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """See `PretrainedCalibrator.save_pretrained`; weights as they are, the reference in the folder `reference`."""
        model = self.models[HEADS[0]]
        model.config.fusion, model.config.training = dict(self.config.fusion), dict(self.config.training)
        card = calibrator_card({**self.config.training, "fusion": self.config.fusion})
        return save_lm(Path(folder), model, self.tokenizer, self.models.get(HEADS[1]), card)

    @classmethod
    def read(
        cls,
        folder: Path,
        name_or_path: str | os.PathLike[str] | None,
        find: Find,
        *,
        reference: str | os.PathLike[str] | None,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> CausalLMCalibrator:
        folder = find(name_or_path, allow_patterns=ALLOWED_FILES)
        model, tokenizer = load_model(folder, dtype, device), load_tokenizer(folder)
        name = str(name_or_path or folder)
        other = folder / REFERENCE_FOLDER
        if reference is not None:
            other = find(reference, revision=None, allow_patterns=ALLOWED_FILES)
        elif not is_transformers_checkpoint(other):
            return cls(model, tokenizer, name=name)
        other_tokenizer = load_tokenizer(other)
        if tokenizer is not None and other_tokenizer is not None:
            mine, its = (Vocabulary.from_tokenizer(each) for each in (tokenizer, other_tokenizer))
            if not same_ids(mine, its):
                raise InputError(
                    f"The reference {str(reference or other)!r} has another vocabulary ({len(its)} ids) than the "
                    f"calibrator {name!r} ({len(mine)} ids); a reference must be a model of the same vocabulary."
                )
        return cls(model, tokenizer, reference=load_model(other, dtype, device), name=name)

    def bind(
        self,
        tokenizer: TokenizerLike,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        use_disk_cache: bool = True,
    ) -> BoundCausalLM:
        dtype, device = as_dtype(dtype), as_device(device)
        target = Vocabulary.from_tokenizer(tokenizer)
        if self.tokenizer is None:
            raise VocabularyError(
                f"The language model {self.name} came without a tokenizer, so it is not known which text its ids "
                f"stand for, and whether they are those of {target.name}; save its tokenizer in the same folder."
            )
        own = Vocabulary.from_tokenizer(self.tokenizer)
        models = {head: moved_model(model, dtype, device) for head, model in self.models.items()}
        start_id = self._start_id(own)
        for model in models.values():
            try_reading(model, self.name)
        if same_ids(own, target):
            return LockStepLM(self, models, target, start_id=start_id)
        readable = min(map(embeddings_of, models.values()))
        text = SourceText(self.tokenizer, own, start_id, readable=readable)
        bound = ProjectedLM(self, models, text, target)
        if bound.max_length is not None and bound.max_length < _LEAST_LENGTH:
            raise InputError(
                f"The language model {self.name} reads only {bound.max_length} tokens; to follow a target with another "
                f"vocabulary it must read {_LEAST_LENGTH}."
            )
        return bound

    def _start_id(self, own: Vocabulary) -> int:
        """What stands before every text: the own begin mark, else the end mark; special, and with an embedding."""
        model = next(iter(self.models.values()))
        size = embeddings_of(model)
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            for holder in (self.tokenizer, model.config):
                found = getattr(holder, role, None)
                found = found[0] if isinstance(found, list) and found else found
                if isinstance(found, int) and 0 <= found < size and (found >= len(own) or own.is_special[found]):
                    return found
        raise VocabularyError(
            f"The language model {self.name} has neither a begin nor an end mark to put before a text; set "
            "bos_token in its tokenizer."
        )


def same_ids(one: Vocabulary, other: Vocabulary) -> bool:
    """Whether every id that has text in either stands for the same bytes in both."""
    shared = min(len(one), len(other))
    longer = one if len(one) > shared else other
    return (
        bool(longer.is_special[shared:].all())
        and np.array_equal(one.offsets[: shared + 1], other.offsets[: shared + 1])
        and np.array_equal(one.data[: one.offsets[shared]], other.data[: other.offsets[shared]])
    )


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _shape_of(model: PreTrainedModel) -> dict[str, int]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
    sizes = {name: getattr(model.config, name, None) for name in names}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}
