"""Any transformers causal LM as calibrator, with or without a twin as reference.

A target with the same vocabulary is followed in lock-step (lock_step_lm.py); for any other one the LM reads the text in
its own tokens and its distribution is carried over by bytes (projection.py). The twin, a second checkpoint of the same
vocabulary, is the head "reference"; without one there is only the head "calibrator", for modes geometric and blend.

Only safetensors weights are loaded, and no code of a checkpoint is run. Left out: encoder-decoder models, models
without
a key/value cache, and saving (transformers does that).
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from calibfuse import hub
from calibfuse.calibrator.cached_lm import check_followable
from calibfuse.calibrator.lock_step_lm import LMLogits, LockStepLM, LockStepLMSession
from calibfuse.calibrator.own_text import OwnText
from calibfuse.calibrator.projected_lm import ProjectedLM, ProjectedSequence, ProjectedSession
from calibfuse.errors import CheckpointError, InputError, MissingHeadError, VocabularyError, VocabularyMismatchError
from calibfuse.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import TokenizerLike

HEADS = ("calibrator", "reference")
SPECIAL_MASS = 1e-4
DEFAULT_FURTHER = 8
# Tokenizers of transformers checkpoints may be kept in files that calibfuse's own checkpoints do not have.
_ALLOWED_FILES = (*hub.ALLOWED_FILES, "*.model", "merges.txt", "vocab.txt", "*.tiktoken", "*.jinja")
_SEQUENCE_CHUNK = 4_000_000  # elements of a [positions, vocabulary] block in log_probs


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """Facts of a causal LM as calibrator, named as in CalibratorConfig.

    Attributes:
        heads: names of the heads.
        fusion: recommended fusion options.
        training: facts of the training; what the checkpoint is.
    """

    heads: tuple[str, ...]
    fusion: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


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
                    f"be a "
                    "decoder-only causal language model."
                )
        if reference is not None and (
            reference.get_input_embeddings().num_embeddings != model.get_input_embeddings().num_embeddings
        ):
            raise InputError(
                f"The reference has {reference.get_input_embeddings().num_embeddings} token embeddings, the calibrator "
                f"{name} {model.get_input_embeddings().num_embeddings}; a reference must be a twin with the same "
                f"vocabulary."
            )
        self.tokenizer = tokenizer
        fusion = {} if reference is not None else {"mode": "geometric"}  # contrast needs the reference
        self.config = CausalLMConfig(
            heads=tuple(self.models), fusion=fusion, training={"model_type": model.config.model_type, "name": name}
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
            reference: the same of its twin (for instance the model before it was tuned on clean text).
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
        folder = hub.resolve_checkpoint(name_or_path, revision=revision, allow_patterns=_ALLOWED_FILES, **places)
        model = _load_model(folder, dtype)
        tokenizer = _load_tokenizer(folder)
        twin = None
        if reference is not None:
            other = hub.resolve_checkpoint(reference, allow_patterns=_ALLOWED_FILES, **places)
            twin = _load_model(other, dtype)
            other_tokenizer = _load_tokenizer(other)
            if tokenizer is not None and other_tokenizer is not None:
                mine, its = (Vocabulary.from_tokenizer(each) for each in (tokenizer, other_tokenizer))
                if not same_ids(mine, its):
                    raise InputError(
                        f"The reference {str(reference)!r} has another vocabulary ({len(its)} ids) than the calibrator "
                        f"{str(name_or_path)!r} ({len(mine)} ids); a reference must be a twin."
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
                f"stand for "
                f"and whether they are those of {target.name}; save its tokenizer in the same folder."
            )
        own = Vocabulary.from_tokenizer(self.tokenizer)
        models = self.models
        if dtype is not None or device is not None:
            models = {head: _moved(model, dtype, device) for head, model in models.items()}
        start_id = self._start_id(own)
        max_length = _max_length(models)
        lock_step = same_ids(own, target)
        side_by_side = [check_followable(model, self.name, holes=not lock_step) for model in models.values()]
        if lock_step:
            return BoundCausalLM(LockStepLM(models, target, start_id=start_id, max_length=max_length), self, own)
        text = OwnText(self.tokenizer, own, start_id)
        guide = ProjectedLM(models, text, target, further=further if all(side_by_side) else 0, max_length=max_length)
        return BoundCausalLM(guide, self, own)

    def _start_id(self, own: Vocabulary) -> int:
        """What stands before every text: the own begin mark, else the end mark."""
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
            f"bos_token in its "
            "tokenizer."
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

    def to(self, device: torch.device | str) -> BoundCausalLM:
        """The same object where it is there already, else a copy on the device, with its own copy of the models."""
        device = torch.device(device)
        if device == self.device:
            return self
        models = {head: _moved(model, None, device) for head, model in self._guide.models.items()}
        guide: LockStepLM | ProjectedLM
        if isinstance(self._guide, LockStepLM):
            guide = LockStepLM(
                models, self.vocabulary, start_id=self._guide.start_id, max_length=self._guide.max_length
            )
        else:
            guide = ProjectedLM(
                models,
                self._guide.own_text,
                self.vocabulary,
                further=self._guide.further,
                max_length=self._guide.max_length,
            )
        return BoundCausalLM(guide, self.calibrator, self.own_vocabulary)

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

    @torch.no_grad()
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

    @torch.no_grad()
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
        result = torch.empty(batch, length, size, device=self.device)
        step = max(1, _SEQUENCE_CHUNK // max(1, batch * size))
        for start in range(0, length, step):
            result[:, start : start + step] = self.normalise(said.positions(start, start + step).log_scores(head))
        return result


def is_transformers_checkpoint(folder: Path) -> bool:
    """Whether the folder's config.json is one of transformers: a model type, and no format of ours."""
    path = folder / hub.CONFIG_NAME
    if not path.is_file():
        return False
    config = hub.read_json(path, "configuration of a calibrator")
    return "model_type" in config and "format" not in config


def same_ids(one: Vocabulary, other: Vocabulary) -> bool:
    """Whether every id that has text in either stands for the same bytes in both."""
    shared = min(len(one), len(other))
    longer = one if len(one) > shared else other
    return (
        bool(longer.is_special[shared:].all())
        and np.array_equal(one.offsets[: shared + 1], other.offsets[: shared + 1])
        and np.array_equal(one.data[: one.offsets[shared]], other.data[: other.offsets[shared]])
    )


def _load_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not is_transformers_checkpoint(folder):
        raise CheckpointError(
            f"Expected a checkpoint of transformers in {str(folder)!r}: a config.json with a 'model_type'."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, for unknown architectures among others
        raise CheckpointError(f"The model in {str(folder)!r} cannot be loaded: {_sentence(error)}") from error
    if config.is_encoder_decoder:
        raise InputError(
            f"The model {config.model_type!r} in {str(folder)!r} is an encoder-decoder model; a calibrator must be a "
            "decoder-only causal language model."
        )
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.ckpt") for path in folder.glob(pattern))
        found = f"only {pickled[0]}, a pickle, which can run code and is not loaded" if pickled else "none"
        raise CheckpointError(
            f"Expected weights in the safetensors format in {str(folder)!r}, found {found}; save the model with "
            "save_pretrained."
        )
    try:
        loading: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # as above; damaged weights too
        raise CheckpointError(f"The model in {str(folder)!r} cannot be loaded: {_sentence(error)}") from error
    model, report = loading  # a pair, because of output_loading_info
    # transformers would go on with random numbers in their place.
    wrong = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", ())]))
    if wrong:
        raise CheckpointError(
            f"The weights in {str(folder)!r} are not those of a {config.model_type} language model: {wrong[0]} and "
            f"{len(wrong) - 1} more are missing or of another shape."
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _load_tokenizer(folder: Path) -> Any:  # noqa: ANN401
    """The tokenizer in a checkpoint; None where there is none."""
    from transformers import AutoTokenizer

    kinds = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")
    if not any(any(folder.glob(kind)) for kind in kinds):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise VocabularyError(f"The tokenizer in {str(folder)!r} cannot be loaded: {_sentence(error)}") from error


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


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
