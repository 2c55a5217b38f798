"""From text files to a calibrator checkpoint: the whole training run, as `calibfuse train-calibrator` does it."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from calibfuse.calibrator import Calibrator, CalibratorConfig, load_universal
from calibfuse.errors import CheckpointError, InputError
from calibfuse.generation.language_model import choose_device
from calibfuse.guide import CALIBRATOR_HEAD, REFERENCE_HEAD
from calibfuse.textfiles import expand_source
from calibfuse.training.batches import BatchSource
from calibfuse.training.config import TrainingConfig, TrainingText
from calibfuse.training.curves import draw_curves
from calibfuse.training.data import PassageStore
from calibfuse.training.loop import find_checkpoint
from calibfuse.training.tokenizers.pool import DEFAULT_POOL, MAX_SAMPLE_BYTES, PoolSpec, TokenizerPool
from calibfuse.training.trainer import Trainer, process_count
from calibfuse.training.words.balance import TERMS
from calibfuse.training.words.counts import word_shifts
from calibfuse.training.words.protected import LISTED_SHIFT, protected_shifts

logger = logging.getLogger(__name__)

_FINAL_VALIDATION_FACTOR = 4  # the last validation reads more text than those on the way
_LEAST_USUAL_VOCABULARY = 8_000  # smaller ones, and plain bytes, spell names as no target does
_PANELS = {"nats per token": ["calibrator_nats", "reference_nats"], "bits per byte": ["bits_per_byte"]}


def run_training(
    text: TrainingText,
    output: str | os.PathLike[str],
    *,
    training: TrainingConfig | None = None,
    shape: CalibratorConfig | None = None,
    pool_specs: Sequence[PoolSpec] = DEFAULT_POOL,
    pool_folder: str | os.PathLike[str] | None = None,
    init_from: str | os.PathLike[str] | None = None,
    resume: bool = False,
    device: str | None = None,
    facts: dict[str, Any] | None = None,
    show_progress: bool = True,
) -> Path | None:
    """Train a calibrator.

    Args:
        text: what on.
        output: folder of the result; working files go to `work/` inside it.
        training: how; None: the defaults.
        shape: of the model; None: the default, or that of `init_from`.
        pool_specs: tokenizers to train when there is no pool yet.
        pool_folder: an earlier run's pool to use instead of training one.
        init_from: calibrator whose weights to start from (a short run on other text). Its word table is kept: words
            that are counted anew override it.
        resume: go on from the checkpoint in `output`.
        device: "cpu", "cuda" or "mps"; None: the best there is.
        facts: for the model card (name, license, data, ...).
        show_progress: progress bars.

    Returns:
        The output folder, or None when Ctrl-C stopped the run after a checkpoint.

    Raises:
        DataError: text that cannot be used.
        CheckpointError: files that cannot be read or written, or a checkpoint of another run.
        InputError: settings that do not fit together.
    """
    output = Path(output)
    work = output / "work"
    training = training or TrainingConfig()
    # whatever can be wrong is found now, not after minutes of reading
    _check_output(output, work, resume=resume)
    calibrator = _initial_calibrator(shape, init_from, training)
    pool = TokenizerPool.load(pool_folder) if pool_folder is not None else None
    for path, _ in text.sources:
        expand_source(path)
    choose_device(device)
    is_main = int(os.environ.get("RANK", "0")) == 0
    shown = show_progress and is_main
    if is_main:
        logger.info("Training %s steps; a checkpoint goes to %s every %d.", training.steps, work, training.save_every)
        logger.info("Ctrl-C finishes the step and writes one, and resume goes on from it.")
    with _first_process_first():
        store = PassageStore.build(text, work, show_progress=shown)
        pool = pool or _own_pool(store, work, pool_specs, training.seed, show_progress=shown)

    base = calibrator.config
    trainer = Trainer(calibrator, store, pool, training, work, device=device, show_progress=show_progress)
    if resume:
        logger.info("resuming at step %d of %d", trainer.resume(), training.steps)
    finished = trainer.train(trainer.validation_line, validate_every=training.validate_every)
    if trainer.is_main:
        draw_curves(output / "training.svg", trainer.history, _PANELS)
    if not finished or not trainer.is_main:
        return output if finished else None
    figures = trainer.validate(training.validation_bytes * _FINAL_VALIDATION_FACTOR)
    counted = _word_table(trainer.source, calibrator, show_progress=show_progress) if training.word_table else {}
    told = _facts(text, trainer, figures)
    if init_from is not None:
        inherited = len(base.words.keys() - counted.keys())
        told["base"] = _base_facts(base, init_from, training, inherited)
    calibrator.config = replace(base, words={**base.words, **counted}, training={**told, **(facts or {})})
    calibrator.save_pretrained(output)
    return output


def _check_output(output: Path, work: Path, *, resume: bool) -> None:
    """Refuse to begin anew where something is, and to resume where nothing is."""
    begun = find_checkpoint(work) is not None
    if resume and not begun:
        raise CheckpointError(f"There is no checkpoint yet in {output}: run it without resume.")
    if not resume and begun:
        raise CheckpointError(
            f"{output} holds the checkpoint of an earlier run: go on with resume (and more steps if it was finished), "
            "or choose another output folder."
        )
    if not resume and (output / "config.json").exists():
        raise CheckpointError(f"{output} holds a finished calibrator: choose another output folder, or remove it.")


def _initial_calibrator(
    shape: CalibratorConfig | None, init_from: str | os.PathLike[str] | None, training: TrainingConfig
) -> Calibrator:
    if init_from is None:
        if training.heads_only:
            raise InputError("Training the heads only needs a calibrator to start from: give init_from.")
        with torch.random.fork_rng():
            torch.manual_seed(training.seed)
            return Calibrator(shape or CalibratorConfig())
    if shape is not None:
        raise InputError("Give either a shape or init_from: the shape is that of the calibrator to start from.")
    calibrator = load_universal(init_from, why="Training starts from a universal calibrator")
    missing = {CALIBRATOR_HEAD, REFERENCE_HEAD} - set(calibrator.config.heads)
    if missing:
        raise InputError(f"The calibrator {init_from} cannot be trained further: it lacks the heads {sorted(missing)}.")
    return calibrator


def _own_pool(
    store: PassageStore, work: Path, specs: Sequence[PoolSpec], seed: int, *, show_progress: bool
) -> TokenizerPool:
    folder = work / f"pool-{store.fingerprint[:16]}"
    if (folder / "pool.json").is_file():
        return TokenizerPool.load(folder)
    pool = TokenizerPool.train(list(store.sample_texts(MAX_SAMPLE_BYTES, seed)), specs, show_progress=show_progress)
    pool.save(folder)
    return pool


def _word_table(source: BatchSource, calibrator: Calibrator, *, show_progress: bool) -> dict[str, float]:
    """Words that the trained calibrator biases by themselves, and names that it protects: word -> shift, nats."""
    balance = source.balance
    excluded = balance.excluded if balance is not None else None
    words = word_shifts(source.store, flagged_share=source.flagged_share, excluded=excluded)
    if balance is None or not balance.holders:
        return words
    plain = copy.copy(calibrator).eval()  # shares the weights
    plain.config = replace(calibrator.config, words={})
    sizes = {len(entry.vocabulary): entry for entry in source.pool}
    usual = [size for size in sizes if size >= _LEAST_USUAL_VOCABULARY] or list(sizes)
    names = {term: LISTED_SHIFT for term in TERMS if term in balance.holders}
    for size in {max(usual), min(usual)}:
        bound = plain.bind(sizes[size].vocabulary, use_disk_cache=False)
        found = protected_shifts(
            bound, sizes[size], source.store, balance.holders, excluded=excluded, seed=source.config.seed,
            show_progress=show_progress,
        )  # fmt: skip
        names |= {name: max(shift, names.get(name, 0.0)) for name, shift in found.items()}
    logger.info("%d names are protected", len(names))
    return {**words, **dict(sorted(names.items(), key=lambda item: (-item[1], item[0])))}


def _base_facts(
    base: CalibratorConfig, source: str | os.PathLike[str], training: TrainingConfig, inherited_words: int
) -> dict[str, Any]:
    known = base.training
    parts = ["body and token vectors"] if training.heads_only else ["initial weights"]
    return {
        "name": known.get("name") or Path(source).name,
        **{key: known[key] for key in ("license", "data") if key in known},
        "inherited": [*parts, f"{inherited_words} words of its word table"],
    }


def _facts(text: TrainingText, trainer: Trainer, figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    store, told = trainer.store, text.facts()
    return {
        "data": {
            "files": told.pop("files"),
            "passages": len(store),
            "megabytes": round(store.total_bytes / 1e6, 1),
            "wanted passages": int((store.labels == 1).sum()),
            **told,
        },
        "settings": {
            **asdict(trainer.config),
            "tokens": trainer.tokens,
            "hours": round(trainer.seconds / 3600, 2),
            "device": str(trainer.device),
            "tokenizer pool": [entry.name for entry in trainer.pool],
        },
        "bits_per_byte": {
            name: {head: round(row[head], 4) for head in (CALIBRATOR_HEAD, REFERENCE_HEAD) if head in row}
            for name, row in figures.items()
        },
    }


@contextlib.contextmanager
def _first_process_first() -> Iterator[None]:
    """Under `accelerate launch`, let one process per machine read the text; the others find its cache."""
    if process_count() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState(cpu=not torch.cuda.is_available()).local_main_process_first():
        yield
