"""Any transformers causal LM as calibrator, with or without a reference model.

A target with the same vocabulary is followed in lock-step (shared_vocabulary.py); for any other one the LM reads the
text in its own tokens and its distribution is carried over by bytes (projection.py). The reference model, a second one
of the same vocabulary, is the head "reference"; without it there is only the head "calibrator", for mode geometric.

Files are in lm_checkpoint.py. Left out: encoder-decoder models, and models without a key/value cache.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from calibfuse import hub
from calibfuse.errors import InputError, VocabularyError
from calibfuse.guide import CALIBRATOR_HEAD, REFERENCE_HEAD, Guide
from calibfuse.guides.kv_cache import check_followable, stands_holes
from calibfuse.guides.lm_checkpoint import (
    ALLOWED_FILES,
    find_reference,
    load_model,
    load_tokenizer,
    save_lm,
)
from calibfuse.guides.projected_lm import ProjectedLM, ProjectedSequence, ProjectedSession
from calibfuse.guides.shared_vocabulary import LMLogits, LockStepLM, LockStepLMSession
from calibfuse.guides.source_text import MAX_WORD, SourceText
from calibfuse.hub.model_card import calibrator_card
from calibfuse.loading import PretrainedCalibrator, Source, as_device, as_dtype
from calibfuse.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import TokenizerLike

__all__ = ["HEADS", "BoundCausalLM", "CausalLMCalibrator", "CausalLMConfig", "same_ids"]

HEADS = (CALIBRATOR_HEAD, REFERENCE_HEAD)
DEFAULT_FURTHER = 8
_LEAST_LENGTH = MAX_WORD + 4  # a start token, the longest open word byte by byte, and one further token


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """Metadata of a causal LM as calibrator, named as in CalibratorConfig.

    Attributes:
        heads: names of the heads.
        fusion: recommended fusion options.
        training: what is known of the training.
        shape: sizes of the model.
    """

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
        tokenizer: its tokenizer, a transformers tokenizer or a `tokenizers.Tokenizer`; None: it has none, and `bind`
            says so.
        reference: the model of the head "reference"; of the same vocabulary.
        name: for messages.

    Raises:
        InputError: a model is no decoder-only LM, or the reference has another number of embeddings.
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
        for each in self.models.values():
            if each.config.is_encoder_decoder:
                raise InputError(
                    f"The model {each.config.model_type!r} of {name} is an encoder-decoder model; a calibrator must "
                    "be a decoder-only causal language model."
                )
        if reference is not None and (
            reference.get_input_embeddings().num_embeddings != model.get_input_embeddings().num_embeddings
        ):
            raise InputError(
                f"The reference has {reference.get_input_embeddings().num_embeddings} token embeddings, the calibrator "
                f"{name} {model.get_input_embeddings().num_embeddings}; a reference must be a model of the "
                "same vocabulary."
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
        """Names of the heads."""
        return self.config.heads

    @property
    def fingerprint(self) -> str:
        """Hex digest of the weights of all models; the key of everything derived from them."""
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

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters of all models."""
        return (parameter for _, parameter in self.named_parameters())

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Path:
        """Write a checkpoint of transformers with tokenizer and model card; the reference goes to `reference` inside.

        Args:
            folder: made when missing.
            dtype: of the weights on disk; None: as they are.

        Returns:
            The folder.

        Raises:
            CheckpointError: the files cannot be written.
        """
        model = self.models[HEADS[0]]
        model.config.fusion, model.config.training = dict(self.config.fusion), dict(self.config.training)
        card = calibrator_card({**self.config.training, "fusion": self.config.fusion})
        return save_lm(folder, model, self.tokenizer, reference=self.models.get(HEADS[1]), card=card, dtype=dtype)

    @classmethod
    def read(
        cls,
        folder: Path,
        source: Source,
        *,
        reference: str | os.PathLike[str] | None,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> CausalLMCalibrator:
        """See `PretrainedCalibrator.read`."""
        folder = source.resolve(allow_patterns=ALLOWED_FILES)
        model, tokenizer = load_model(folder, dtype), load_tokenizer(folder)
        other = find_reference(folder)
        if reference is not None:
            other = replace(source, name_or_path=reference, revision=None).resolve(allow_patterns=ALLOWED_FILES)
        reference_model = None
        name = str(source.name_or_path or folder)
        if other is not None:
            reference_model = load_model(other, dtype)
            other_tokenizer = load_tokenizer(other)
            if tokenizer is not None and other_tokenizer is not None:
                mine, its = (Vocabulary.from_tokenizer(each) for each in (tokenizer, other_tokenizer))
                if not same_ids(mine, its):
                    raise InputError(
                        f"The reference {str(reference or other)!r} has another vocabulary ({len(its)} ids) than the "
                        f"calibrator {name!r} ({len(mine)} ids); a reference must be a model of the same vocabulary."
                    )
        loaded = cls(model, tokenizer, reference=reference_model, name=name)
        if device is not None:
            for each in loaded.models.values():
                each.to(device)
        return loaded

    def bind(
        self,
        tokenizer: TokenizerLike,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        use_disk_cache: bool = True,
        further: int = DEFAULT_FURTHER,
    ) -> BoundCausalLM:
        """Make the guide of one target vocabulary.

        Args:
            tokenizer: of the target: whatever `Vocabulary.from_tokenizer` takes.
            dtype: of the weights; None: as they are. Another one, or another device, makes a copy of the model.
            device: where it runs; None: where the model is.
            use_disk_cache: as for universal calibrators; nothing here is worth a file.
            further: with another vocabulary, own tokens per step after which the model is asked once more; 0 is
                fastest.

        Returns:
            The guide.

        Raises:
            VocabularyError: no usable tokenizer, of the target or of the LM itself.
            InputError: the model cannot be followed token by token, or `further` is negative.
        """
        if not isinstance(further, int) or isinstance(further, bool) or further < 0:
            raise InputError(f"further must be a number of tokens, 0 or more, got {further!r}.")
        dtype, device = as_dtype(dtype), as_device(device)
        target = Vocabulary.from_tokenizer(tokenizer)
        if self.tokenizer is None:
            raise VocabularyError(
                f"The language model {self.name} came without a tokenizer, so it is not known which text its ids "
                f"stand for, and whether they are those of {target.name}; save its tokenizer in the same folder."
            )
        own = Vocabulary.from_tokenizer(self.tokenizer)
        models = self.models
        if dtype is not None or device is not None:
            models = {head: _moved(model, dtype, device) for head, model in models.items()}
        start_id = self.start_id(own)
        max_length = _max_length(models)
        lock_step = same_ids(own, target)
        if lock_step:
            holes = all([stands_holes(model, self.name) for model in models.values()])
            guide = LockStepLM(models, target, start_id=start_id, max_length=max_length, holes=holes)
            return BoundCausalLM(guide, self, own)
        side_by_side = [check_followable(model, self.name, holes=True) for model in models.values()]
        if max_length is not None and max_length < _LEAST_LENGTH:
            raise InputError(
                f"The language model {self.name} reads only {max_length} tokens; to follow a target with another "
                f"vocabulary it must read {_LEAST_LENGTH}."
            )
        readable = min(int(model.get_input_embeddings().num_embeddings) for model in models.values())
        text = SourceText(self.tokenizer, own, start_id, readable=readable)
        further = further if all(side_by_side) else 0
        return BoundCausalLM(ProjectedLM(models, text, target, further=further, max_length=max_length), self, own)

    def start_id(self, own: Vocabulary) -> int:
        """What stands before every text: the own begin mark, else the end mark.

        Args:
            own: vocabulary of the model's tokenizer.

        Returns:
            A special id that has an embedding.

        Raises:
            VocabularyError: there is no such mark.
        """
        model = next(iter(self.models.values()))
        size = int(model.get_input_embeddings().num_embeddings)
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


class BoundCausalLM(Guide):
    """A guide: a causal LM over one target vocabulary. Made by `CausalLMCalibrator.bind`.

    Args:
        guide: reads the ids.
        calibrator: where it came from.
        own: vocabulary of the LM.
    """

    calibrator: CausalLMCalibrator
    missing_head_hint: ClassVar[str] = "; load it with reference= (a model of the same vocabulary)"

    def __init__(self, guide: LockStepLM | ProjectedLM, calibrator: CausalLMCalibrator, own: Vocabulary) -> None:
        self._guide = guide
        self.calibrator = calibrator
        self.source_vocabulary = own
        self.vocabulary = guide.target

    @property
    def lock_step(self) -> bool:
        """Whether the LM reads the target's ids themselves; else its distribution is projected."""
        return isinstance(self._guide, LockStepLM)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads."""
        return self.calibrator.heads

    @property
    def recommended(self) -> Mapping[str, Any]:
        """See `Guide.recommended`."""
        return self.calibrator.config.fusion

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._guide.device

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tables that were made for this vocabulary; the model's own weights are not counted."""
        return self._guide.memory_bytes

    def to(self, device: torch.device | str) -> BoundCausalLM:
        """The same object where it is there already, else a copy on the device, with its own copy of the models."""
        device = torch.device(device)
        if device == self.device:
            return self
        models = {head: _moved(model, None, device) for head, model in self._guide.models.items()}
        return BoundCausalLM(self._guide.with_models(models), self.calibrator, self.source_vocabulary)

    def covers(self, token_ids: Tensor) -> Tensor:
        """Bool, same shape: True where the token has bytes that the LM can spell."""
        return self._guide.covers(token_ids)

    def session(self) -> LockStepLMSession | ProjectedSession:
        """A new session."""
        return self._guide.session()

    def read_sequence(self, input_ids: Tensor, masked: Tensor | None) -> LMLogits | ProjectedSequence:
        """See `Guide.read_sequence`; a projection computes it when asked, token by token."""
        return self._guide.sequence(input_ids, masked)


def same_ids(one: Vocabulary, other: Vocabulary) -> bool:
    """Whether every id that has text in either stands for the same bytes in both."""
    shared = min(len(one), len(other))
    longer = one if len(one) > shared else other
    return (
        bool(longer.is_special[shared:].all())
        and np.array_equal(one.offsets[: shared + 1], other.offsets[: shared + 1])
        and np.array_equal(one.data[: one.offsets[shared]], other.data[: other.offsets[shared]])
    )


def _moved(model: PreTrainedModel, dtype: torch.dtype | None, device: torch.device | str | None) -> PreTrainedModel:
    """The model itself where it is so already, else a copy."""
    dtype = dtype or model.dtype
    device = torch.device(device) if device is not None else model.device
    if dtype == model.dtype and device == model.device:
        return model
    moved: Any = copy.deepcopy(model)
    result: PreTrainedModel = moved.to(device=device, dtype=dtype)
    return result


def _max_length(models: Mapping[str, PreTrainedModel]) -> int | None:
    lengths = [getattr(model.config, "max_position_embeddings", None) for model in models.values()]
    known = [length for length in lengths if isinstance(length, int) and length > 0]
    return min(known, default=None)


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _shape_of(model: PreTrainedModel) -> dict[str, int]:
    """Sizes by the names that most configs understand."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
    sizes = {name: getattr(model.config, name, None) for name in names}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}
