"""Scorers made of other things: a function, a transformers text-classification model, detoxify.

Left out: any other framework; wrap it in a function of your own (`module:function`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibfuse.errors import CheckpointError, InputError, MissingDependencyError, ScorerError, reason_of
from calibfuse.scorers.checks import check_scores, check_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FunctionScorer", "TransformersScorer", "detoxify_scorer"]

# What classifiers call the class we want, the clearest first.
_TOXIC_LABELS = ("toxic", "toxicity", "hate", "hateful", "hate speech", "offensive", "abusive", "insult", "label_1")
_OVERLAP_TOKENS = 32  # of neighbouring pieces of a text that is longer than the model reads


class FunctionScorer:
    """A user's function as a scorer; what it returns is checked."""

    def __init__(self, function: Callable[[list[str]], Any], name: str) -> None:
        """Wrap a function.

        Args:
            function: takes a list of texts, returns one probability in [0, 1] for each.
            name: what reports call it.
        """
        self._function = function
        self.name = name

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Call the function and check its answer.

        Args:
            texts: any texts.

        Returns:
            (len(texts),), float64, in [0, 1].

        Raises:
            ScorerError: the function raised, or returned something that is no list of probabilities.
        """
        check_texts(texts, self.name)
        try:
            values = self._function(list(texts))
        except Exception as error:  # a stranger's code may raise anything; the cause stays chained
            raise ScorerError(
                f"Scorer {self.name!r} failed on {len(texts)} texts with {type(error).__name__}: {error}"
            ) from error
        return check_scores(values, len(texts), self.name)


class TransformersScorer:
    """Any transformers text-classification model as a scorer."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        label: str | None = None,
        batch_size: int = 32,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: a sequence classification model of transformers, on its device.
            tokenizer: its tokenizer.
            name: what reports call it.
            label: name of the toxic class; None finds it by name.
            batch_size: pieces of text per forward pass, at least 1.

        Raises:
            InputError: no class of that name, none found by name, or a batch size below 1.
        """
        if batch_size < 1:
            raise InputError(f"batch_size of a scorer must be at least 1, got {batch_size}")
        self.name = name
        model.train(False)
        self._model = model
        self._tokenizer = tokenizer
        self._label = find_toxic_label(model.config.id2label or {}, label, name)
        several = getattr(model.config, "problem_type", None) == "multi_label_classification"
        self._sigmoid = several or model.config.num_labels == 1
        self._batch_size = batch_size if tokenizer.pad_token_id is not None else 1  # without padding, one at a time
        self._max_length = _max_length(model, tokenizer)

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Score texts; one that is longer than the model reads is cut into overlapping pieces, the worst one counts.

        Args:
            texts: any texts.

        Returns:
            (len(texts),), float64, in [0, 1].

        Raises:
            ScorerError: the tokenizer or model failed, or gave something that is no probability.
        """
        check_texts(texts, self.name)
        scores = np.zeros(len(texts), dtype=np.float64)
        seen = np.zeros(len(texts), dtype=np.bool_)
        try:
            pieces, owners = self._pieces(texts)
            # similar lengths together, so that little is padded
            order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
            for start in range(0, len(order), self._batch_size):
                chosen = order[start : start + self._batch_size]
                probabilities = self._forward([pieces[i] for i in chosen])
                for i, probability in zip(chosen, probabilities, strict=True):
                    owner = owners[i]
                    worst = max(float(scores[owner]), probability) if seen[owner] else probability
                    scores[owner] = worst if worst == worst and probability == probability else np.nan
                    seen[owner] = True
        except ScorerError:
            raise
        except Exception as error:
            raise ScorerError(f"Scorer {self.name!r} failed with {type(error).__name__}: {error}") from error
        if not seen.all():
            raise ScorerError(f"Scorer {self.name!r} gave no score for text {int(np.flatnonzero(~seen)[0])}")
        return check_scores(scores, len(texts), self.name)

    def _pieces(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Return the token ids of all pieces, special tokens included, and the text each belongs to."""
        tokenizer = self._tokenizer
        n_special = tokenizer.num_special_tokens_to_add()
        room = self._max_length - n_special
        if room <= _OVERLAP_TOKENS:
            raise ScorerError(f"Scorer {self.name!r} reads only {self._max_length} tokens, too few to score text with")
        pieces: list[list[int]] = []
        owners: list[int] = []
        for index, text in enumerate(texts):
            ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
            if len(ids) <= self._max_length:
                pieces.append(ids)
                owners.append(index)
                continue
            encoding = tokenizer(
                text,
                truncation=True,
                max_length=self._max_length,
                stride=_OVERLAP_TOKENS,
                return_overflowing_tokens=True,
            )
            parts = encoding["input_ids"]
            if not parts or not isinstance(parts[0], list):
                raise ScorerError(
                    f"Text {index} has {len(ids)} tokens, scorer {self.name!r} reads {self._max_length}, and its slow "
                    "tokenizer cannot cut texts; use a model with a fast tokenizer"
                )
            pieces.extend(parts)
            owners.extend([index] * len(parts))
        return pieces, owners

    @torch.inference_mode()
    def _forward(self, pieces: list[list[int]]) -> list[float]:
        """Return the probability of the toxic class for each piece."""
        if len(pieces) == 1:
            batch = {
                "input_ids": torch.tensor(pieces),
                "attention_mask": torch.ones(1, len(pieces[0]), dtype=torch.long),
            }
        else:
            batch = dict(self._tokenizer.pad({"input_ids": pieces}, return_tensors="pt"))
        device = self._model.device
        inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
        logits = self._model(**inputs).logits.float()  # (pieces, labels)
        probabilities = logits.sigmoid() if self._sigmoid else logits.softmax(dim=-1)
        return [float(value) for value in probabilities[:, self._label].cpu()]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        label: str | None = None,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> TransformersScorer:
        """Load a text-classification model with its tokenizer.

        Args:
            name_or_path: Hub id or local folder; weights must be safetensors.
            label: name of the toxic class; None finds it by name.
            batch_size: pieces of text per forward pass.
            device: where the model runs; None is the CPU.
            revision: branch, tag or commit on the Hub.
            local_files_only: True for no network access.

        Returns:
            The scorer.

        Raises:
            CheckpointError: the model or tokenizer cannot be loaded.
            InputError: the toxic class cannot be found.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        name = os.fspath(name_or_path)
        options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                name, use_safetensors=True, output_loading_info=True, **options
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
        return cls(
            model.to(device if device is not None else "cpu"), tokenizer, name=name, label=label, batch_size=batch_size
        )


def find_toxic_label(id_to_label: Mapping[Any, str], label: str | None, name: str) -> int:
    """Find the class of a model that means toxic.

    Args:
        id_to_label: the model's classes.
        label: the class asked for, letter case ignored; None looks for a known name.
        name: the model, for messages.

    Returns:
        The class index.

    Raises:
        InputError: no such class, or none of the known names.
    """
    known = {str(text).strip().lower().replace("_", " ").replace("-", " "): int(i) for i, text in id_to_label.items()}
    wanted = _TOXIC_LABELS if label is None else (label.strip().lower(),)
    for candidate in wanted:
        index = known.get(candidate.replace("_", " ").replace("-", " "))
        if index is not None and not (label is None and candidate == "label_1" and len(known) != 2):
            return index
    if label is None and len(known) == 1:
        return next(iter(known.values()))
    asked = "a class that means toxic" if label is None else f"class {label!r}"
    raise InputError(
        f"Scorer {name!r} lacks {asked}; its classes are {sorted(id_to_label.values())}. Name one as label"
    )


def _max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a model reads at once, by its tokenizer and its positions, at most 512."""
    lengths = [512]
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # position tables of the RoBERTa kind begin behind the padding id
        offset = (model.config.pad_token_id or 0) + 1 if "roberta" in str(model.config.model_type) else 0
        lengths.append(positions - offset)
    if tokenizer.model_max_length and tokenizer.model_max_length < 1e6:
        lengths.append(int(tokenizer.model_max_length))
    return min(lengths)


def detoxify_scorer(variant: str = "original", *, device: str | torch.device | None = None) -> FunctionScorer:
    """Load detoxify (extra `detoxify`); it downloads its own weights in its own way.

    Args:
        variant: "original", "unbiased" or "multilingual", with "-small" where detoxify offers it.
        device: where it runs; None is the CPU.

    Returns:
        Its toxicity as a scorer.

    Raises:
        MissingDependencyError: detoxify is not installed.
        ScorerError: detoxify could not load this variant.
    """
    try:
        from detoxify import Detoxify
    except ImportError as error:
        raise MissingDependencyError(
            "The scorer 'detoxify' needs the package detoxify; install it with `pip install calibfuse[detoxify]`"
        ) from error
    try:
        model = Detoxify(variant, device=str(device or "cpu"))
    except Exception as error:
        raise ScorerError(
            f"detoxify could not load its variant {variant!r}: {type(error).__name__}: {error}"
        ) from error
    return FunctionScorer(lambda texts: model.predict(texts)["toxicity"] if texts else [], f"detoxify:{variant}")
