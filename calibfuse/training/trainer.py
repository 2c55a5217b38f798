"""The training loop: steps, schedule, checkpoints, exact resume, several processes.

Own loop rather than transformers' Trainer: it is as fast, needs no further package on one process, and its state is a
few arrays that can be written without pickle. Under `accelerate launch` every process packs the same global batch and
works on its share of the rows, so the loss curve does not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from calibfuse import hub
from calibfuse.bits_per_byte import measure_fidelity
from calibfuse.calibrator import Calibrator, CalibratorConfig
from calibfuse.errors import CheckpointError, DataError, InputError, MissingDependencyError
from calibfuse.guide import CALIBRATOR_HEAD, REFERENCE_HEAD
from calibfuse.training.batches import BatchVocabulary, TrainingBatch, make_batch, pack_rows
from calibfuse.training.data import PassageStore
from calibfuse.training.mixed_precision import mixed_precision
from calibfuse.training.objective import Losses, TrainingObjective
from calibfuse.training.tokenizers.pool import PoolEntry, TokenizerPool
from calibfuse.training.words.balance import TERMS, balance_terms
from calibfuse.training.words.counts import word_shifts
from calibfuse.training.words.neutral_sentences import neutral_passage
from calibfuse.training.words.protected import LISTED_SHIFT, spared_shifts

logger = logging.getLogger(__name__)

STATE_FORMAT = 1
_ENCODE_CHUNK = 16  # passages tokenized at a time
_NEGATIVES_SAMPLE_BYTES = 8_000_000
_LEAST_USUAL_VOCABULARY = 8_000  # smaller ones, and plain bytes, spell names as no target does


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train.

    Attributes:
        steps: optimiser steps in all.
        rows: rows of a batch, over all processes.
        slots: tokens of a row.
        learning_rate: peak.
        warmup: share of the steps in which the rate rises from 0.
        decay: share of the steps, at the end, in which the rate falls to 0. In between it is constant, so that a
            run can be resumed with fewer steps to make it end sooner, or with more.
        weight_decay: of the body's matrices; the hashed table has none.
        reference_weight: weight of the reference head's loss.
        flagged_share: share of the passages drawn from those that only the reference sees; None: as they come.
        balance_identity_terms: leave out flagged passages until the names of groups of people, and other names that
            are much argued about (names.py), are flagged no more often than other words; see balance.py.
        mind_words: let the calibrator also mind words by themselves, and spare those names, in whatever pieces a
            vocabulary spells them; see word_counts.py and spared_words.py.
        neutral_share: share of passages that are made: neutral sentences which name groups of people, read alike by
            both heads; see neutral_sentences.py.
        heads_only: leave body and token vectors as they are, and train the heads and their biases: for weights that
            were trained before, when the text is sorted anew. Half the time a step.
        candidate_count: tokens of the softmax subset.
        vocabulary_size: size to which the vocabularies of the pool are filled up with negatives.
        split_rate: share of tokens cut in two, on every second batch, in place of BPE dropout.
        seed: of initial weights, order and draws.
        save_every: steps between checkpoints.
        validate_every: steps between validations; 0: only at the end.
        validation_bytes: text of each validation, per tokenizer.
        precision: "bf16" or "fp32".
    """

    steps: int = 4000
    rows: int = 12
    slots: int = 192
    learning_rate: float = 3e-3
    warmup: float = 0.02
    decay: float = 0.4
    weight_decay: float = 0.05
    reference_weight: float = 1.0
    flagged_share: float | None = None
    balance_identity_terms: bool = True
    mind_words: bool = True
    neutral_share: float = 0.02
    heads_only: bool = False
    candidate_count: int = 2560
    vocabulary_size: int = 100_000
    split_rate: float = 0.05
    seed: int = 0
    save_every: int = 500
    validate_every: int = 1000
    validation_bytes: int = 30_000
    precision: str = "bf16"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value is out of range.
        """
        for name in ("steps", "rows", "slots", "candidate_count", "vocabulary_size", "save_every", "validation_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("warmup", "decay", "split_rate", "neutral_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"learning_rate must be a positive number, got {self.learning_rate}.")
        if self.flagged_share is not None and not 0.0 <= self.flagged_share < 1.0:
            raise InputError(f"flagged_share must be in [0, 1), got {self.flagged_share}.")
        if self.precision not in ("bf16", "fp32"):
            raise InputError(f"precision must be 'bf16' or 'fp32', got {self.precision!r}.")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: rises, stays, falls to 0 over the last `decay` share."""
        warmup_steps = max(1.0, self.warmup * self.steps)
        decay_steps = max(1.0, self.decay * self.steps)
        left = max(0.0, min(1.0, (self.steps - step) / decay_steps))
        return self.learning_rate * min(1.0, (step + 1) / warmup_steps) * left


class BatchSource:
    """Endless training batches, as a function of the seed and a small state.

    Args:
        store: the passages.
        pool: the tokenizers.
        config: of the training.
        bucket_count: rows of the composer's table.
        show_progress: show a progress bar while vocabularies are prepared.
    """

    def __init__(
        self,
        store: PassageStore,
        pool: TokenizerPool,
        config: TrainingConfig,
        bucket_count: int,
        *,
        show_progress: bool = True,
    ) -> None:
        self.store, self.pool, self.config = store, pool, config
        self.balance = balance_terms(store, config.seed) if config.balance_identity_terms else None
        labels = store.labels[store.train_indices]
        if self.balance is not None:
            labels = labels[~self.balance.excluded[store.train_indices]]
        self._shares = {1: int((labels == 1).sum()), 0: int((labels == 0).sum())}
        if not self._shares[1]:
            raise DataError(
                "None of the training passages is non-toxic, so there is nothing for the calibrator to learn from. "
                "Check the "
                "--non-toxic files, or the scorer's threshold."
            )
        if not self._shares[0]:
            logger.warning(
                "No passage is toxic or unfiltered: the two heads will learn the same, and contrast do nothing."
            )
        self.cursors = {1: 0, 0: 0}
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._show_progress = show_progress
        sample = list(store.sample_texts(_NEGATIVES_SAMPLE_BYTES, config.seed))
        negatives = pool.negatives(config.vocabulary_size, sample, config.seed)
        self.vocabularies = [
            BatchVocabulary(
                entry.extended_vocabulary(negatives, config.vocabulary_size),
                entry.unigram_counts,
                bucket_count=bucket_count,
                candidate_count=config.candidate_count,
            )
            for entry in tqdm(
                pool, desc="preparing vocabularies", unit="tokenizer", leave=False, disable=not show_progress
            )
        ]

    def batch(self, step: int) -> TrainingBatch:
        """The batch of a step; advances the cursors."""
        config = self.config
        rng = np.random.default_rng([config.seed, 1, step])
        index = self.pool.draw(rng)
        passages = self._passages(self.pool[index], rng, split=rng.random() < 0.5)
        ids, flags = pack_rows(passages, rows=config.rows, slots=config.slots)
        return make_batch(ids, flags, self.vocabularies[index], rng)

    def words(self, calibrator: Calibrator) -> dict[str, float]:
        """Words that the trained `calibrator` minds by themselves, and names that it spares: word -> shift, nats."""
        excluded = self.balance.excluded if self.balance is not None else None
        minded = word_shifts(self.store, flagged_share=self._flagged_share, excluded=excluded)
        return {**minded, **self._spared_names(calibrator)}

    def _spared_names(self, calibrator: Calibrator) -> dict[str, float]:
        """The larger shift of two vocabularies, one that spells most names in one token and one that does not.

        Listed groups get LISTED_SHIFT at least.
        """
        if self.balance is None or not self.balance.holders:
            return {}
        plain = copy.copy(calibrator).eval()  # shares the weights
        plain.config = replace(calibrator.config, words={})
        sizes = {len(entry.vocabulary): entry for entry in self.pool}
        usual = [size for size in sizes if size >= _LEAST_USUAL_VOCABULARY] or list(sizes)
        spared = {term: LISTED_SHIFT for term in TERMS if term in self.balance.holders}
        for size in {max(usual), min(usual)}:
            bound = plain.bind(sizes[size].vocabulary, use_disk_cache=False)
            found = spared_shifts(
                bound, sizes[size], self.store, self.balance.holders, excluded=self.balance.excluded,
                seed=self.config.seed, show_progress=self._show_progress,
            )  # fmt: skip
            spared |= {name: max(shift, spared.get(name, 0.0)) for name, shift in found.items()}
        logger.info("%d names are given something back", len(spared))
        return dict(sorted(spared.items(), key=lambda item: (-item[1], item[0])))

    def _passages(
        self, entry: PoolEntry, rng: np.random.Generator, *, split: bool
    ) -> Iterator[tuple[Sequence[int], bool]]:
        """Tokenized passages; a passage counts as used when it is taken."""
        while True:
            drawn: list[tuple[int, bool]] = []
            texts: list[str] = []
            ahead = dict(self.cursors)
            for _ in range(_ENCODE_CHUNK):
                label = self._draw_label(rng)
                is_made = rng.random() < self.config.neutral_share
                drawn.append((label, is_made))
                if is_made:
                    texts.append(neutral_passage(rng))
                    continue
                texts.append(self.store.text(self._index_at(label, ahead[label])))
                ahead[label] += 1
            rows = entry.encode_batch(texts, split_rate=self.config.split_rate if split else 0.0, rng=rng)
            for (label, is_made), row in zip(drawn, rows, strict=True):
                self.cursors[label] += not is_made
                yield row, label == 1

    def _draw_label(self, rng: np.random.Generator) -> int:
        if not self._shares[0]:
            return 1
        return 0 if rng.random() < self._flagged_share else 1

    @property
    def _flagged_share(self) -> float:
        """Share of the passages that are drawn from those that only the reference reads."""
        if self.config.flagged_share is not None:
            return self.config.flagged_share
        return self._shares[0] / (self._shares[0] + self._shares[1])

    def _index_at(self, label: int, cursor: int) -> int:
        epoch, position = divmod(cursor, self._shares[label])
        if self._orders.get(label, (-1, None))[0] != epoch:
            order = self.store.permutation(epoch, self.config.seed, label)
            if self.balance is not None:
                order = order[~self.balance.excluded[order]]
            self._orders[label] = (epoch, order)
        return int(self._orders[label][1][position])


class Trainer:
    """Trains a calibrator, resumably.

    Args:
        calibrator: with fresh or earlier weights.
        store: the passages.
        pool: the tokenizers.
        config: how.
        folder: gets `checkpoint/` while training; the caller saves the result.
        device: "cpu", "cuda", "mps"; None: the best there is.
        show_progress: show a progress bar.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        store: PassageStore,
        pool: TokenizerPool,
        config: TrainingConfig,
        folder: str | os.PathLike[str],
        *,
        device: str | None = None,
        show_progress: bool = True,
    ) -> None:
        self.config, self.store, self.pool = config, store, pool
        self.folder = Path(folder)
        self._accelerator = _accelerator(config)
        self.device = self._accelerator.device if self._accelerator else torch.device(device or best_device())
        self.calibrator = calibrator.to(self.device)
        self._show_progress = show_progress and self.is_main
        self.source = BatchSource(
            store, pool, config, calibrator.config.bucket_count, show_progress=self._show_progress
        )
        if config.heads_only:
            for name, parameter in self.calibrator.named_parameters():
                # of the table, the objective lets gradients through to the heads' biases only
                parameter.requires_grad_(name.startswith("heads.") or name == "composer.table")
        self.objective: torch.nn.Module = TrainingObjective(
            self.calibrator, reference_weight=config.reference_weight, heads_only=config.heads_only
        )
        self.optimizer = _optimizer(self.calibrator, config)
        if self._accelerator:
            self.objective = self._accelerator.prepare(self.objective)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self._interrupted = False
        self._bytes_scored = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self._accelerator is None or bool(self._accelerator.is_main_process)

    def train(self) -> bool:
        """Run the remaining steps.

        Returns:
            True when all steps are done, False when Ctrl-C (or SIGTERM) stopped the run after a checkpoint.
        """
        with (
            self._stop_on_signal(),
            tqdm(
                total=self.config.steps,
                initial=self.step,
                desc="training",
                unit="step",
                disable=not self._show_progress,
            ) as bar,
        ):
            began, began_seconds = time.monotonic(), self.seconds
            smooth: dict[str, float] = {}
            while self.step < self.config.steps:
                losses = self._train_step()
                self.step += 1
                self.tokens += self.config.rows * self.config.slots
                self.seconds = began_seconds + time.monotonic() - began
                row = self._record(losses)
                for key, value in row.items():
                    smooth[key] = value if key not in smooth else 0.98 * smooth[key] + 0.02 * value
                if self.step % 10 == 0:
                    bar.set_postfix_str(
                        f"loss {smooth['loss']:.3f}, {smooth['bits_per_byte']:.3f} bits/byte, "
                        f"{self.tokens / self.seconds:,.0f} tokens/s",
                        refresh=False,
                    )
                bar.update()
                if self._stopping():
                    self.save_checkpoint()
                    return False
                if self.config.validate_every and self.step % self.config.validate_every == 0 and self.is_main:
                    logger.info("step %d: %s", self.step, self._validation_line())
                if self.step % self.config.save_every == 0:
                    self.save_checkpoint()
        self.save_checkpoint()
        return True

    def _train_step(self) -> Losses:
        config = self.config
        self.objective.train()
        batch = self.source.batch(self.step)
        self._bytes_scored = batch.target_bytes
        if self._accelerator:
            share = config.rows // self._accelerator.num_processes
            first = share * self._accelerator.process_index
            batch = batch.rows(first, first + share)
        rate = config.rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with mixed_precision(self.device, config.precision):
            losses: Losses = self.objective(batch.to(self.device))
        if self._accelerator:
            self._accelerator.backward(losses.total)
        else:
            losses.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.calibrator.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    def _record(self, losses: Losses) -> dict[str, float]:
        values = torch.stack([losses.total.detach(), losses.calibrator, losses.reference, losses.tokens.float()])
        tokens = float(values[3])
        if self._accelerator:
            values = self._accelerator.reduce(values, reduction="mean")
            tokens *= self._accelerator.num_processes
        total, calibrator, reference = values[:3].tolist()
        if not math.isfinite(total):
            raise InputError(
                f"The loss became {total} at step {self.step}: training has diverged. Resume from the checkpoint in "
                f"{self.folder} with a lower --learning-rate."
            )
        row = {
            "step": self.step,
            "loss": total,
            "calibrator_nats": calibrator,
            "reference_nats": reference,
            "bits_per_byte": reference * tokens / max(1, self._bytes_scored) / math.log(2),
        }
        self.history.append(row)
        return row

    def validate(self, byte_budget: int | None = None) -> dict[str, dict[str, float]]:
        """Bits per byte of held-out text per tokenizer of the pool.

        Args:
            byte_budget: text for each tokenizer; default `validation_bytes`.

        Returns:
            Name of the tokenizer -> "calibrator" (on non-toxic passages) and "reference" (on all) bits per byte, and
            "vocabulary" (size).
        """
        budget = byte_budget or self.config.validation_bytes
        indices = np.random.default_rng([self.config.seed, 3]).permutation(self.store.validation_indices)
        # The same passages for every tokenizer, or the figures could not be compared.
        indices = indices[np.cumsum(self.store.byte_lengths(indices)) <= budget] if len(indices) else indices
        if not len(indices):
            return {}
        clean = [int(index) for index in indices if self.store.label(int(index))]
        result: dict[str, dict[str, float]] = {}
        self.calibrator.eval()
        for entry in self.pool:
            bound = self.calibrator.bind(entry.vocabulary, use_disk_cache=False)
            row = {"vocabulary": float(len(entry.vocabulary))}
            for head, chosen in ((CALIBRATOR_HEAD, clean), (REFERENCE_HEAD, indices)):
                if len(chosen):
                    ids = entry.encode_batch(self.store.texts(int(index) for index in chosen))
                    row[head] = measure_fidelity(bound, ids, head=head).bits_per_byte
            result[entry.name] = row
        return result

    def _validation_line(self) -> str:
        figures = self.validate()
        return ", ".join(f"{name} {row.get(REFERENCE_HEAD, math.nan):.3f}" for name, row in figures.items())

    def save_checkpoint(self) -> None:
        """Write weights, optimiser state and position; the former checkpoint is replaced only by a complete one.

        Raises:
            CheckpointError: it cannot be written (disk full); the former checkpoint is still there.
        """
        if self._accelerator:
            self._accelerator.wait_for_everyone()
        if not self.is_main:
            return
        final, fresh = self.folder / "checkpoint", self.folder / "checkpoint.new"
        old = self.folder / "checkpoint.old"
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            tensors = {
                name: tensor.detach().cpu().contiguous() for name, tensor in self.calibrator.state_dict().items()
            }
            hub.write_tensors(fresh / "model.safetensors", tensors)
            hub.write_tensors(fresh / "optimizer.safetensors", self._optimizer_tensors())
            state = {
                "format": STATE_FORMAT,
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "cursors": {str(key): value for key, value in self.source.cursors.items()},
                "history": self.history,
                "training": asdict(self.config),
                "calibrator": self.calibrator.config.to_dict(),
                "store": self.store.fingerprint,
                "pool": self.pool.fingerprint,
            }
            (fresh / "state.json").write_text(json.dumps(state), encoding="utf-8")
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(final, old)
            os.replace(fresh, final)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if not final.exists() and old.exists():
                os.replace(old, final)
            raise CheckpointError(
                f"The checkpoint of step {self.step} cannot be written to {self.folder}: {error.strerror or error}. "
                f"The "
                "one before it is untouched; free some space and go on with --resume."
            ) from error

    def resume(self) -> int:
        """Load the checkpoint in the folder and go on from there exactly.

        Returns:
            The step.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to other text, tokenizers or settings.
        """
        folder = self.folder / "checkpoint"
        if not folder.exists() and (self.folder / "checkpoint.old").exists():
            folder = self.folder / "checkpoint.old"  # killed between the two renames of save_checkpoint
        state = hub.read_json(folder / "state.json", "training state")
        for what, found, here in (
            ("text", state.get("store"), self.store.fingerprint),
            ("tokenizer pool", state.get("pool"), self.pool.fingerprint),
            (
                "calibrator shape",
                _without_facts(state.get("calibrator", {})),
                _without_facts(self.calibrator.config.to_dict()),
            ),
        ):
            if found != here:
                raise CheckpointError(
                    f"The checkpoint in {self.folder} was made with another {what}; resume with the same inputs, or "
                    f"choose "
                    "another --output."
                )
        expected = {name: tuple(tensor.shape) for name, tensor in self.calibrator.state_dict().items()}
        tensors = hub.read_tensors(folder / "model.safetensors", expected=expected)
        self.calibrator.load_state_dict(tensors)
        self._load_optimizer(hub.read_tensors(folder / "optimizer.safetensors"))
        self.step, self.tokens, self.seconds = int(state["step"]), int(state["tokens"]), float(state["seconds"])
        self.source.cursors = {int(key): int(value) for key, value in state["cursors"].items()}
        self.history = list(state["history"])
        return self.step

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        names = {id(parameter): name for name, parameter in self.calibrator.named_parameters()}
        tensors = {}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                tensors[f"{names[id(parameter)]}|{key}"] = value.detach().cpu().contiguous().clone()
        return tensors

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        parameters = dict(self.calibrator.named_parameters())
        for name, tensor in tensors.items():
            parameter_name, _, key = name.partition("|")
            parameter = parameters[parameter_name]
            if key == "step":
                is_fused = self.optimizer.defaults.get("fused")
                self.optimizer.state[parameter][key] = tensor.to(parameter.device if is_fused else "cpu")
                continue
            # The fused kernel walks through memory: moments must lie there as the parameter does, which
            # `lay_out_for_decoding` may have stored by columns.
            moment = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
            self.optimizer.state[parameter][key] = moment.copy_(tensor)

    def _stopping(self) -> bool:
        """Whether some process was told to stop; all processes agree."""
        if not self._accelerator:
            return self._interrupted
        flag = torch.tensor(float(self._interrupted), device=self.device)
        return float(self._accelerator.reduce(flag, reduction="sum")) > 0

    @contextlib.contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM finish the step and save; a second one stops at once."""

        def stop(number: int, frame: object) -> None:
            self._interrupted = True
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

        former: dict[signal.Signals, Callable[..., Any] | int | None] = {}
        with contextlib.suppress(ValueError):  # not the main thread: no signals there
            for number in (signal.SIGINT, signal.SIGTERM):
                former[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for signal_number, handler in former.items():
                signal.signal(signal_number, handler)


def best_device() -> str:
    """The device that training uses when none is named: "cuda", "mps" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def make_calibrator(config: CalibratorConfig, seed: int) -> Calibrator:
    """A calibrator with fresh weights that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Calibrator(config)


def _accelerator(config: TrainingConfig) -> Any | None:  # noqa: ANN401
    """An Accelerator when the process was started as one of several, else None."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return None
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingDependencyError(
            f"Training on {processes} processes needs accelerate: pip install 'calibfuse[train]'."
        ) from error
    if config.rows % processes:
        raise InputError(f"rows ({config.rows}) must be a multiple of the number of processes ({processes}).")
    return Accelerator(cpu=not torch.cuda.is_available())


def _optimizer(calibrator: Calibrator, config: TrainingConfig) -> torch.optim.AdamW:
    trained = [(name, p) for name, p in calibrator.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim == 2 and name != "composer.table"]
    others = [p for name, p in trained if not (p.ndim == 2 and name != "composer.table")]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # The fused kernel is several times faster on the large table; it exists on CPU and CUDA.
    fused = all(p.device.type in ("cpu", "cuda") for p in calibrator.parameters())
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-8, fused=fused)


def _without_facts(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("fusion", "training")}
