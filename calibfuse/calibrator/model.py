"""Calibrator: a small language model without a vocabulary of its own.

Composer (bytes -> token vectors), body (transformer), heads. Every head scores the same token vectors:

    score(token | prefix) = <W_head norm(x + adapter_head(x)), h(token)> + bias_head(token)

with x the body's last state. The heads "calibrator" (non-toxic text) and "reference" (unfiltered text) share the body,
so one forward gives both (design: contrast of a model with its own twin). A third head, "value", may be added by
`with_value_head`: there log R = log sigmoid(score), a sequence-level guide (Meng et al. 2022, NADO). `bind` compiles
the model for one vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibfuse import hub
from calibfuse.calibrator.body import Body, KeyValueBuffer
from calibfuse.calibrator.composer import Composer, TokenFeatures
from calibfuse.errors import CheckpointError, InputError
from calibfuse.guides.causal_lm import CausalLMCalibrator, is_transformers_checkpoint
from calibfuse.model_card import PLACEHOLDER, calibrator_card
from calibfuse.value.value_lm import ValueLM, is_value_lm_checkpoint

if TYPE_CHECKING:
    from calibfuse.calibrator.binding import BoundCalibrator
    from calibfuse.vocabulary import TokenizerLike

FORMAT_NAME = "calibfuse-calibrator"
FORMAT_VERSION = 1
CALIBRATOR_HEAD, REFERENCE_HEAD, VALUE_HEAD = "calibrator", "reference", "value"
WEIGHTS_FILE = "model.safetensors"
_WORD = re.compile("[a-z]+")


@dataclass(frozen=True, kw_only=True)
class CalibratorConfig:
    """Shape of a calibrator, and the facts that travel with it.

    Attributes:
        bucket_count: rows of the hashed feature table.
        token_width: width of a token's composed vector.
        composer_hidden_width: hidden width of the composer's MLP.
        max_token_norm: longest that a token's composed vector can be; see calibfuse/calibrator/composer.py.
        width: width of the body.
        layer_count: blocks of the body.
        head_count: attention heads.
        hidden_width: hidden width of the body's MLPs.
        window: tokens that attention looks back, the current one included.
        adapter_width: hidden width of each head's adapter.
        heads: names of the heads, in the order of the bias columns.
        words: word -> shift in nats: below 0 where the calibrator minds the word by itself, above 0 where a name is
            given back what the heads take from it; see minded_words.py.
        fusion: recommended fusion options (keys of FusionConfig) for this calibrator.
        training: facts of the training, for the model card; any JSON values.
    """

    bucket_count: int = 32_768
    token_width: int = 128
    composer_hidden_width: int = 256
    max_token_norm: float = 20.0
    width: int = 192
    layer_count: int = 3
    head_count: int = 4
    hidden_width: int = 768
    window: int = 128
    adapter_width: int = 192
    heads: tuple[str, ...] = (CALIBRATOR_HEAD, REFERENCE_HEAD)
    words: Mapping[str, float] = field(default_factory=dict)
    fusion: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validate."""
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {**asdict(self), "heads": list(self.heads)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CalibratorConfig:
        """Inverse of `to_dict`.

        Raises:
            InputError: unknown keys, or values out of range.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(
                f"Unknown keys in the calibrator's config: {', '.join(unknown)}; known are {sorted(known)}."
            )
        return cls(**values)


class Head(nn.Module):
    """Body state -> query that is compared with every token's vector."""

    def __init__(self, width: int, adapter_width: int, token_width: int) -> None:
        super().__init__()
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
        adapted = states + self.adapter_down(
            functional.gelu(self.adapter_up(self.adapter_norm(states)), approximate="tanh")
        )
        normed: Tensor = self.norm(adapted)
        return normed

    def forward(self, states: Tensor) -> Tensor:
        """[..., width] -> [..., token_width]."""
        query: Tensor = self.query(self.state(states))
        return query


class Calibrator(nn.Module):
    """The universal calibrator.

    Args:
        config: its shape; weights are freshly initialised from torch's global random state.
    """

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
        self.body = Body(
            width=config.width,
            layer_count=config.layer_count,
            head_count=config.head_count,
            hidden_width=config.hidden_width,
            window=config.window,
        )
        self.heads = nn.ModuleDict(
            {name: Head(config.width, config.adapter_width, config.token_width) for name in config.heads}
        )

    def with_value_head(self, seed: int) -> Calibrator:
        """A copy with a fresh head "value"; a former one is replaced.

        Args:
            seed: of the head's weights. Its query starts at zero, so that R is one half everywhere.

        Returns:
            The copy; body, composer and the other heads have the same weights.
        """
        heads = (*(name for name in self.config.heads if name != VALUE_HEAD), VALUE_HEAD)
        device, dtype = self.boundary.device, self.boundary.dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            copied = Calibrator(replace(self.config, heads=heads)).to(device, dtype)
        weights = {name: tensor for name, tensor in self.state_dict().items() if f"heads.{VALUE_HEAD}." not in name}
        columns = [self.config.token_width + self.config.heads.index(name) for name in heads[:-1]]
        table = weights.pop("composer.table")
        fresh = copied.state_dict()
        fresh.update(weights)
        vectors = table[:, : self.config.token_width]
        fresh["composer.table"] = torch.cat([vectors, table[:, columns], torch.zeros_like(table[:, :1])], dim=1)
        copied.load_state_dict(fresh)
        nn.init.zeros_(copied.heads[VALUE_HEAD].query.weight)  # type: ignore[union-attr, arg-type]
        return copied

    def compose(self, features: TokenFeatures) -> tuple[Tensor, Tensor]:
        """Vectors [tokens, token_width] and biases [tokens, heads] of tokens given by their features."""
        vectors, biases = self.composer(features)
        return vectors, biases

    def embed(self, token_vectors: Tensor, is_boundary: Tensor) -> Tensor:
        """Input of the body.

        Args:
            token_vectors: [rows, slots, token_width].
            is_boundary: bool [rows, slots], True for special tokens, which have no bytes.

        Returns:
            [rows, slots, width].
        """
        inputs = self.token_in(token_vectors)
        return torch.where(is_boundary[..., None], self.boundary.to(inputs.dtype), inputs)

    def forward(self, states: Tensor, starts: Tensor | None, buffer: KeyValueBuffer | None = None) -> Tensor:
        """The body; see `Body.forward`."""
        result: Tensor = self.body(states, starts, buffer)
        return result

    def lay_out_for_decoding(self) -> None:
        """Store the matrices of body and heads by input channel: the same numbers, shapes and names.

        A decoding step multiplies a few rows with matrices that come from main memory; in this order a CPU streams them
        a fifth faster (docs/results.md).
        """
        for part in (self.token_in, self.body, self.heads):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data = module.weight.data.t().contiguous().t()

    @property
    def fingerprint(self) -> str:
        """Hex digest of config shape and weights; the key of everything derived from them."""
        digest = hashlib.sha256(repr(sorted(_shape_of(self.config).items())).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def bind(
        self,
        tokenizer: TokenizerLike,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        use_disk_cache: bool = True,
    ) -> BoundCalibrator:
        """Compile the calibrator for one target vocabulary.

        Args:
            tokenizer: a transformers tokenizer (fast or slow), a `tokenizers.Tokenizer`, a Vocabulary, a path or a
                Hub id.
            dtype: of the bound token vectors: float32 (default) or bfloat16, which halves their memory at an error
                of about 0.01 nats.
            device: where the bound calibrator runs; default: where the calibrator is.
            use_disk_cache: keep the token vectors in the cache folder (CALIBFUSE_CACHE, else ~/.cache/calibfuse), keyed
                by the fingerprints of weights and vocabulary.

        Returns:
            The bound calibrator; it shares the body's weights with this object.

        Raises:
            VocabularyError: `tokenizer` is no usable tokenizer.
        """
        from calibfuse.calibrator.binding import bind  # binding builds on this module

        return bind(self, tokenizer, dtype=dtype, device=device, use_disk_cache=use_disk_cache)

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.bfloat16) -> Path:
        """Write config.json, model.safetensors and README.md (the model card).

        Args:
            folder: made when missing. A complete older checkpoint in it is replaced file by file, config last.
            dtype: of the weights on disk.

        Returns:
            The folder.

        Raises:
            CheckpointError: the files cannot be written (disk full, no permission); nothing half-written is left.
        """
        config = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **self.config.to_dict()}
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        minded = sum(shift < 0.0 for shift in self.config.words.values())
        counts = {"words_and_beginnings_minded_by_themselves": minded, "names_spared": len(self.config.words) - minded}
        words = {name: count for name, count in counts.items() if count}
        card = calibrator_card({**config["training"], **words, "fusion": config["fusion"]})
        hub.write_checkpoint(Path(folder), config=config, tensors=tensors, files={"README.md": card})
        return Path(folder)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | None = None,
        *,
        reference: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Calibrator:
        """Load a calibrator.

        Args:
            name_or_path: a local folder, a Hub id, or None for the bundled one. A causal LM of transformers will do
                too, and so will a value guide of `calibfuse train-guide`.
            reference: of a causal LM, a twin of it that becomes the head "reference".
            revision: branch, tag or commit on the Hub.
            cache_dir: of the Hub's files.
            local_files_only: never touch the network.
            token: Hub token.
            device: default CPU.
            dtype: of the weights in memory.

        Returns:
            The calibrator, in evaluation mode. For a checkpoint of transformers a CausalLMCalibrator: it binds in the
            same way, but has nothing to train or to align.

        Raises:
            CheckpointError: nothing there, damaged, or not a calibrator.
            InputError: a reference for a universal calibrator, or a causal LM that cannot be one.
            CheckpointFormatError: written by a newer calibfuse.
        """
        folder = hub.resolve_checkpoint(
            name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        if is_transformers_checkpoint(folder):
            language_model = CausalLMCalibrator.from_pretrained(
                folder if name_or_path is None else name_or_path,
                reference=reference,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
                device=device,
                dtype=dtype,
            )
            # Declared as what nearly all callers get; what they use of it, both have.
            return cast("Calibrator", language_model)
        if is_value_lm_checkpoint(folder):
            value_lm = ValueLM.from_pretrained(folder, name=str(name_or_path), device=device, dtype=dtype)
            return cast("Calibrator", value_lm)  # as above
        if reference is not None:
            raise InputError(
                f"reference= is for causal language models of transformers; the universal calibrator in "
                f"{str(folder)!r} has "
                "its reference as a head of its own."
            )
        values = hub.read_config(folder, format_name=FORMAT_NAME, supported_version=FORMAT_VERSION)
        values = {key: value for key, value in values.items() if key not in ("format", "format_version")}
        try:
            config = CalibratorConfig.from_dict(values)
        except InputError as error:
            raise CheckpointError(f"The config of the calibrator in {folder} is not valid: {error}") from error
        with torch.device("meta"):
            model = cls(config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tensors = hub.read_tensors(folder / WEIGHTS_FILE, expected=expected)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
        model.lay_out_for_decoding()
        return model.to(device or "cpu").eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        commit_message: str = "Upload calibrator",
        token: str | bool | None = None,
        card: str | None = None,
    ) -> str:
        """Save into a temporary folder and upload it.

        Args:
            repo_id: `organisation/name`; made when missing. It is what the card's example loads.
            private: for a new repository; an existing one keeps its visibility.
            revision: branch, made when missing; None: the main one.
            commit_message: of the upload.
            token: Hub token; None: that of the login.
            card: text of README.md; None: the model card from the facts of the training.

        Returns:
            The repository's address.

        Raises:
            CheckpointError: the upload failed; the sentence says why.
        """
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            readme = Path(folder) / hub.README_NAME
            text = readme.read_text(encoding="utf-8") if card is None else card
            readme.write_text(text.replace(PLACEHOLDER, repo_id), encoding="utf-8")
            return hub.upload_folder(
                Path(folder), repo_id, private=private, revision=revision, commit_message=commit_message, token=token
            )


def _shape_of(config: CalibratorConfig) -> dict[str, Any]:
    """The part of a config that determines the numbers; recommendations and facts do not."""
    values = config.to_dict()
    return {key: value for key, value in values.items() if key not in ("fusion", "training")}
