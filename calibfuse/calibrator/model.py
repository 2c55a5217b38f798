"""The network of a calibrator: a small language model without a vocabulary of its own.

Composer (bytes -> token vectors), body (transformer) and heads; x is the body's last state:
score(token | prefix) = <W_head norm(x + adapter_head(x)), h(token)> + bias_head(token), of "value" its log sigmoid.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibfuse.calibrator.body import Body
from calibfuse.calibrator.composer import Composer
from calibfuse.errors import InputError
from calibfuse.guide import CALIBRATOR_HEAD, OF_VALUE_HEAD, REFERENCE_HEAD, VALUE_HEAD

__all__ = ["CALIBRATOR_HEAD", "REFERENCE_HEAD", "VALUE_HEAD", "CalibratorConfig", "CalibratorNetwork", "Head"]

FORMAT_VERSION = 1  # of the weights and of what is composed of them
_WORD = re.compile("[a-z]+")
_Network = TypeVar("_Network", bound="CalibratorNetwork")


@dataclass(frozen=True, kw_only=True)
class CalibratorConfig:
    """Shape of a calibrator, and what travels with it."""

    bucket_count: int = 32_768  # rows of the hashed feature table
    token_width: int = 128  # of a token's composed vector
    composer_hidden_width: int = 256  # of the composer's MLP
    max_token_norm: float = 20.0  # longest that a token's composed vector can be
    width: int = 192  # of the body
    layer_count: int = 3  # blocks of the body
    head_count: int = 4  # attention heads
    hidden_width: int = 768  # of the body's MLPs
    window: int = 128  # tokens that attention looks back, the current one included
    value_layer_count: int = 0  # further blocks, which the head "value" alone reads, beside the body's state
    adapter_width: int = 192  # hidden width of each head's adapter
    value_adapter_width: int | None = None  # that of the head "value"; None: adapter_width
    heads: tuple[str, ...] = (CALIBRATOR_HEAD, REFERENCE_HEAD)  # in the order of the bias columns
    # Word -> bias in nats, below 0 for rude words, above 0 for protected names; see word_bias.py.
    words: Mapping[str, float] = field(default_factory=dict)
    fusion: Mapping[str, Any] = field(default_factory=dict)  # recommended options (keys of FusionConfig)
    training: Mapping[str, Any] = field(default_factory=dict)  # what is known of it, for the model card; JSON values

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "int" and (type(value) is not int or value < (item.name != "value_layer_count")):
                raise InputError(f"CalibratorConfig.{item.name} must be a positive integer, got {value!r}.")
        for word, shift in self.words.items():
            is_number = isinstance(shift, int | float) and not isinstance(shift, bool)
            if not _WORD.fullmatch(word) or not is_number or not math.isfinite(shift) or not shift:
                raise InputError(
                    "CalibratorConfig.words must give lower-case words of a to z and finite numbers other than 0, got "
                    f"{word!r}: {shift!r}."
                )
        limit = self.max_token_norm
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            raise InputError(f"CalibratorConfig.max_token_norm must be a positive number, got {limit!r}.")
        object.__setattr__(self, "max_token_norm", float(limit))
        object.__setattr__(self, "heads", tuple(self.heads))
        if not self.heads or len(set(self.heads)) != len(self.heads):
            raise InputError(f"CalibratorConfig.heads must be distinct names and at least one, got {self.heads!r}.")
        if self.width % (2 * self.head_count):
            raise InputError(
                f"CalibratorConfig.width ({self.width}) must be a multiple of twice head_count ({self.head_count}), "
                "because rotary positions turn pairs of channels."
            )

    @property
    def value_layers(self) -> range:
        """Numbers of the blocks that the head "value" alone reads."""
        return range(self.layer_count, self.layer_count + self.value_layer_count)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary; without the keys of value layers where there are none, as older files have it."""
        values = {**asdict(self), "heads": list(self.heads)}
        return {key: value for key, value in values.items() if value or not key.startswith("value_")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CalibratorConfig:
        """Inverse of `to_dict`; an InputError for unknown keys and values out of range."""
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(
                f"Unknown keys in the calibrator's config: {', '.join(unknown)}; known are {sorted(known)}."
            )
        return cls(**values)


class Head(nn.Module):
    """Body state -> query that is compared with every token's vector; of a wider state, its first `width` are read."""

    def __init__(self, width: int, adapter_width: int, token_width: int) -> None:
        super().__init__()
        self.width = width
        self.adapter_norm = nn.RMSNorm(width, eps=1e-6)
        self.adapter_up = nn.Linear(width, adapter_width)
        self.adapter_down = nn.Linear(adapter_width, width)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, token_width)
        nn.init.zeros_(self.adapter_down.weight)
        nn.init.zeros_(self.adapter_down.bias)
        nn.init.normal_(self.query.weight, std=0.05)
        nn.init.zeros_(self.query.bias)

    def state(self, states: Tensor) -> Tensor:
        """The head's own last hidden state, [..., width]: adapted and normalised, before the query."""
        states = states[..., : self.width]
        hidden = functional.gelu(self.adapter_up(self.adapter_norm(states)), approximate="tanh")
        normed: Tensor = self.norm(states + self.adapter_down(hidden))
        return normed

    def forward(self, states: Tensor) -> Tensor:
        """[..., width] -> [..., token_width]."""
        query: Tensor = self.query(self.state(states))
        return query


class CalibratorNetwork(nn.Module):
    """The universal calibrator as a network, freshly initialised; `Calibrator` adds binding and files."""

    def __init__(self, config: CalibratorConfig) -> None:
        super().__init__()
        self.config = config
        self.composer = Composer(
            bucket_count=config.bucket_count,
            token_width=config.token_width,
            hidden_width=config.composer_hidden_width,
            head_count=len(config.heads),
            max_norm=config.max_token_norm,
        )
        self.token_in = nn.Linear(config.token_width, config.width, bias=False)
        nn.init.normal_(self.token_in.weight, std=0.1)
        self.boundary = nn.Parameter(torch.randn(config.width) * 0.05)
        sizes = ("width", "layer_count", "head_count", "hidden_width", "window", "value_layer_count")
        self.body = Body(**{name: getattr(config, name) for name in sizes})
        self.heads = nn.ModuleDict({name: self._head(name) for name in config.heads})

    def _head(self, name: str) -> Head:
        config = self.config
        if name != VALUE_HEAD:
            return Head(config.width, config.adapter_width, config.token_width)
        return Head(self.body.state_width, config.value_adapter_width or config.adapter_width, config.token_width)

    def with_value_head(
        self: _Network, seed: int, *, layer_count: int = 0, adapter_width: int | None = None
    ) -> _Network:
        """A copy with a fresh head "value" in place of any former one; its query starts at zero, so R is one half.

        `layer_count`: blocks of its own, behind the body's; `adapter_width`: None: that of the others.
        """
        heads = (*(name for name in self.config.heads if name != VALUE_HEAD), VALUE_HEAD)
        device, dtype = self.boundary.device, self.boundary.dtype
        shape = replace(
            self.config,
            heads=heads,
            value_layer_count=layer_count,
            value_adapter_width=adapter_width,
            # what was recommended for a former head says nothing of the new one
            fusion={key: each for key, each in self.config.fusion.items() if key not in OF_VALUE_HEAD},
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            copied = type(self)(shape).to(device, dtype)
        own = (f"heads.{VALUE_HEAD}.", *(f"body.blocks.{index}." for index in self.config.value_layers))
        weights = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(own)}
        columns = [self.config.token_width + self.config.heads.index(name) for name in heads[:-1]]
        table = weights.pop("composer.table")
        fresh = copied.state_dict()
        fresh.update(weights)
        vectors = table[:, : self.config.token_width]
        fresh["composer.table"] = torch.cat([vectors, table[:, columns], torch.zeros_like(table[:, :1])], dim=1)
        copied.load_state_dict(fresh)
        nn.init.zeros_(copied.heads[VALUE_HEAD].query.weight)  # type: ignore[union-attr, arg-type]
        return copied

    def with_words(self: _Network, words: Mapping[str, float]) -> _Network:
        """A calibrator that shares these weights, with further words (a to z) and biases, nats; 0 takes it out."""
        merged = {word: bias for word, bias in {**self.config.words, **words}.items() if bias}
        changed = copy.copy(self)
        changed.config = replace(self.config, words=merged)
        return changed

    def embed(self, token_vectors: Tensor, is_boundary: Tensor) -> Tensor:
        """Input of the body, [rows, slots, width]; `is_boundary` is True for special tokens, which have no bytes."""
        inputs = self.token_in(token_vectors)
        return torch.where(is_boundary[..., None], self.boundary.to(inputs.dtype), inputs)

    def lay_out_for_decoding(self) -> None:
        """Store matrices by input channel, the order in which a CPU streams them a fifth faster (docs/results.md)."""
        for part in (self.token_in, self.body, self.heads):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data = module.weight.data.t().contiguous().t()

    @property
    def fingerprint(self) -> str:
        # Of the config, what determines the numbers; recommendations and metadata do not.
        shape = {key: value for key, value in self.config.to_dict().items() if key not in ("fusion", "training")}
        digest = hashlib.sha256(repr(sorted(shape.items())).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()
