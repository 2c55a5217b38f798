"""A small LM on one target's own ids that says R for every next token in one forward: the guide of mode "value".

    R(x_<=i) = E_p[C | x_<=i]      (Meng et al. 2022, NADO, arXiv 2205.14219)

A backbone of transformers reads the ids; one linear layer gives a score s_y for each next token y and one score z for
the prefix. Two ways to make R of them:

    "nado"     log R(x_<i, y) = log sigmoid(s_y + z)
    "dinado"   log R(x_<i, y) = s_y - max_y' s_y' + log sigmoid(z)      (Lu et al. 2024, arXiv 2306.11825)

The layer starts at zero, so that tokens which no sample had get what the prefix has: they are neutral. In "dinado"
s = log pi - log p up to a constant, with pi the distribution that decoding with strength 1 gives; the maximum bounds R
by beta = sigmoid(z). docs/guides/value-guide.md derives it.

It reads with LockStepLM's sessions. It belongs to one vocabulary; the value head of a universal calibrator binds to
any. Training is in finetune/.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from calibfuse import hub
from calibfuse.errors import CheckpointError, InputError, VocabularyError, VocabularyMismatchError, reason_of
from calibfuse.guides.bound_lm import moved_model
from calibfuse.guides.causal_lm import CausalLMConfig, same_ids
from calibfuse.guides.kv_cache import try_reading
from calibfuse.guides.shared_vocabulary import LockStepLM
from calibfuse.hub.model_card import calibrator_card
from calibfuse.loading import PretrainedCalibrator, Source, as_device, as_dtype
from calibfuse.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.vocabulary import TokenizerLike

FORMAT_NAME = "calibfuse-value-lm"
FORMAT_VERSION = 1
PARAMETERISATIONS = ("nado", "dinado")
HEAD = "value"
_VOCABULARY = ("vocabulary.data", "vocabulary.offsets")


@dataclass(frozen=True)
class ValueOutput:
    """What a forward pass gives; named as transformers names it, so that LockStepLM can read it.

    Attributes:
        logits: float32 [rows, positions, target_vocab_size], log R, nats, at most 0.
    """

    logits: Tensor


class ValueNetwork(nn.Module):
    """Backbone and value layer.

    Args:
        backbone: a decoder of transformers without its output head (`model.base_model`).
        target_vocab_size: next tokens; the width of the target's output head.
        parameterisation: "nado" or "dinado".

    Raises:
        InputError: an unknown parameterisation.
    """

    def __init__(self, backbone: PreTrainedModel, target_vocab_size: int, parameterisation: str) -> None:
        super().__init__()
        if parameterisation not in PARAMETERISATIONS:
            raise InputError(
                f"The parameterisation must be one of {', '.join(PARAMETERISATIONS)}, got {parameterisation!r}."
            )
        self.backbone = backbone
        self.target_vocab_size = target_vocab_size
        self.parameterisation = parameterisation
        width: int = backbone.config.get_text_config().hidden_size
        # the last row scores the prefix
        self.head = nn.Linear(width, target_vocab_size + 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        known = inspect.signature(backbone.forward).parameters
        self._takes_positions = "position_ids" in known

    @property
    def config(self) -> Any:  # noqa: ANN401
        """Of the backbone."""
        return self.backbone.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def get_input_embeddings(self) -> nn.Module:
        """Of the backbone."""
        return self.backbone.get_input_embeddings()

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Any = None,  # noqa: ANN401
        *,
        use_cache: bool = False,
    ) -> Tensor:
        """Last hidden states of the backbone, [rows, length, width]."""
        options: dict[str, Any] = {"position_ids": position_ids} if self._takes_positions else {}
        output = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **options,
        )
        states: Tensor = output.last_hidden_state
        return states

    def log_r(self, states: Tensor) -> Tensor:
        """Log R of all next tokens: [..., width] -> float32 [..., target_vocab_size], at most 0."""
        scores = self.head(states).float()
        tokens, prefix = scores[..., :-1], scores[..., -1:]
        if self.parameterisation == "nado":
            log_r: Tensor = functional.logsigmoid(tokens + prefix)
            return log_r
        log_r = tokens - tokens.amax(dim=-1, keepdim=True) + functional.logsigmoid(prefix)
        return log_r

    def log_r_of(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """Log R of one next token each: [n, width] and int64 [n] -> float32 [n], at most 0."""
        if self.parameterisation != "nado":
            return self.log_r(states).gather(1, token_ids[:, None])[:, 0]  # its maximum runs over all tokens
        rows = functional.embedding(token_ids, self.head.weight) + self.head.weight[-1]
        scores = (states * rows).sum(dim=-1) + self.head.bias[token_ids] + self.head.bias[-1]
        return functional.logsigmoid(scores.float())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,  # noqa: ANN401
        use_cache: bool = False,
        return_dict: bool = True,
        logits_to_keep: int = 0,
    ) -> ValueOutput:
        """What CachedLM calls; arguments as transformers' causal LMs take them."""
        states = self.states(input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache)
        return ValueOutput(self.log_r(states[:, -logits_to_keep:]))


class ValueLM(PretrainedCalibrator):
    """A value LM with the vocabulary it was made for; loaded and bound as a calibrator is.

    Args:
        network: backbone and value layer.
        vocabulary: of the target.
        start_id: stands before every text; special, with an embedding.
        end_ids: special tokens whose R was learned, the target's end marks; fusion may move them.
        fusion: recommended fusion options.
        training: what is known of the training, for the model card.
        name: for messages.
    """

    config: CausalLMConfig

    def __init__(
        self,
        network: ValueNetwork,
        vocabulary: Vocabulary,
        *,
        start_id: int,
        end_ids: tuple[int, ...] = (),
        fusion: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        name: str = "in memory",
    ) -> None:
        self.network = network
        self.vocabulary = vocabulary
        self.start_id, self.end_ids = start_id, tuple(end_ids)
        self.name = name
        self.config = CausalLMConfig(
            heads=(HEAD,),
            fusion={"mode": HEAD, **(fusion or {})},
            training=dict(training or {}),
            shape={"target_vocab_size": network.target_vocab_size},
        )

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads."""
        return self.config.heads

    @property
    def fingerprint(self) -> str:
        """Hex digest of the weights."""
        return hub.weights_fingerprint(self.network.state_dict())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the network."""
        return self.network.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the network, by name."""
        return self.network.named_parameters()

    def lock_step(self, *, holes: bool = True) -> BoundValueLM:
        """The network as a reader of the target's ids."""
        return BoundValueLM(self, self.network, holes=holes)

    def bind(
        self,
        tokenizer: TokenizerLike,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        use_disk_cache: bool = True,
    ) -> BoundValueLM:
        """Make the guide of the target that it was made for.

        Args:
            tokenizer: of the target.
            dtype: of the weights; None: as they are.
            device: where it runs; None: where the network is.
            use_disk_cache: as for universal calibrators; nothing here is worth a file.

        Returns:
            The guide.

        Raises:
            VocabularyMismatchError: another vocabulary.
            VocabularyError: no usable tokenizer.
            InputError: the backbone cannot be followed token by token.
        """
        dtype, device = as_dtype(dtype), as_device(device)
        target = Vocabulary.from_tokenizer(tokenizer)
        if not same_ids(self.vocabulary, target):
            raise VocabularyMismatchError(
                f"The value guide {self.name} was made for another vocabulary ({len(self.vocabulary)} ids of "
                f"{self.vocabulary.name}) than that of {target.name} ({len(target)} ids). Train one for this target, "
                "or with `calibfuse train-guide --kind calibrator` one that binds to any vocabulary."
            )
        network: Any = self.network  # has what is used of a model
        holes = try_reading(network, self.name).holes
        return BoundValueLM(self, moved_model(network, dtype, device), holes=holes)

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> Path:
        """Write config.json, model.safetensors and README.md.

        Args:
            folder: made when missing.
            dtype: of the weights on disk.

        Returns:
            The folder.

        Raises:
            CheckpointError: the files cannot be written; nothing half-written is left.
        """
        config = {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "parameterisation": self.network.parameterisation,
            "target_vocab_size": self.network.target_vocab_size,
            "start_id": self.start_id,
            "end_ids": list(self.end_ids),
            "vocabulary_name": self.vocabulary.name,
            "backbone": _json_ready(self.network.config.to_dict()),
            **self.config.to_dict(),
        }
        tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in self.network.state_dict().items()}
        tensors |= {
            _VOCABULARY[0]: torch.from_numpy(self.vocabulary.data.copy()),
            _VOCABULARY[1]: torch.from_numpy(self.vocabulary.offsets.copy()),
        }
        card = calibrator_card({**self.config.training, "fusion": self.config.fusion})
        hub.write_checkpoint(Path(folder), config=config, tensors=tensors, files={hub.README_NAME: card})
        return Path(folder)

    @classmethod
    def read(
        cls,
        folder: Path,
        source: Source,
        *,
        reference: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ValueLM:
        """See `PretrainedCalibrator.read`."""
        if reference is not None:
            raise InputError("reference= is for causal language models of transformers; a value guide has none.")
        values = hub.read_config(folder, format_name=FORMAT_NAME, supported_version=FORMAT_VERSION)
        tensors = hub.read_tensors(folder / hub.WEIGHTS_NAME)
        try:
            data, offsets = (tensors.pop(key).numpy() for key in _VOCABULARY)
            vocabulary = Vocabulary(
                data=data, offsets=offsets, is_special=np.diff(offsets) == 0, name=str(values["vocabulary_name"])
            )
            network = ValueNetwork(
                _new_backbone(values["backbone"]), int(values["target_vocab_size"]), values["parameterisation"]
            )
            network.load_state_dict({key: tensor.to(dtype) for key, tensor in tensors.items()}, assign=True)
            loaded = cls(
                network.eval(),
                vocabulary,
                start_id=int(values["start_id"]),
                end_ids=tuple(values["end_ids"]),
                fusion=values["fusion"],
                training=values["training"],
                name=str(source.name_or_path),
            )
        except (KeyError, TypeError, ValueError, RuntimeError, VocabularyError) as error:
            raise CheckpointError(f"The value guide in {str(folder)!r} is not whole: {reason_of(error)}.") from error
        network.to(device or "cpu")
        return loaded


class BoundValueLM(LockStepLM):
    """A guide with the head "value" alone, which covers end marks, too: their R was learned. Made by `ValueLM.bind`."""

    def __init__(self, calibrator: ValueLM, network: Any, *, holes: bool) -> None:  # noqa: ANN401
        super().__init__(calibrator, {HEAD: network}, calibrator.vocabulary, start_id=calibrator.start_id, holes=holes)

    def covers(self, token_ids: Tensor) -> Tensor:
        """Bool, same shape: True where the token has bytes or ends a text."""
        ends = torch.tensor(self.calibrator.end_ids, dtype=torch.int64, device=token_ids.device)
        return super().covers(token_ids) | torch.isin(token_ids, ends)


def is_value_lm_checkpoint(folder: Path) -> bool:
    """Whether the folder's config.json is one of a value LM."""
    path = folder / hub.CONFIG_NAME
    return path.is_file() and hub.read_json(path, "configuration of a calibrator").get("format") == FORMAT_NAME


def _new_backbone(values: Mapping[str, Any]) -> PreTrainedModel:
    """An uninitialised backbone from a saved config; only architectures that transformers itself has."""
    from transformers import AutoConfig, AutoModel

    settings = dict(values)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    backbone: PreTrainedModel = AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    return backbone


def _json_ready(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, torch.dtype) else value for key, value in values.items()}
