"""The auxiliary model: R(x_<=i, y) for every next token y of a target's vocabulary in one forward (NADO, DiNADO).

R(x_<=i) = E_p[C | x_<=i] (Meng et al. 2022, arXiv 2205.14219). Two kinds:

* "language-model": a small LM on the target's own ids (calibrator/value_lm.py). By default its backbone is a copy of
  the target's own where that is small, else a fresh one; it learns as a whole.
* "calibrator": the head "value" of a universal calibrator. Body and composer stay as they are, so the other heads
  do too, and the result is a calibrator that binds to any vocabulary. It knows no tokens without bytes: these get
  R of the prefix, that is, they are neutral.

Left out: the training (auxiliary_training.py) and where the samples come from.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from calibfuse import hub
from calibfuse.calibrator import Calibrator, load_universal
from calibfuse.calibrator.binding import BoundCalibrator, compose_vocabulary
from calibfuse.calibrator.composer import token_features
from calibfuse.calibrator.model import Head
from calibfuse.errors import CheckpointError, InputError, MissingHeadError, VocabularyError, VocabularyMismatchError
from calibfuse.guide import VALUE_HEAD
from calibfuse.loading import Source
from calibfuse.value.value_lm import PARAMETERISATIONS, ValueLM, ValueNetwork, is_value_lm_checkpoint
from calibfuse.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import TokenizerLike

KINDS = ("calibrator", "language-model")
VOCABULARY_FILE = "value-vocabulary.safetensors"
_SMALL_TARGET = 50_000_000  # parameters up to which the auxiliary LM begins as a copy of the target's backbone
_FRESH_SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
_COMPOSE_DTYPE = torch.float32


class AuxiliaryModel(nn.Module, ABC):
    """log R over a target's vocabulary. Made by `make_auxiliary_model`.

    Attributes:
        kind: one of KINDS.
        target_vocab_size: width of the target's output head.
    """

    kind: str
    target_vocab_size: int

    @property
    @abstractmethod
    def parameterisation(self) -> str:
        """How R is made of scores: "nado" or "dinado"."""

    @abstractmethod
    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read whole texts.

        Args:
            input_ids: int64 [batch, length], the target's ids; padding may be on either side.
            attention_mask: [batch, length], 0 for padding.

        Returns:
            What the two methods below need of them, rows first.
        """

    @abstractmethod
    def of_next(self, states: Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Log R of the tokens that follow in the text, without the work for all others where that can be.

        `positions` is bool [batch, length], False in the last column; gives float32 [number of positions], nats.
        """

    @abstractmethod
    def of_all(self, states: Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Log R of all next tokens at some positions: float32 [number of positions, target_vocab_size], nats."""

    @abstractmethod
    def learns(self, token_ids: Tensor) -> Tensor:
        """Bool, same shape: True where the token has an R of its own."""

    @abstractmethod
    def set_prior(self, satisfaction: float) -> None:
        """Make a fresh model say the same R, in (0, 1), everywhere: where the training starts."""

    @property
    @abstractmethod
    def is_fresh(self) -> bool:
        """Whether it has learned nothing yet: its last matrix is zero."""

    @abstractmethod
    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        fusion: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """Write a checkpoint that `from_pretrained` and `CalibFusion.from_pretrained` read."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log R at all positions.

        Args:
            input_ids: int64 [batch, length], the target's ids; padding may be on either side.
            attention_mask: [batch, length], 0 for padding.

        Returns:
            float32 [batch, length, target_vocab_size], nats, at most 0; entry [b, i, y] is log R(x_<=i, y).
        """
        everywhere = torch.ones_like(input_ids, dtype=torch.bool)
        log_r = self.of_all(self.states(input_ids, attention_mask), input_ids, everywhere)
        return log_r.view(*input_ids.shape, self.target_vocab_size)

    @staticmethod
    def from_pretrained(folder: str | os.PathLike[str]) -> AuxiliaryModel:
        """Load what `save_pretrained` wrote."""
        place = Path(folder)
        if is_value_lm_checkpoint(place):
            return LanguageModelAuxiliary(ValueLM.read(place, Source(name_or_path=place)))
        tensors = hub.read_tensors(place / VOCABULARY_FILE)
        try:
            data, offsets = tensors["data"].numpy(), tensors["offsets"].numpy()
            vocabulary = Vocabulary(
                data=data, offsets=offsets, is_special=np.diff(offsets) == 0, name="the auxiliary model's vocabulary"
            )
            size = int(tensors["target_vocab_size"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"The auxiliary model in {str(place)!r} is not whole: {error}.") from error
        return CalibratorAuxiliary(load_universal(place), vocabulary, size)


class LanguageModelAuxiliary(AuxiliaryModel):
    """A value LM that learns.

    Args:
        value_lm: the network and the vocabulary.
    """

    kind = "language-model"

    def __init__(self, value_lm: ValueLM) -> None:
        super().__init__()
        self.value_lm = value_lm
        self.network = value_lm.network
        self.target_vocab_size = value_lm.network.target_vocab_size
        self._reader = value_lm.lock_step()

    @property
    def parameterisation(self) -> str:
        """See `AuxiliaryModel.parameterisation`."""
        return self.network.parameterisation

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """See `AuxiliaryModel.states`. The same layout of slots as LockStepLM's, at once and with gradients."""
        reader = self._follow(input_ids.device)
        limit, length = reader.max_length, input_ids.shape[1]
        if limit is not None and length + 1 > limit:
            raise InputError(
                f"The auxiliary model reads {limit - 1} tokens, but the longest sample has {length}; draw shorter ones."
            )
        known = input_ids.clamp(0, len(reader.vocabulary))
        special = reader._is_special[known] | (input_ids < 0)
        if attention_mask is not None:
            special = special | (attention_mask == 0)
        starts = special.long().cumprod(dim=1).sum(dim=1)
        ids = known.masked_fill(known >= reader._readable, reader.start_id)
        ids = functional.pad(ids, (1, 0), value=reader.start_id)
        slots = torch.arange(length + 1, device=ids.device)
        ids = torch.where(slots == starts[:, None], reader.start_id, ids)
        visible = (slots >= starts[:, None]).long()
        states = self.network.states(ids, visible, (slots - starts[:, None]).clamp(min=0))
        # Where all is special so far, what the start token says holds.
        places = torch.maximum(slots[1:], starts[:, None])
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))

    def of_next(self, states: Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
        """See `AuxiliaryModel.of_next`."""
        chosen = input_ids.roll(-1, dims=1)[positions]
        log_r: Tensor = self.network.log_r_of(states[positions], chosen)
        return log_r

    def of_all(self, states: Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
        """See `AuxiliaryModel.of_all`."""
        log_r: Tensor = self.network.log_r(states[positions])
        return log_r

    def learns(self, token_ids: Tensor) -> Tensor:
        """See `AuxiliaryModel.learns`."""
        covered: Tensor = self._follow(token_ids.device).covers(token_ids)
        return covered

    @property
    def is_fresh(self) -> bool:
        """See `AuxiliaryModel.is_fresh`."""
        return not bool(self.network.head.weight.any())

    def set_prior(self, satisfaction: float) -> None:
        """See `AuxiliaryModel.set_prior`."""
        with torch.no_grad():
            self.network.head.bias[-1] = _logit(satisfaction)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        fusion: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """See `AuxiliaryModel.save_pretrained`."""
        lm = self.value_lm
        saved = ValueLM(
            self.network,
            lm.vocabulary,
            start_id=lm.start_id,
            end_ids=lm.end_ids,
            fusion=lm.config.fusion if fusion is None else fusion,
            training=lm.config.training if training is None else training,
            name=lm.name,
        )
        return saved.save_pretrained(folder, dtype=dtype)

    def _follow(self, device: torch.device) -> Any:  # noqa: ANN401
        """The reader, with its tables on the device."""
        if self._reader.device != device:
            self._reader = self.value_lm.lock_step()
        return self._reader


class CalibratorAuxiliary(AuxiliaryModel):
    """The value head of a universal calibrator, which learns; all else is frozen.

    Args:
        calibrator: with a head "value".
        vocabulary: of the target.
        target_vocab_size: width of the target's output head, at least the size of the vocabulary.
    """

    kind = "calibrator"

    def __init__(self, calibrator: Calibrator, vocabulary: Vocabulary, target_vocab_size: int) -> None:
        super().__init__()
        if VALUE_HEAD not in calibrator.config.heads:
            raise MissingHeadError(
                f"An auxiliary model of kind 'calibrator' needs the head {VALUE_HEAD!r}, but the calibrator has only "
                f"{', '.join(map(repr, calibrator.config.heads))}."
            )
        self.calibrator = calibrator.float().requires_grad_(False)
        self.vocabulary = vocabulary
        self.target_vocab_size = target_vocab_size
        self.head = cast(Head, calibrator.heads[VALUE_HEAD]).requires_grad_(True)
        config = calibrator.config
        self._column = config.token_width + config.heads.index(VALUE_HEAD)
        # The table is one parameter of all heads; its column of this head learns on its own, and is put back on saving.
        self.bias_table = nn.Parameter(calibrator.composer.table[:, self._column].detach().clone())
        vectors, biases = compose_vocabulary(calibrator, vocabulary, _COMPOSE_DTYPE)
        features = token_features(vocabulary.data, vocabulary.offsets, config.bucket_count)
        special = torch.ones(len(vocabulary) + 1, dtype=torch.bool)
        special[:-1] = torch.from_numpy(vocabulary.is_special.copy())
        for name, tensor in (
            ("vectors", vectors),
            ("biases", biases),
            ("special", special),
            ("feature_buckets", torch.from_numpy(features.buckets)),
            ("feature_weights", torch.from_numpy(features.weights)),
            ("feature_offsets", torch.from_numpy(features.offsets[:-1]).int()),
        ):
            self.register_buffer(name, tensor, persistent=False)
        self.to(calibrator.boundary.device)

    vectors: Tensor
    biases: Tensor
    special: Tensor
    feature_buckets: Tensor
    feature_weights: Tensor
    feature_offsets: Tensor

    @property
    def parameterisation(self) -> str:
        """See `AuxiliaryModel.parameterisation`."""
        return "nado"

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """See `AuxiliaryModel.states`: queries. The body is frozen, so only the head has gradients."""
        bound = BoundCalibrator(self.calibrator, self.vocabulary, self.vectors, self.biases)
        bound._is_special = self.special
        masked = None if attention_mask is None else attention_mask == 0
        # (batch, length + 1, token_width): slot 0 speaks of the first token
        queries: Tensor = self.head(bound.states(input_ids, masked))
        return queries

    def of_next(self, states: Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
        """See `AuxiliaryModel.of_next`."""
        return self._prefix_log_r(input_ids, states, self._token_biases()).roll(-1, dims=1)[positions]

    def of_all(self, states: Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
        """See `AuxiliaryModel.of_all`."""
        biases = self._token_biases()
        log_r = functional.logsigmoid((states[:, 1:][positions] @ self.vectors.T + biases).float())
        # Tokens without bytes are neutral: R of them is R of the prefix.
        prefix = self._prefix_log_r(input_ids, states, biases)[positions]
        size = len(self.vocabulary)
        log_r = torch.where(self.special[:size], prefix[:, None], log_r)
        wider = self.target_vocab_size - size
        return torch.cat([log_r, prefix[:, None].expand(-1, wider)], dim=1) if wider > 0 else log_r

    def _prefix_log_r(self, input_ids: Tensor, queries: Tensor, biases: Tensor) -> Tensor:
        """Log R of each prefix x_<=i, float32 [batch, length]: what was said of its latest token with bytes.

        Before the first such token it is the mean over the vocabulary.
        """
        size = len(self.vocabulary)
        said_of = ~self.special[input_ids.clamp(0, size)]
        known = input_ids.clamp(0, size - 1)
        own = (queries[:, :-1] * functional.embedding(known, self.vectors)).sum(dim=-1) + biases[known]
        text = ~self.special[:size]
        average = queries[:, 1:] @ self.vectors[text].mean(dim=0) + biases[text].mean()
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        latest = torch.where(said_of, places, -1).cummax(dim=1).values
        scores = torch.where(latest >= 0, own.gather(1, latest.clamp(min=0)), average)
        return functional.logsigmoid(scores.float())

    def _token_biases(self) -> Tensor:
        """Of the head "value" for every token of the vocabulary, [len(vocabulary)]."""
        sums = functional.embedding_bag(
            self.feature_buckets,
            self.bias_table[:, None],
            self.feature_offsets,
            mode="sum",
            per_sample_weights=self.feature_weights,
        )
        return sums[:, 0]

    def learns(self, token_ids: Tensor) -> Tensor:
        """See `AuxiliaryModel.learns`."""
        return ~self.special[token_ids.clamp(0, len(self.vocabulary))]

    @property
    def is_fresh(self) -> bool:
        """See `AuxiliaryModel.is_fresh`."""
        return not bool(self.head.query.weight.any())

    def set_prior(self, satisfaction: float) -> None:
        """See `AuxiliaryModel.set_prior`; met on average over the vocabulary, as closely as a linear map can."""
        text = ~self.special[: len(self.vocabulary)]
        vectors = self.vectors[text].double()
        gram = vectors.T @ vectors
        ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        direction = torch.linalg.solve(gram + ridge, vectors.sum(dim=0))  # <direction, vector> is about 1
        with torch.no_grad():
            self.head.query.bias.copy_(_logit(satisfaction) * direction)

    def trained_calibrator(self) -> Calibrator:
        """The calibrator, with what has been learned in its table."""
        with torch.no_grad():
            self.calibrator.composer.table[:, self._column] = self.bias_table
        return self.calibrator

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        fusion: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """See `AuxiliaryModel.save_pretrained`; an ordinary calibrator, with the target's vocabulary beside it."""
        from dataclasses import replace

        calibrator = self.trained_calibrator()
        config = calibrator.config
        calibrator.config = replace(
            config,
            fusion={"mode": VALUE_HEAD} if fusion is None else dict(fusion),
            training=config.training if training is None else dict(training),
        )
        tensors = {
            "data": torch.from_numpy(self.vocabulary.data.copy()),
            "offsets": torch.from_numpy(self.vocabulary.offsets.copy()),
            "target_vocab_size": torch.tensor(self.target_vocab_size),
        }
        hub.write_tensors(Path(folder) / VOCABULARY_FILE, tensors)
        return calibrator.save_pretrained(folder, dtype=dtype)


def make_auxiliary_model(
    target: PreTrainedModel,
    tokenizer: TokenizerLike,
    *,
    kind: str = "language-model",
    parameterisation: str = "nado",
    seed: int,
    calibrator: Calibrator | None = None,
    backbone: PreTrainedModel | None = None,
) -> AuxiliaryModel:
    """A fresh auxiliary model for a target.

    Args:
        target: whose R it is to learn.
        tokenizer: the target's.
        kind: "language-model" or "calibrator".
        parameterisation: "nado", or of a language model "dinado".
        seed: of fresh weights.
        calibrator: of kind "calibrator": gets the value head; None: the bundled one. It is copied.
        backbone: of kind "language-model": a causal LM on the target's ids that gives its layers; None: the target
            itself where it has at most 50 million parameters, else a fresh model of 4 layers x 256. It is copied.

    Returns:
        The model in float32, on the target's device, in training mode.

    Raises:
        InputError: an unknown kind or parameterisation, or options that do not go together.
        VocabularyError: no usable tokenizer, or one without a special token to put before a text.
        VocabularyMismatchError: the tokenizer has more tokens than the target has scores.
    """
    if kind not in KINDS:
        raise InputError(f"The kind of an auxiliary model must be one of {', '.join(KINDS)}, got {kind!r}.")
    if parameterisation not in PARAMETERISATIONS:
        raise InputError(
            f"The parameterisation must be one of {', '.join(PARAMETERISATIONS)}, got {parameterisation!r}."
        )
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    size = head_width(target)
    if len(vocabulary) - _special_tail(vocabulary) > size:
        raise VocabularyMismatchError(
            f"The tokenizer {vocabulary.name} has {len(vocabulary)} ids, but the target scores only {size}; do they "
            "belong together?"
        )
    made: AuxiliaryModel
    if kind == "calibrator":
        if parameterisation != "nado":
            raise InputError(
                "The parameterisation 'dinado' needs a score of the prefix, which the kind 'calibrator' does not have; "
                "use the kind 'language-model'."
            )
        if backbone is not None:
            raise InputError("A backbone is for the kind 'language-model'; the kind 'calibrator' has its own body.")
        source = calibrator or load_universal()
        if not isinstance(source, Calibrator):
            raise InputError(
                f"The kind 'calibrator' needs a universal calibrator, got a {type(source).__name__}, which has no "
                "place for a value head."
            )
        made = CalibratorAuxiliary(source.with_value_head(seed), vocabulary, max(size, len(vocabulary)))
    else:
        if calibrator is not None:
            raise InputError("A calibrator is for the kind 'calibrator', not for the kind 'language-model'.")
        network = ValueNetwork(_backbone(target, backbone, size, seed), size, parameterisation)
        start_id = _start_id(target, tokenizer, vocabulary, network)
        ends = tuple(sorted(each for each in _end_ids(target, tokenizer) if each < size))
        made = LanguageModelAuxiliary(ValueLM(network, vocabulary, start_id=start_id, end_ids=ends))
    return made.to(target.device).train()


def head_width(target: PreTrainedModel) -> int:
    """Number of scores that a causal LM gives for the next token."""
    head = target.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if weight is not None else int(target.config.get_text_config().vocab_size)


def _backbone(target: PreTrainedModel, given: PreTrainedModel | None, size: int, seed: int) -> PreTrainedModel:
    from transformers import AutoModel, LlamaConfig, LlamaModel

    source = given
    if source is None and sum(parameter.numel() for parameter in target.parameters()) <= _SMALL_TARGET:
        source = target
    if source is not None:
        layers: Any = source.base_model
        rebuilt = type(AutoModel.from_config(copy.deepcopy(layers.config)))  # type: ignore[no-untyped-call]
        if rebuilt is type(layers):
            return copy.deepcopy(layers).float().requires_grad_(True)  # type: ignore[no-any-return]
        if given is not None:
            raise InputError(
                f"The backbone must be a decoder that transformers can make from its configuration, but a "
                f"{type(layers).__name__} is not."
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        positions = getattr(target.config.get_text_config(), "max_position_embeddings", None) or 2048
        shape: dict[str, Any] = {**_FRESH_SHAPE, "max_position_embeddings": positions}
        return LlamaModel(LlamaConfig(vocab_size=size, **shape))


def _start_id(target: PreTrainedModel, tokenizer: Any, vocabulary: Vocabulary, network: ValueNetwork) -> int:  # noqa: ANN401
    """A special id with an embedding that can stand before every text."""
    size = min(network.target_vocab_size, int(network.get_input_embeddings().num_embeddings))  # type: ignore[arg-type]
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for holder in (tokenizer, target.config):
            found = getattr(holder, role, None)
            found = found[0] if isinstance(found, list) and found else found
            if (
                isinstance(found, int)
                and 0 <= found < size
                and (found >= len(vocabulary) or vocabulary.is_special[found])
            ):
                return found
    raise VocabularyError(
        f"The tokenizer {vocabulary.name} has neither a begin nor an end mark to put before a text; set bos_token, or "
        "use the kind 'calibrator', which needs none."
    )


def _end_ids(target: PreTrainedModel, tokenizer: Any) -> set[int]:  # noqa: ANN401
    ends = getattr(getattr(target, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = getattr(tokenizer, "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _special_tail(vocabulary: Vocabulary) -> int:
    """Number of special ids at the end, which a model may lack (added marks)."""
    texts = np.flatnonzero(~vocabulary.is_special)
    return len(vocabulary) - 1 - int(texts[-1])


def _logit(probability: float) -> float:
    clipped = min(max(probability, 1e-3), 1 - 1e-3)
    return float(torch.logit(torch.tensor(clipped)))
