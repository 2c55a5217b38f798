"""Scorers made of a function, or of a transformers text-classification model.

Left out: any other framework; wrap it in a function of your own (`module:function`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from calibfuse.errors import CheckpointError, InputError, ScorerError, reason_of
from calibfuse.scorers.checks import check_scores, check_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What classifiers call the class we want, the clearest first; the last one only where there are two classes.
_TOXIC_LABELS = ("toxic", "toxicity", "hate", "hateful", "hate speech", "offensive", "abusive", "insult", "label_1")
_OVERLAP_TOKENS = 32  # of neighbouring pieces of a text that is longer than the model reads
_USUAL_TOKENS = 128  # of a piece, for which a batch holds `batch_size`
_MANY_PIECES = 2_000  # from here on a progress bar is worth a line


class FunctionScorer:
    """A user's function, from a list of texts to one probability in [0, 1] for each; what it returns is checked."""

    def __init__(self, function: Callable[[list[str]], Any], name: str, *, may_be_nan: bool = False) -> None:
        self._function, self._may_be_nan = function, may_be_nan
        self.name = name

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Call the function and check its answer, see `ToxicityScorer.score`."""
        check_texts(texts, self.name)
        try:
            values = self._function(list(texts))
        except Exception as error:  # a user's function may raise any error; the cause stays chained
            raise ScorerError(
                f"Scorer {self.name!r} failed on {len(texts)} texts with {type(error).__name__}: {error}"
            ) from error
        return check_scores(values, len(texts), self.name, may_be_nan=self._may_be_nan)


class TransformersScorer(FunctionScorer):
    """Any transformers text-classification model as a scorer.

    `label` names the toxic class, None finds it by name; `batch_size` counts pieces of text per forward pass, several
    times as many of short ones; `fast` computes in bfloat16 where the device has it, for scores within 0.01.
    InputError: no such class, none found by name, a slow tokenizer, a model of very short texts, or a
    batch size below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        label: str | None = None,
        batch_size: int = 32,
        fast: bool = False,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size of a scorer must be at least 1, got {batch_size}")
        if not tokenizer.is_fast:
            raise InputError(f"Scorer {name!r} has a slow tokenizer, which cannot cut long texts; give a fast one")
        super().__init__(self._score, name)
        self._model = model.train(False)
        self._tokenizer = tokenizer
        self._label = find_toxic_label(model.config.id2label or {}, label, name)
        several = getattr(model.config, "problem_type", None) == "multi_label_classification"
        self._sigmoid = several or model.config.num_labels == 1
        self._batch_size = batch_size if tokenizer.pad_token_id is not None else 1  # without padding, one at a time
        self._max_length = _max_length(model, tokenizer)
        if self._max_length - tokenizer.num_special_tokens_to_add() <= _OVERLAP_TOKENS:
            raise InputError(f"Scorer {name!r} reads only {self._max_length} tokens, too few to score text with")
        self._half_precision = fast and _computes_bfloat16(model.device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **options: Any,  # noqa: ANN401
    ) -> TransformersScorer:
        """Load a model with its tokenizer, else a CheckpointError; `options` are those of the class."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        name = os.fspath(name_or_path)
        source: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **source)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                name, use_safetensors=True, output_loading_info=True, **source
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise CheckpointError(
                f"Expected a transformers text-classification model with safetensors weights at {name!r}: "
                f"{reason_of(error)}."
            ) from error
        missing = sorted(loading["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{name!r} is no trained text classifier: {len(missing)} weights are missing, among them {missing[0]!r}"
            )
        return cls(model.to(device if device is not None else "cpu"), tokenizer, name=name, **options)

    def _score(self, texts: list[str]) -> NDArray[np.float64]:
        """Of a text that is longer than the model reads, cut into overlapping pieces, the worst one counts."""
        if not texts:
            return np.zeros(0, dtype=np.float64)
        encoding = self._tokenizer(
            texts,
            truncation=True,
            max_length=self._max_length,
            stride=_OVERLAP_TOKENS,
            return_overflowing_tokens=True,
            return_attention_mask=False,
        )
        scores = np.full(len(texts), -np.inf)
        with np.errstate(invalid="ignore"):  # nan stays nan, and is refused
            np.maximum.at(scores, encoding["overflow_to_sample_mapping"], self._probabilities(encoding["input_ids"]))
        return scores

    @torch.inference_mode()
    def _probabilities(self, pieces: list[list[int]]) -> NDArray[np.float64]:
        """The probability of the toxic class for each piece, float64 [pieces]."""
        result = np.zeros(len(pieces), dtype=np.float64)
        device = self._model.device
        # the longest first, so that a batch too large for the memory fails at once
        order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))
        quiet = True if len(pieces) < _MANY_PIECES else None  # None: only on a terminal
        half = torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._half_precision)
        with half, tqdm(total=len(pieces), desc=f"scoring with {self.name}", leave=False, disable=quiet) as bar:
            start = 0
            while start < len(order):
                size = max(1, self._batch_size * _USUAL_TOKENS // max(_USUAL_TOKENS // 4, len(pieces[order[start]])))
                chosen = order[start : start + (size if self._batch_size > 1 else 1)]
                batch = self._batch([pieces[i] for i in chosen])
                logits = self._model(**{name: values.to(device) for name, values in batch.items()}).logits.float()
                probabilities = logits.sigmoid() if self._sigmoid else logits.softmax(dim=-1)  # (pieces, labels)
                result[chosen] = probabilities[:, self._label].cpu().numpy()
                bar.update(len(chosen))
                start += len(chosen)
        return result

    def _batch(self, pieces: list[list[int]]) -> dict[str, torch.Tensor]:
        if len(pieces) == 1:
            ids = torch.tensor(pieces)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return dict(self._tokenizer.pad({"input_ids": pieces}, return_tensors="pt"))


def find_toxic_label(id_to_label: Mapping[Any, str], label: str | None, name: str) -> int:
    """The index of the class that means toxic: the one asked for, or one of a known name; InputError without."""

    def plain(text: object) -> str:
        return str(text).strip().lower().replace("_", " ").replace("-", " ")

    known = {plain(text): int(index) for index, text in id_to_label.items()}
    wanted = [label] if label is not None else _TOXIC_LABELS if len(known) == 2 else _TOXIC_LABELS[:-1]
    found = next((known[plain(each)] for each in wanted if plain(each) in known), None)
    if found is None and label is None and len(known) == 1:
        found = next(iter(known.values()))
    if found is None:
        asked = "a class that means toxic" if label is None else f"class {label!r}"
        raise InputError(
            f"Scorer {name!r} lacks {asked}; its classes are {sorted(id_to_label.values())}. Name one as label"
        )
    return found


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def _max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a model reads at once, by its tokenizer and its positions, at most 512."""
    lengths = [512]
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # position tables of the RoBERTa kind begin behind the padding id
        offset = (model.config.pad_token_id or 0) + 1 if "roberta" in str(model.config.model_type) else 0
        lengths.append(positions - offset)
    if tokenizer.model_max_length and tokenizer.model_max_length < 1e6:
        lengths.append(int(tokenizer.model_max_length))
    return min(lengths)
