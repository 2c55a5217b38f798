"""Any transformers causal LM as calibrator, with or without a twin as reference.

A target with the same vocabulary is followed in lock-step (lock_step_lm.py); for any other one the LM reads the text in
its own tokens and its distribution is carried over by bytes (projection.py). The twin, a second model of the same
vocabulary, is the head "reference"; without one there is only the head "calibrator", for modes geometric and blend.

Files are in lm_checkpoint.py. Left out: encoder-decoder models, and models without a key/value cache.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from calibfuse import hub
from calibfuse.errors import InputError, MissingHeadError, VocabularyError, VocabularyMismatchError
from calibfuse.guides.kv_cache import check_followable
from calibfuse.guides.lm_checkpoint import (
    ALLOWED_FILES,
    find_twin,
    is_transformers_checkpoint,
    load_model,
    load_tokenizer,
    save_lm,
)
from calibfuse.guides.projected_lm import ProjectedLM, ProjectedSequence, ProjectedSession
from calibfuse.guides.shared_vocabulary import LMLogits, LockStepLM, LockStepLMSession
from calibfuse.guides.source_text import MAX_WORD, OwnText
from calibfuse.isolation import undisturbed
from calibfuse.model_card import calibrator_card
from calibfuse.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import TokenizerLike

__all__ = ["BoundCausalLM", "CausalLMCalibrator", "CausalLMConfig", "is_transformers_checkpoint", "same_ids"]

HEADS = ("calibrator", "reference")
SPECIAL_MASS = 1e-4
DEFAULT_FURTHER = 8
_SEQUENCE_CHUNK = 4_000_000  # elements of a [positions, vocabulary] block in log_probs
_LEAST_LENGTH = MAX_WORD + 4  # a start token, the longest open word byte by byte, and one further token


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """Facts of a causal LM as calibrator, named as in CalibratorConfig.

    Attributes:
        heads: names of the heads.
        fusion: recommended fusion options.
        training: facts of the training; what the checkpoint is.
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


class CausalLMCalibrator:
    """A causal LM that can be bound to any vocabulary.

    Args:
        model: a transformers causal LM; used as it is, in evaluation mode.
        tokenizer: its tokenizer, a transformers tokenizer or a `tokenizers.Tokenizer`; None: it has none, and `bind`
            says so.
        reference: the twin, for the head "reference"; of the same vocabulary.
        name: for messages.

    Raises:
        InputError: a model is no decoder-only LM, or the twin has another number of embeddings.
    """

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
                f"{name} {model.get_input_embeddings().num_embeddings}; a reference must be a twin with the same "
                "vocabulary."
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
        """Write a checkpoint of transformers with tokenizer and model card; the twin goes to `reference` inside.

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
        return save_lm(folder, model, self.tokenizer, twin=self.models.get(HEADS[1]), card=card, dtype=dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        commit_message: str = "Upload calibrator",
        token: str | bool | None = None,
    ) -> str:
        """Save into a temporary folder and upload it.

        Returns:
            The repository's address.

        Raises:
            CheckpointError: the upload failed; the sentence says why.
        """
        with tempfile.TemporaryDirectory() as folder:
            place = self.save_pretrained(folder)
            return hub.upload_folder(
                place, repo_id, private=private, revision=revision, commit_message=commit_message, token=token
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        reference: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> CausalLMCalibrator:
        """Load a transformers checkpoint as calibrator.

        Args:
            name_or_path: local folder or Hub id.
            reference: the same of its twin (for instance the model before it was tuned on clean text); None: the
                folder `reference` of the checkpoint, where there is one.
            revision: of the calibrator on the Hub.
            cache_dir: of the Hub's files.
            local_files_only: never touch the network.
            token: Hub token.
            device: default CPU.
            dtype: of the weights in memory.

        Returns:
            The calibrator.

        Raises:
            CheckpointError: no such checkpoint, no safetensors weights, damaged or incomplete ones, or weights of an
                architecture that is no causal LM.
            InputError: an encoder-decoder model, or a reference that is no twin.
        """
        places: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        folder = hub.resolve_checkpoint(name_or_path, revision=revision, allow_patterns=ALLOWED_FILES, **places)
        model, tokenizer = load_model(folder, dtype), load_tokenizer(folder)
        other = find_twin(folder)
        if reference is not None:
            other = hub.resolve_checkpoint(reference, allow_patterns=ALLOWED_FILES, **places)
        twin = None
        if other is not None:
            twin = load_model(other, dtype)
            other_tokenizer = load_tokenizer(other)
            if tokenizer is not None and other_tokenizer is not None:
                mine, its = (Vocabulary.from_tokenizer(each) for each in (tokenizer, other_tokenizer))
                if not same_ids(mine, its):
                    raise InputError(
                        f"The reference {str(reference or other)!r} has another vocabulary ({len(its)} ids) than the "
                        f"calibrator {str(name_or_path)!r} ({len(mine)} ids); a reference must be a twin."
                    )
        loaded = cls(model, tokenizer, reference=twin, name=str(name_or_path))
        if device is not None:
            for each in loaded.models.values():
                each.to(device)
        return loaded

    def bind(
        self,
        tokenizer: TokenizerLike,
        *,
        dtype: torch.dtype | None = None,
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
        side_by_side = [check_followable(model, self.name, holes=not lock_step) for model in models.values()]
        if lock_step:
            return BoundCausalLM(LockStepLM(models, target, start_id=start_id, max_length=max_length), self, own)
        if max_length is not None and max_length < _LEAST_LENGTH:
            raise InputError(
                f"The language model {self.name} reads only {max_length} tokens; to follow a target with another "
                f"vocabulary it must read {_LEAST_LENGTH}."
            )
        readable = min(int(model.get_input_embeddings().num_embeddings) for model in models.values())
        text = OwnText(self.tokenizer, own, start_id, readable=readable)
        guide = ProjectedLM(models, text, target, further=further if all(side_by_side) else 0, max_length=max_length)
        return BoundCausalLM(guide, self, own)

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


class BoundCausalLM:
    """A guide: a causal LM over one target vocabulary. Made by `CausalLMCalibrator.bind`.

    Args:
        guide: reads the ids.
        calibrator: where it came from.
        own: vocabulary of the LM.
    """

    def __init__(self, guide: LockStepLM | ProjectedLM, calibrator: CausalLMCalibrator, own: Vocabulary) -> None:
        self._guide = guide
        self.calibrator = calibrator
        self.own_vocabulary = own
        self.vocabulary = guide.target
        self._uncovered = ~guide.covers(torch.arange(len(self.vocabulary), device=guide.device))

    @property
    def lock_step(self) -> bool:
        """Whether the LM reads the target's ids themselves; else its distribution is projected."""
        return isinstance(self._guide, LockStepLM)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads."""
        return self.calibrator.heads

    @property
    def target_vocab_size(self) -> int:
        """Number of ids of the bound vocabulary."""
        return len(self.vocabulary)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._guide.device

    @property
    def coverage(self) -> float:
        """Share of the vocabulary's ids that have bytes which the LM can spell, in [0, 1]."""
        return 1.0 - float(self._uncovered.float().mean())

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
        return BoundCausalLM(self._guide.with_models(models), self.calibrator, self.own_vocabulary)

    def covers(self, token_ids: Tensor) -> Tensor:
        """Bool, same shape: True where the token has bytes that the LM can spell."""
        return self._guide.covers(token_ids)

    def session(self) -> LockStepLMSession | ProjectedSession:
        """A new session."""
        return self._guide.session()

    def sequence(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> LMLogits | ProjectedSequence:
        """All positions of whole sequences.

        Args:
            input_ids: int64 [batch, length].
            attention_mask: [batch, length], 0 for left padding; only needed where padding is not a special token.

        Returns:
            What is said after each token: leading axes [batch, length]. A projection computes it when asked, token by
            token.

        Raises:
            VocabularyMismatchError: ids or a mask of another shape.
        """
        if input_ids.ndim != 2:
            raise VocabularyMismatchError(f"input_ids must be [batch, length], got shape {tuple(input_ids.shape)}.")
        masked = None
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise VocabularyMismatchError(
                    f"attention_mask has shape {tuple(attention_mask.shape)} but input_ids {tuple(input_ids.shape)}."
                )
            masked = attention_mask.to(self.device) == 0
        return self._guide.sequence(input_ids.to(self.device), masked)

    def log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Next-token log-probabilities under the head "calibrator"; see `BoundCalibrator.log_probs`.

        Args:
            input_ids: int64 [batch, length], the target's ids.
            attention_mask: [batch, length], 0 for left padding; only needed where padding is not a special token.

        Returns:
            float32 [batch, length, target_vocab_size], nats; row i scores token i + 1. Normalised; what is not covered
            shares the probability 1e-4.

        Raises:
            VocabularyMismatchError: ids outside the vocabulary, or shapes that do not fit.
        """
        return self._all_log_probs(HEADS[0], input_ids, attention_mask)

    def reference_log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The same under the head "reference".

        Raises:
            MissingHeadError: there is no reference.
            VocabularyMismatchError: ids outside the vocabulary, or shapes that do not fit.
        """
        if HEADS[1] not in self.heads:
            raise MissingHeadError(
                f"The calibrator {self.calibrator.name} has no reference; load it with reference= (a twin)."
            )
        return self._all_log_probs(HEADS[1], input_ids, attention_mask)

    @undisturbed
    def first_log_probs(self, head: str = HEADS[0]) -> Tensor:
        """Log-probabilities of a text's first token: float32 [target_vocab_size], nats."""
        empty = torch.zeros(1, 0, dtype=torch.int64, device=self.device)
        said, _ = self.session().step(empty, torch.zeros(0, device=self.device))
        return self.normalise(said.log_scores(head))[0]

    def normalise(self, scores: Tensor) -> Tensor:
        """Scores [..., target_vocab_size] -> log-probabilities in which uncovered tokens share SPECIAL_MASS."""
        count = int(self._uncovered.sum())
        scores = scores.masked_fill(self._uncovered, -torch.inf).log_softmax(dim=-1)
        if count == 0:
            return scores
        return (scores + math.log1p(-SPECIAL_MASS)).masked_fill(self._uncovered, math.log(SPECIAL_MASS / count))

    @undisturbed
    def _all_log_probs(self, head: str, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        size = self.target_vocab_size
        if input_ids.numel():
            low, high = (int(value) for value in torch.aminmax(input_ids))
            if low < 0 or high >= size:
                raise VocabularyMismatchError(
                    f"Token id {low if low < 0 else high} is outside the vocabulary of {size} ids (tokenizer "
                    f"{self.vocabulary.name!r}). Is the calibrator bound to another tokenizer than the model's?"
                )
        said = self.sequence(input_ids, attention_mask)
        batch, length = input_ids.shape
        result = torch.empty(batch, length, size, dtype=torch.float32, device=self.device)
        step = max(1, _SEQUENCE_CHUNK // max(1, batch * size))
        for start in range(0, length, step):
            result[:, start : start + step] = self.normalise(said.positions(start, start + step).log_scores(head))
        return result


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
