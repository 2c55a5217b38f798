"""A calibrator from the first layers of a pretrained causal LM, trained further on non-toxic text.

Source: the detoxified pre-training of Tian et al. 2025 (arXiv 2506.01266), whose calibration model has three layers:
here the first K layers of a pretrained model with its embeddings, final norm and output head, trained by next-token
cross-entropy. With unfiltered text a twin is trained on it in the same way, as the reference of mode "contrast"
(docs/guides/any-causal-lm.md).

The result is an ordinary checkpoint of transformers with the model's tokenizer; the twin lies in `reference` inside.

Left out: training on the completion of a prompt alone, and adapters.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calibfuse import hub
from calibfuse.errors import CheckpointError, InputError, VocabularyError
from calibfuse.guides.causal_lm import HEADS, CausalLMCalibrator
from calibfuse.guides.lm_checkpoint import ALLOWED_FILES, load_model, load_tokenizer
from calibfuse.training.data import PassageStore, TextSource
from calibfuse.training.lm_trainer import LMBatches, LMTrainer, bits_per_byte
from calibfuse.training.sorting import PassageSorter
from calibfuse.training.trainer import TrainingConfig
from calibfuse.training.words.balance import balance_terms
from calibfuse.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from calibfuse.scorers import ToxicityScorer

logger = logging.getLogger(__name__)

DEFAULT_LEARNING_RATE = 3e-4  # the weights are trained already
_FINAL_VALIDATION_FACTOR = 4  # the last validation reads more text than those on the way
_SETTINGS = (
    "steps", "rows", "slots", "learning_rate", "warmup", "decay", "weight_decay", "balance_identity_terms", "seed",
    "precision",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LMText:
    """What to train on.

    Attributes:
        non_toxic: files, folders or hf:NAME of non-toxic text.
        reference: likewise, unfiltered text; with it, a twin is trained on all text.
        from_unfiltered: likewise, unfiltered text that `scorer` sorts; a twin is trained on all of it.
        scorer: toxicity scorer for `from_unfiltered`.
        threshold: passages that score this or more are kept from the calibrator.
        text_field: column or key of the text; None: found by name.
    """

    non_toxic: Sequence[str] = ()
    reference: Sequence[str] = ()
    from_unfiltered: Sequence[str] = ()
    scorer: ToxicityScorer | None = None
    threshold: float = 0.5
    text_field: str | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: the combination of sources makes no sense.
        """
        if self.from_unfiltered and (self.non_toxic or self.reference):
            raise InputError("Give either --from-unfiltered (sorted by a scorer) or --non-toxic, not both.")
        if not self.from_unfiltered and not self.non_toxic:
            raise InputError("Training needs --non-toxic files, or --from-unfiltered files that a scorer sorts.")
        if self.from_unfiltered and self.scorer is None:
            raise InputError("--from-unfiltered needs a toxicity scorer.")

    @property
    def has_twin(self) -> bool:
        """Whether there is text for a twin."""
        return bool(self.reference or self.from_unfiltered)


def truncate_model(model: PreTrainedModel, layer_count: int, *, name: str = "given") -> PreTrainedModel:
    """Keep the first layers of a causal LM, with its embeddings, final norm and output head; in place.

    Args:
        model: of transformers, with its layers in one list (GPT-2, Llama, GPT-NeoX and most others).
        layer_count: how many to keep, 1 to all.
        name: for messages.

    Returns:
        The same model. The state before its final norm is the one that the whole model has after `layer_count` layers.

    Raises:
        InputError: it has fewer layers, or none that can be cut.
    """
    config: Any = model.config
    total = config.num_hidden_layers
    if not 1 <= layer_count <= total:
        raise InputError(f"The model {name} has {total} layers; --num-layers must be 1 to {total}, got {layer_count}.")
    parent, key, layers = _layers_of(model, name)
    setattr(parent, key, torch.nn.ModuleList(list(layers)[:layer_count]))
    # What is listed per layer (kinds of attention, for instance) is cut too; first, since the number may be checked.
    for each, value in list(vars(config).items()):
        if "layer" in each and isinstance(value, list) and len(value) == total:
            setattr(config, each, value[:layer_count])
    config.num_hidden_layers = layer_count
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if _shapes_by_config(config, type(model)) != expected:
        raise InputError(
            f"The layers of the model {name} ({config.model_type}) cannot be cut: its config cannot describe the "
            "shorter model."
        )
    return model


def _layers_of(model: PreTrainedModel, name: str) -> tuple[torch.nn.Module, str, torch.nn.ModuleList]:
    """The list of all layers: its parent, its name there, and itself."""
    total = model.config.num_hidden_layers
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == total
    }
    # A list inside a layer (experts) may happen to be as long.
    outer = [path for path in found if not any(path.startswith(other + ".") for other in found)]
    if len(outer) != 1:
        raise InputError(
            f"The layers of the model {name} ({model.config.model_type}) cannot be cut: expected one list of {total} "
            f"layers in it, found {len(outer)}."
        )
    parent, _, key = outer[0].rpartition(".")
    return model.get_submodule(parent), key, found[outer[0]]


def _shapes_by_config(config: PretrainedConfig, kind: type[PreTrainedModel]) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of the weights of a model made from a saved config; None where none can be made."""
    try:
        with torch.device("meta"):
            made: Any = kind(type(config).from_dict(config.to_dict()))
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError):
        return None
    return {key: tuple(tensor.shape) for key, tensor in made.state_dict().items()}


def run_lm_training(
    text: LMText,
    output: str | os.PathLike[str],
    *,
    init_from: str | os.PathLike[str],
    layer_count: int,
    training: TrainingConfig | None = None,
    resume: bool = False,
    device: str | None = None,
    facts: dict[str, Any] | None = None,
    local_files_only: bool = False,
    show_progress: bool = True,
) -> Path | None:
    """Train a calibrator from the first layers of a causal LM.

    Args:
        text: what on.
        output: folder of the result; working files go to `work/` inside it.
        init_from: folder or Hub id of the model.
        layer_count: how many of its layers to keep.
        training: how; None: the defaults at a learning rate of 3e-4.
        resume: go on from the checkpoints in `output`.
        device: "cpu", "cuda" or "mps"; None: the best there is.
        facts: for the model card (name, license, ...).
        local_files_only: never touch the network.
        show_progress: progress bars.

    Returns:
        The output folder, or None when Ctrl-C stopped the run after a checkpoint.

    Raises:
        DataError: text that cannot be used.
        CheckpointError: files that cannot be read or written, or a checkpoint of another run.
        InputError: a model that cannot be a calibrator, or settings that do not fit together.
        VocabularyError: the model has no usable tokenizer.
    """
    training = training or TrainingConfig(learning_rate=DEFAULT_LEARNING_RATE)
    _check(training)
    output = Path(output)
    work = output / "work"
    heads = HEADS if text.has_twin else HEADS[:1]
    if not resume and any((work / head).exists() for head in HEADS):
        raise CheckpointError(
            f"{output} holds the checkpoint of an earlier run: go on with --resume (more --steps if it was finished), "
            "or choose another --output."
        )
    start = _Start.load(init_from, layer_count, local_files_only=local_files_only)
    store = _open_store(text, work, show_progress=show_progress)
    models: dict[str, PreTrainedModel] = {}
    measured: dict[str, dict[str, float]] = {"at the start": {}, "at the end": {}}
    seconds = 0.0
    for head in heads:
        model = copy.deepcopy(start.model)
        texts = _validation_texts(store, training, clean=head == HEADS[0])

        def measure(parts: int = 1, model: PreTrainedModel = model, texts: list[str] = texts) -> float:
            chosen = texts[: len(texts) * parts // _FINAL_VALIDATION_FACTOR]
            return bits_per_byte(model, chosen or texts, start.encode, start_id=start.start_id, slots=training.slots)

        indices = _train_indices(store, training, clean=head == HEADS[0])
        batches = LMBatches(store, indices, start.encode, start_id=start.start_id, end_id=start.end_id, config=training)
        trainer = LMTrainer(
            model,
            batches,
            training,
            work / head,
            identity=_identity(start, store, training),
            label=f"training the {head}",
            device=device,
            show_progress=show_progress,
        )
        if texts:
            measured["at the start"][head] = round(measure(_FINAL_VALIDATION_FACTOR), 4)
        if resume:
            trainer.resume()
            logger.info("%s: resuming at step %d of %d", head, trainer.step, training.steps)
        if not trainer.train(measure if texts else None):
            return None
        if texts:
            measured["at the end"][head] = round(measure(_FINAL_VALIDATION_FACTOR), 4)
            logger.info("%s: %.3f bits per byte of held-out text", head, measured["at the end"][head])
        seconds += trainer.seconds
        cpu: Any = model
        models[head] = cpu.to("cpu")
    calibrator = CausalLMCalibrator(
        models[HEADS[0]], start.tokenizer, reference=models.get(HEADS[1]), name=str(init_from)
    )
    known = _facts(text, store, training, start, measured, seconds)
    recommended = {} if text.has_twin else {"mode": "geometric"}
    calibrator.config = replace(
        calibrator.config, fusion=recommended, training={**calibrator.config.training, **known, **(facts or {})}
    )
    return calibrator.save_pretrained(output, dtype=torch.bfloat16)


@dataclass(frozen=True)
class _Start:
    """The cut model that training begins with, and how its text is written."""

    name: str
    model: PreTrainedModel
    layers: tuple[int, int]  # kept, of all
    tokenizer: Any
    start_id: int
    end_id: int | None
    fingerprint: str

    @classmethod
    def load(cls, source: str | os.PathLike[str], layer_count: int, *, local_files_only: bool) -> _Start:
        folder = hub.resolve_checkpoint(source, allow_patterns=ALLOWED_FILES, local_files_only=local_files_only)
        model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
        if tokenizer is None:
            raise VocabularyError(
                f"The language model {str(source)!r} came without a tokenizer; save its tokenizer in the same folder."
            )
        total = int(model.config.num_hidden_layers)
        cut = truncate_model(model, layer_count, name=repr(str(source)))
        start_id = CausalLMCalibrator(cut, tokenizer, name=str(source)).start_id(Vocabulary.from_tokenizer(tokenizer))
        end_id = getattr(tokenizer, "eos_token_id", None)
        end_id = end_id if isinstance(end_id, int) and end_id != start_id else None
        fingerprint = hub.weights_fingerprint(cut.state_dict())
        return cls(str(source), cut, (layer_count, total), tokenizer, start_id, end_id, fingerprint)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Own ids without special tokens; ids without an embedding, which no model can read, are left out."""
        size = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        encoded: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [[each for each in row if each < size] for row in encoded]


def _check(training: TrainingConfig) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("Training from a language model runs on one process; start it without accelerate launch.")
    if training.slots < 2:
        raise InputError(f"--slots must be at least 2, got {training.slots}.")
    if training.flagged_share is not None:
        raise InputError("--flagged-share is for universal calibrators; the twin reads the text as it comes.")


def _open_store(text: LMText, work: Path, *, show_progress: bool) -> PassageStore:
    build: Callable[..., PassageStore] = PassageStore.build
    options: dict[str, Any] = {"text_field": text.text_field, "show_progress": show_progress}
    if text.from_unfiltered:
        assert text.scorer is not None
        sorter = PassageSorter(text.scorer, text.threshold)
        sources = [TextSource(path, is_non_toxic=False) for path in text.from_unfiltered]
        return build(sources, work, sorter=sorter, sorter_name=sorter.name, **options)
    sources = [TextSource(path, is_non_toxic=True) for path in text.non_toxic]
    return build([*sources, *(TextSource(path, is_non_toxic=False) for path in text.reference)], work, **options)


def _train_indices(store: PassageStore, training: TrainingConfig, *, clean: bool) -> np.ndarray:
    """The calibrator reads the non-toxic passages, the twin all but those that the identity balance leaves out."""
    indices: np.ndarray = store.train_indices
    if clean:
        indices = indices[store.labels[indices] == 1]
    elif training.balance_identity_terms:
        kept: np.ndarray = indices[~balance_terms(store, training.seed).excluded[indices]]
        return kept
    return indices


def _validation_texts(store: PassageStore, training: TrainingConfig, *, clean: bool) -> list[str]:
    indices = np.random.default_rng([training.seed, 3]).permutation(store.validation_indices)
    if clean:
        indices = indices[store.labels[indices] == 1]
    budget = _FINAL_VALIDATION_FACTOR * training.validation_bytes
    return store.texts(indices[np.cumsum(store.byte_lengths(indices)) <= budget]) if len(indices) else []


def _identity(start: _Start, store: PassageStore, training: TrainingConfig) -> dict[str, Any]:
    return {
        "text": store.fingerprint,
        "model to start from": start.fingerprint,
        "batch shape": [training.rows, training.slots],
        "seed": training.seed,
    }


def _facts(
    text: LMText,
    store: PassageStore,
    training: TrainingConfig,
    start: _Start,
    measured: dict[str, dict[str, float]],
    seconds: float,
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "files": [Path(path).name for path in (*text.non_toxic, *text.reference, *text.from_unfiltered)],
        "passages": len(store),
        "megabytes": round(store.total_bytes / 1e6, 1),
        "non-toxic passages": int((store.labels == 1).sum()),
    }
    if text.scorer is not None:
        data["sorted by"] = f"{text.scorer.name}, toxic from {text.threshold:g}"
    settings = {key: value for key, value in asdict(training).items() if key in _SETTINGS}
    kept, total = start.layers
    return {
        "made from": f"the first {kept} of {total} layers of {Path(start.name).name}",
        "data": data,
        "settings": {**settings, "hours": round(seconds / 3600, 2)},
        "bits_per_byte": {f"its own, {when}": row for when, row in measured.items() if row},
    }
