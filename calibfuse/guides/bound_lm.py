"""A causal LM over one target vocabulary, and its session: what lock-step and projection share."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from calibfuse.guide import Guide, GuideSession, NextTokenScores, Request, isolated
from calibfuse.guides.kv_cache import RaggedReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import Vocabulary


class BoundCausalLM(Guide):
    """A guide: a causal LM over one target vocabulary. Made by `CausalLMCalibrator.bind`.

    `models`: by head, all of one vocabulary; `start_id`: own token before every text.
    """

    missing_head_hint: ClassVar[str] = "; load it with reference= (a model of the same vocabulary)"
    lock_step: ClassVar[bool]
    """Whether the LM reads the target's ids themselves; else its distribution is projected."""

    def __init__(
        self, calibrator: Any, models: Mapping[str, PreTrainedModel], target: Vocabulary, *, start_id: int  # noqa: ANN401
    ) -> None:  # fmt: skip
        self.calibrator = calibrator
        self.models = dict(models)
        self.vocabulary = target
        self.start_id = start_id
        lengths = [getattr(model.config, "max_position_embeddings", None) for model in self.models.values()]
        self.max_length = min((each for each in lengths if isinstance(each, int) and each > 0), default=None)
        self.make_tables()

    @abstractmethod
    def make_tables(self) -> None:
        """Make what lies on the models' device beside them."""

    @abstractmethod
    def prefix(self, known: tuple[Sequence[int], Any] | None, ids: list[int]) -> Any:  # noqa: ANN401
        """A text as the models read it; `known` is a former text of the same key with its prefix."""

    @abstractmethod
    def read(self, reader: RaggedReader, keys: Sequence[Hashable], prefixes: Sequence[Any]) -> LMLogits:
        """Read what is new of some texts."""

    def left_out(self, length: int) -> int:
        """How many tokens at the beginning of a text are not read; in large strides, so that the cache is of use."""
        if self.max_length is None or length <= self.max_length:
            return 0
        stride = max(1, self.max_length // 2)
        return -(-(length - self.max_length) // stride) * stride

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(self.models)

    @property
    def recommended(self) -> Mapping[str, Any]:
        options: Mapping[str, Any] = self.calibrator.config.fusion
        return options

    @property
    def device(self) -> torch.device:
        return next(iter(self.models.values())).device

    def to(self, device: torch.device | str) -> BoundCausalLM:
        """The same object where it is there already, else a copy on the device, with its own copy of the models."""
        if torch.device(device) == self.device:
            return self
        moved = copy.copy(self)
        moved.__dict__.pop("_uncovered", None)  # cached on the former device
        moved.models = {head: moved_model(model, None, device) for head, model in self.models.items()}
        moved.make_tables()
        return moved

    def session(self) -> LMSession:
        return LMSession(self)


class LMSession(GuideSession):
    """`GuideSession` of a causal LM."""

    def __init__(self, guide: BoundCausalLM) -> None:
        self.guide = guide
        self.reset()

    def reset(self) -> None:
        self._reader: RaggedReader | None = None
        self._known: dict[Hashable, tuple[list[int], Any]] = {}
        self._last: tuple[list[Hashable], NextTokenScores] | None = None

    def drop(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            self._known.pop(key, None)
        if not self._known:
            self.reset()

    def copy(self, pairs: Mapping[Hashable, Hashable]) -> None:
        self._known.update({new: self._known[old] for new, old in pairs.items() if old in self._known})
        if self._reader is not None:
            self._reader.copy(pairs)

    @isolated
    def step(self, requests: Sequence[Request]) -> NextTokenScores:
        texts = {request[0]: list(request[1]) for request in requests}
        keys = list(texts)
        if self._last is not None and self._last[0] == keys:
            if all(key in self._known and self._known[key][0] == ids for key, ids in texts.items()):
                return self._last[1]
        reader, known = self._reader or RaggedReader(self.guide.models), self._known
        self.reset()  # what breaks off leaves the session empty
        prefixes = {key: self.guide.prefix(known.get(key), ids) for key, ids in texts.items()}
        said = self.guide.read(reader, keys, list(prefixes.values()))
        self._known = {key: (ids, prefixes[key]) for key, ids in texts.items()}
        self._reader, self._last = reader, (keys, said)
        return said


class LMLogits(NextTokenScores):
    """`NextTokenScores` of a causal LM: float32 [..., width of the head] by head."""

    def __init__(self, logits: Mapping[str, Tensor], target_vocab_size: int) -> None:
        self._logits = logits
        self._size = target_vocab_size

    def positions(self, start: int, stop: int) -> LMLogits:
        return LMLogits({name: each[:, start:stop] for name, each in self._logits.items()}, self._size)

    def log_scores(self, head: str, token_ids: Tensor | None = None) -> Tensor:
        logits = self._logits[head]
        if token_ids is not None:
            return logits.gather(-1, token_ids.clamp(0, min(self._size, logits.shape[-1]) - 1))
        missing = self._size - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, missing)) if missing > 0 else logits[..., : self._size]


def moved_model(
    model: PreTrainedModel, dtype: torch.dtype | None, device: torch.device | str | None
) -> PreTrainedModel:
    """The model itself where it is so already, else a copy."""
    dtype, device = dtype or model.dtype, torch.device(device) if device is not None else model.device
    if dtype == model.dtype and device == model.device:
        return model
    moved: Any = copy.deepcopy(model)
    result: PreTrainedModel = moved.to(device=device, dtype=dtype)
    return result


def embeddings_of(model: PreTrainedModel) -> int:
    """How many tokens a model has an embedding of."""
    table: Any = model.get_input_embeddings()
    return int(table.num_embeddings)
