"""A calibrator from the first layers of a pretrained causal LM, trained further on non-toxic text.

Source: the detoxified pre-training of Tian et al. 2025 (arXiv 2506.01266), whose calibration model has three layers:
here the first K layers of a pretrained model with its embeddings, final norm and output head, trained by next-token
cross-entropy. With unwanted or unfiltered text a reference model is trained in the same way, for mode "contrast"
(docs/guides/any-causal-lm.md).

The result is an ordinary checkpoint of transformers with the model's tokenizer; the reference model lies in
`reference` inside.

Left out: training on the completion of a prompt alone, and adapters.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calibfuse import hub
from calibfuse.errors import InputError, VocabularyError
from calibfuse.generation.language_model import choose_device
from calibfuse.guides.causal_lm import HEADS, CausalLMCalibrator
from calibfuse.guides.lm_checkpoint import ALLOWED_FILES, load_model, load_tokenizer
from calibfuse.training.config import TrainingConfig, TrainingText
from calibfuse.training.data import PassageStore
from calibfuse.training.lm_trainer import LMBatches, LMTrainer, bits_per_byte, check_length
from calibfuse.training.progress import announce, draw_curves, open_output
from calibfuse.training.words.balance import balance_terms
from calibfuse.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

DEFAULT_LEARNING_RATE = 3e-4  # the weights are trained already
_FINAL_VALIDATION_FACTOR = 4  # the last validation reads more text than those on the way
_SETTINGS = (
    "steps", "batch_size", "sequence_length", "learning_rate", "warmup", "decay", "weight_decay",
    "balance_identity_terms", "seed", "precision",
)  # fmt: skip


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
        raise InputError(f"The model {name} has {total} layers; 1 to {total} of them can be kept, got {layer_count}.")
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
    text: TrainingText,
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
        text: what on; without unwanted or unfiltered text there is no reference model.
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
    text.check_files()
    choose_device(device)  # one that is not there is refused now, not after minutes of reading
    output = Path(output)
    work = output / "work"
    open_output(output, [work / head for head in HEADS], resume=resume)
    start = _Start.load(init_from, layer_count, local_files_only=local_files_only)
    check_length(start.model, training)
    announce(output, training)
    store = text.open_store(work, show_progress=show_progress)
    trained: dict[str, _Trained] = {}
    for head in HEADS if text.has_reference else HEADS[:1]:
        trainer, texts = _trainer(start, store, training, work, head, device=device, show_progress=show_progress)
        done = _train(trainer, texts, start, training, head, resume=resume)
        draw_curves(output / f"training-{head}.svg", trainer.history, {"nats per token": ["loss"]})
        if done is None:
            return None
        trained[head] = done
    models = {head: each.model for head, each in trained.items()}
    calibrator = CausalLMCalibrator(
        models[HEADS[0]], start.tokenizer, reference=models.get(HEADS[1]), name=str(init_from)
    )
    known = _facts(text, store, training, start, trained)
    recommended = {} if text.has_reference else {"mode": "geometric"}
    calibrator.config = replace(
        calibrator.config, fusion=recommended, training={**calibrator.config.training, **known, **(facts or {})}
    )
    return calibrator.save_pretrained(output, dtype=torch.bfloat16)


@dataclass(frozen=True)
class _Trained:
    """A trained model on the CPU, bits per byte of held-out text before and after, and how long it took."""

    model: PreTrainedModel
    bits_per_byte: dict[str, float]
    seconds: float


def _train(
    trainer: LMTrainer, texts: list[str], start: _Start, training: TrainingConfig, head: str, *, resume: bool
) -> _Trained | None:
    """Train one model; None when a signal stopped it."""

    def measure(parts: int = _FINAL_VALIDATION_FACTOR) -> float:
        chosen = texts[: len(texts) * parts // _FINAL_VALIDATION_FACTOR] or texts
        length = training.sequence_length
        return bits_per_byte(trainer.model, chosen, start.encode, start_id=start.start_id, sequence_length=length)

    def line() -> str:
        return f"{measure(1):.3f} bits per byte"

    measured = {"at the start": round(measure(), 4)} if texts else {}
    if resume and trainer.checkpoint:
        logger.info("%s: resuming at step %d of %d", head, trainer.resume(), training.steps)
    if not trainer.train(line if texts else None, validate_every=training.validate_every):
        return None
    if texts:
        measured["at the end"] = round(measure(), 4)
        logger.info("%s: %.3f bits per byte of held-out text", head, measured["at the end"])
    cpu: Any = trainer.model
    return _Trained(cpu.to("cpu"), measured, trainer.seconds)


def _trainer(
    start: _Start,
    store: PassageStore,
    training: TrainingConfig,
    work: Path,
    head: str,
    *,
    device: str | None,
    show_progress: bool,
) -> tuple[LMTrainer, list[str]]:
    """What trains the calibrator or its reference, and the texts that measure it."""
    is_clean = head == HEADS[0]
    indices = _train_indices(store, training, clean=is_clean)
    batches = LMBatches(store, indices, start.encode, start_id=start.start_id, end_id=start.end_id, config=training)
    trainer = LMTrainer(
        copy.deepcopy(start.model),
        batches,
        training,
        work / head,
        identity=_identity(start, store, training),
        label=f"training the {head}",
        device=device,
        show_progress=show_progress,
    )
    return trainer, _validation_texts(store, training, clean=is_clean)


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
    if training.sequence_length < 2:
        raise InputError(f"The sequence length must be at least 2, got {training.sequence_length}.")
    if training.flagged_share is not None:
        raise InputError("flagged_share is for universal calibrators; the reference model reads the text as it comes.")


def _train_indices(store: PassageStore, training: TrainingConfig, *, clean: bool) -> np.ndarray:
    """The calibrator reads the wanted passages, the reference model all that the identity balance leaves in."""
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
        "batch shape": [training.batch_size, training.sequence_length],
        "seed": training.seed,
    }


def _facts(
    text: TrainingText,
    store: PassageStore,
    training: TrainingConfig,
    start: _Start,
    trained: Mapping[str, _Trained],
) -> dict[str, Any]:
    settings = {key: value for key, value in asdict(training).items() if key in _SETTINGS}
    kept, total = start.layers
    return {
        "made from": f"the first {kept} of {total} layers of {Path(start.name).name}",
        "data": text.facts(store),
        "settings": {**settings, "hours": round(sum(each.seconds for each in trained.values()) / 3600, 2)},
        "bits_per_byte": {
            f"its own, {when}": {head: each.bits_per_byte[when] for head, each in trained.items()}
            for when in trained[HEADS[0]].bits_per_byte
        },
    }
