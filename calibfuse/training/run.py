"""From text files to a calibrator checkpoint: the whole training run, as `calibfuse train-calibrator` does it.

Order of work: read and sort the text (cached), train or load the tokenizer pool (cached), train the model
(checkpoints), measure it on held-out text, write the checkpoint with its model card.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibfuse.calibrator import Calibrator, CalibratorConfig, load_universal
from calibfuse.errors import CheckpointError, InputError
from calibfuse.guide import CALIBRATOR_HEAD, REFERENCE_HEAD
from calibfuse.training.data import PassageStore, TextSource
from calibfuse.training.sorting import PassageSorter
from calibfuse.training.tokenizers.pool import DEFAULT_POOL, MAX_SAMPLE_BYTES, PoolSpec, TokenizerPool
from calibfuse.training.trainer import Trainer, TrainingConfig, make_calibrator

if TYPE_CHECKING:
    from calibfuse.scorers import ToxicityScorer

logger = logging.getLogger(__name__)

_FINAL_VALIDATION_FACTOR = 4  # the last validation reads more text than those on the way


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """What to train on.

    Attributes:
        non_toxic: files, folders or hf:NAME of non-toxic text.
        reference: likewise, unfiltered text, which only the reference head learns from (in addition to the other).
        from_unfiltered: likewise, unfiltered text that `scorer` sorts into the two.
        scorer: toxicity scorer for `from_unfiltered`.
        threshold: passages that score this or more are kept from the calibrator head.
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
            raise InputError(
                "Give either --from-unfiltered (sorted by a scorer) or --non-toxic with --reference (sorted by "
                "you), not both."
            )
        if not self.from_unfiltered and not (self.non_toxic and self.reference):
            raise InputError(
                "Training needs --non-toxic and --reference files, or --from-unfiltered files that a scorer sorts."
            )
        if self.from_unfiltered and self.scorer is None:
            raise InputError("--from-unfiltered needs a toxicity scorer.")


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
        init_from: calibrator whose weights to start from (a short run on other text).
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
    if not resume and (work / "checkpoint").exists():
        raise CheckpointError(
            f"{output} holds the checkpoint of an earlier run: go on with --resume (more --steps if it was "
            f"finished), or "
            "choose another --output."
        )
    _wait_for_first_process()
    main = int(os.environ.get("RANK", "0")) == 0
    store = _open_store(text, work, show_progress=show_progress and main)
    pool = _open_pool(store, work, pool_specs, pool_folder, training.seed, show_progress=show_progress and main)
    _release_other_processes()

    if training.heads_only and init_from is None:
        raise InputError("Training the heads only needs a calibrator to start from: give --init-from (init_from).")
    calibrator = _initial_calibrator(shape, init_from, training.seed)
    trainer = Trainer(calibrator, store, pool, training, work, device=device, show_progress=show_progress)
    if resume:
        step = trainer.resume()
        logger.info("resuming at step %d of %d", step, training.steps)
    if not trainer.train():
        return None
    if not trainer.is_main:
        return output
    figures = trainer.validate(training.validation_bytes * _FINAL_VALIDATION_FACTOR)
    config = replace(
        calibrator.config,
        words=trainer.source.words(calibrator) if training.mind_words else {},
        training={**_facts(text, store, pool, training, trainer, figures), **(facts or {})},
    )
    calibrator.config = config
    calibrator.save_pretrained(output)
    return output


def _initial_calibrator(
    shape: CalibratorConfig | None, init_from: str | os.PathLike[str] | None, seed: int
) -> Calibrator:
    if init_from is None:
        return make_calibrator(shape or CalibratorConfig(), seed)
    if shape is not None:
        raise InputError("Give either a shape or --init-from: the shape is that of the calibrator to start from.")
    calibrator = load_universal(init_from, why="Training starts from a universal calibrator")
    missing = {CALIBRATOR_HEAD, REFERENCE_HEAD} - set(calibrator.config.heads)
    if missing:
        raise InputError(f"The calibrator {init_from} cannot be trained further: it lacks the heads {sorted(missing)}.")
    return calibrator


def _open_store(text: TrainingText, work: Path, *, show_progress: bool) -> PassageStore:
    if text.from_unfiltered:
        assert text.scorer is not None
        sorter = PassageSorter(text.scorer, text.threshold)
        sources = [TextSource(path, is_non_toxic=False) for path in text.from_unfiltered]
        store = PassageStore.build(
            sources,
            work,
            text_field=text.text_field,
            sorter=sorter,
            sorter_name=sorter.name,
            show_progress=show_progress,
        )
    else:
        sources = [TextSource(path, is_non_toxic=True) for path in text.non_toxic]
        sources += [TextSource(path, is_non_toxic=False) for path in text.reference]
        store = PassageStore.build(sources, work, text_field=text.text_field, show_progress=show_progress)
    clean = int((store.labels == 1).sum())
    logger.info(
        "%s passages, %.1f MB, %.1f %% of them non-toxic",
        f"{len(store):,}",
        store.total_bytes / 1e6,
        100 * clean / len(store),
    )
    return store


def _open_pool(
    store: PassageStore,
    work: Path,
    specs: Sequence[PoolSpec],
    folder: str | os.PathLike[str] | None,
    seed: int,
    *,
    show_progress: bool,
) -> TokenizerPool:
    if folder is not None:
        return TokenizerPool.load(folder)
    # The pool belongs to the text it was trained on; other text in the same folder gets its own.
    own = work / f"pool-{store.fingerprint[:16]}"
    if (own / "pool.json").is_file():
        return TokenizerPool.load(own)
    pool = TokenizerPool.train(list(store.sample_texts(MAX_SAMPLE_BYTES, seed)), specs, show_progress=show_progress)
    pool.save(own)
    return pool


def _facts(
    text: TrainingText,
    store: PassageStore,
    pool: TokenizerPool,
    training: TrainingConfig,
    trainer: Trainer,
    figures: dict[str, dict[str, float]],
) -> dict[str, Any]:
    names = [Path(path).name for path in (*text.non_toxic, *text.reference, *text.from_unfiltered)]
    clean = int((store.labels == 1).sum())
    data: dict[str, Any] = {
        "files": names,
        "passages": len(store),
        "megabytes": round(store.total_bytes / 1e6, 1),
        "non-toxic passages": clean,
    }
    if text.scorer is not None:
        data["sorted by"] = f"{text.scorer.name}, toxic from {text.threshold:g}"
    return {
        "data": data,
        "settings": {
            **asdict(training),
            "tokens": trainer.tokens,
            "hours": round(trainer.seconds / 3600, 2),
            "device": str(trainer.device),
            "tokenizer pool": [entry.name for entry in pool],
        },
        "bits_per_byte": {
            name: {head: round(row[head], 4) for head in (CALIBRATOR_HEAD, REFERENCE_HEAD) if head in row}
            for name, row in figures.items()
        },
    }


def _wait_for_first_process() -> None:
    """Under `accelerate launch`, let one process per machine read the text; the others find its cache."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("LOCAL_RANK", "0")) > 0:
        _barrier()


def _release_other_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        _barrier()


def _barrier() -> None:
    from accelerate import PartialState

    PartialState(cpu=not _has_cuda()).wait_for_everyone()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
