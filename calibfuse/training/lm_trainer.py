"""Further training of one causal LM of transformers on passages, by plain next-token cross-entropy.

Simpler than trainer.py: one model, its own tokenizer, its own full softmax. A step's batch and random numbers are
functions of the seed and of one cursor, so that a resumed run ends with the weights of an uninterrupted one.

Left out: several processes (a model of this size trains on one device), and losses on a part of a passage.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from calibfuse import hub
from calibfuse.errors import CheckpointError, DataError, InputError
from calibfuse.training.data import PassageStore
from calibfuse.training.mixed_precision import mixed_precision
from calibfuse.training.trainer import TrainingConfig, best_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

STATE_FORMAT = 1
IGNORE = -100
_ENCODE_CHUNK = 16  # passages tokenized at a time
_VALIDATION_ROWS = 8


class LMBatches:
    """Rows of tokens, each passage behind a start mark; a function of the cursor alone.

    Args:
        store: the passages.
        indices: of those to read.
        encode: texts to own ids without special tokens.
        start_id: own id before every passage.
        end_id: own id after every passage; None: the next start mark ends it.
        config: of the training: rows, slots, seed.

    Raises:
        DataError: there is no passage.
    """

    def __init__(
        self,
        store: PassageStore,
        indices: NDArray[np.int64],
        encode: Callable[[Sequence[str]], list[list[int]]],
        *,
        start_id: int,
        end_id: int | None,
        config: TrainingConfig,
    ) -> None:
        if not len(indices):
            raise DataError("None of the training passages is for this model; check the files, or the threshold.")
        self.store, self.indices, self.encode, self.config = store, indices, encode, config
        self.start_id, self.end_id = start_id, end_id
        self.cursor = 0
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def next(self) -> Tensor:
        """int64 [rows, slots]; the passage that the batch cuts does not go on. Advances the cursor."""
        count = self.config.rows * self.config.slots
        ids: list[int] = []
        while len(ids) < count:
            texts = [self.store.text(self._index_at(self.cursor + ahead)) for ahead in range(_ENCODE_CHUNK)]
            for row in self.encode(texts):
                ids += [self.start_id, *row, *([] if self.end_id is None else [self.end_id])]
                self.cursor += 1
                if len(ids) >= count:
                    break
        return torch.tensor(ids[:count]).reshape(self.config.rows, self.config.slots)

    def labels(self, ids: Tensor) -> Tensor:
        """What is to be predicted after each slot but the last, int64 [rows, slots - 1]: IGNORE for a start mark.

        Where the start mark ends a passage as well, it is to be predicted.
        """
        labels = ids[:, 1:].clone()
        return labels if self.end_id is None else labels.masked_fill(labels == self.start_id, IGNORE)

    def _index_at(self, cursor: int) -> int:
        epoch, position = divmod(cursor, len(self.indices))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.config.seed, 5, epoch]).permutation(self.indices)
        return int(self._order[1][position])


class LMTrainer:
    """Trains a causal LM, resumably.

    Args:
        model: changed in place; float32.
        batches: what on.
        config: how; of its fields those for tokenizer pools and negatives are not used.
        folder: gets `checkpoint/` while training; the caller saves the result.
        identity: what a checkpoint must share with this run (text, start, tokenizer), as JSON-ready values.
        label: for the progress bar.
        device: "cpu", "cuda", "mps"; None: the best there is.
        show_progress: show a progress bar.

    Raises:
        InputError: a row is longer than the model can read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: LMBatches,
        config: TrainingConfig,
        folder: str | os.PathLike[str],
        *,
        identity: dict[str, Any],
        label: str = "training",
        device: str | None = None,
        show_progress: bool = True,
    ) -> None:
        longest = getattr(model.config, "max_position_embeddings", None)
        if isinstance(longest, int) and 0 < longest < config.slots:
            raise InputError(f"The model reads at most {longest} tokens, but rows have {config.slots}: lower --slots.")
        self.device = torch.device(device or best_device())
        moved: Any = model
        self.model: PreTrainedModel = moved.to(self.device)
        self.batches, self.config, self.folder, self.identity = batches, config, Path(folder), identity
        self._label, self._show_progress = label, show_progress
        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        matrices = [each for each in self.parameters.values() if each.ndim >= 2]
        vectors = [each for each in self.parameters.values() if each.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.losses: list[float] = []

    def train(self, validate: Callable[[], float] | None = None) -> bool:
        """Run the remaining steps.

        Args:
            validate: gives bits per byte of held-out text, logged on the way.

        Returns:
            True when all steps are done, False when Ctrl-C (or SIGTERM) stopped the run after a checkpoint.

        Raises:
            InputError: the loss is no number.
            CheckpointError: a checkpoint cannot be written.
        """
        config = self.config
        if self.step >= config.steps:
            return True
        began, before = time.monotonic(), self.seconds
        bar = tqdm(
            total=config.steps, initial=self.step, desc=self._label, unit="step", disable=not self._show_progress
        )
        with stop_on_signal() as told, bar:
            smooth = 0.0
            while self.step < config.steps:
                loss = self._train_step()
                smooth = loss if not smooth else 0.98 * smooth + 0.02 * loss
                self.seconds = before + time.monotonic() - began
                bar.set_postfix_str(f"{smooth:.3f} nats/token, {self.tokens / self.seconds:,.0f} tokens/s", False)
                bar.update()
                if told():
                    self.save_checkpoint()
                    return False
                if validate and config.validate_every and self.step % config.validate_every == 0:
                    logger.info("%s, step %d: %.3f bits per byte", self._label, self.step, validate())
                if self.step % config.save_every == 0:
                    self.save_checkpoint()
        self.save_checkpoint()
        return True

    def _train_step(self) -> float:
        config, device = self.config, self.device
        self.model.train()
        ids = self.batches.next()
        labels = self.batches.labels(ids).to(device)
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate_at(self.step)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed * 1_000_003 + self.step)  # dropout
            with mixed_precision(device, config.precision):
                logits = self.model(input_ids=ids.to(device), use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
            loss.backward()  # type: ignore[no-untyped-call]
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(
                f"The loss became {value} at step {self.step}: training has diverged. Resume from the checkpoint in "
                f"{self.folder} with a lower --learning-rate."
            )
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += ids.numel()
        self.losses.append(value)
        return value

    def save_checkpoint(self) -> None:
        """Write weights, optimiser state and position; the former checkpoint is replaced only by a complete one.

        Raises:
            CheckpointError: it cannot be written (disk full); the former checkpoint is still there.
        """
        final, fresh, old = (self.folder / name for name in ("checkpoint", "checkpoint.new", "checkpoint.old"))
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        moments = {
            f"{names[id(parameter)]}|{key}": value
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
        }
        state = {
            "format": STATE_FORMAT,
            "identity": self.identity,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "cursor": self.batches.cursor,
            "losses": self.losses,
        }
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            hub.write_tensors(fresh / "model.safetensors", self.parameters)
            hub.write_tensors(fresh / "optimizer.safetensors", moments)
            (fresh / "state.json").write_text(json.dumps(state), encoding="utf-8")
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(final, old)
            os.replace(fresh, final)
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, CheckpointError) as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if not final.exists() and old.exists():
                os.replace(old, final)
            raise CheckpointError(
                f"The checkpoint of step {self.step} cannot be written to {self.folder}: {error} The one before it is "
                "untouched; free some space and go on with --resume."
            ) from error

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the checkpoint, if there is one."""
        # checkpoint.old: killed between the two renames of save_checkpoint
        places = (self.folder / name for name in ("checkpoint", "checkpoint.old"))
        return next((place for place in places if (place / "state.json").is_file()), None)

    def resume(self) -> None:
        """Load the checkpoint in the folder, where there is one, and go on from there exactly.

        Raises:
            CheckpointError: it is damaged, or belongs to another run.
        """
        place = self.checkpoint
        if place is None:
            return
        state = hub.read_json(place / "state.json", "training state")
        found = state.get("identity")
        if state.get("format") != STATE_FORMAT or found != self.identity:
            known = found if isinstance(found, dict) else {}
            what = next((key for key, value in self.identity.items() if known.get(key) != value), "format")
            raise CheckpointError(
                f"The checkpoint in {self.folder} was made with another {what}; resume with the same inputs, or choose "
                "another --output."
            )
        expected = {name: tuple(each.shape) for name, each in self.parameters.items()}
        weights = hub.read_tensors(place / "model.safetensors", expected=expected)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
        for key, tensor in hub.read_tensors(place / "optimizer.safetensors").items():
            name, _, kind = key.partition("|")
            on_device = kind != "step" or self.optimizer.defaults.get("fused")
            self.optimizer.state[self.parameters[name]][kind] = tensor.to(self.device if on_device else "cpu")
        self.step, self.tokens, self.seconds = int(state["step"]), int(state["tokens"]), float(state["seconds"])
        self.batches.cursor, self.losses = int(state["cursor"]), list(state["losses"])


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel,
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], list[list[int]]],
    *,
    start_id: int,
    slots: int,
) -> float:
    """Bits per byte of texts, each from an empty context, under the model's own tokenization.

    Args:
        model: a causal LM; put into evaluation mode.
        texts: at least one that is not empty.
        encode: texts to own ids without special tokens.
        start_id: own id before every text.
        slots: longest row; what goes beyond is read as a text of its own.

    Returns:
        Nats of all tokens / bytes of all texts / ln 2.

    Raises:
        DataError: there is no text.
    """
    byte_count = sum(len(text.encode()) for text in texts)
    if not byte_count:
        raise DataError("There is no text to measure: expected at least one passage.")
    model.eval()  # type: ignore[no-untyped-call]
    pieces = [row[at : at + slots - 1] for row in encode(texts) for at in range(0, len(row), slots - 1)]
    pieces.sort(key=len)
    nats = 0.0
    for start in range(0, len(pieces), _VALIDATION_ROWS):
        group = [torch.tensor([start_id, *piece]) for piece in pieces[start : start + _VALIDATION_ROWS]]
        ids = torch.nn.utils.rnn.pad_sequence(group, batch_first=True, padding_value=IGNORE).to(model.device)
        # Padding is on the right, where no token that counts sees it.
        logits = model(input_ids=ids.masked_fill(ids == IGNORE, start_id), use_cache=False).logits[:, :-1]
        nats += float(
            functional.cross_entropy(
                logits.float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
            )
        )
    return nats / byte_count / math.log(2)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM are noted, for the caller to finish its step and save; a second one stops at once.

    Yields:
        A function: whether one came.
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    former: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not the main thread: no signals there
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
