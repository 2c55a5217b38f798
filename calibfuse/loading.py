"""Loading of calibrators: one table of formats, and what every loaded calibrator offers.

A format is told by the entry "format" of config.json; a checkpoint of transformers has a "model_type" instead.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibfuse import hub
from calibfuse.errors import CheckpointError, InputError, reason_of
from calibfuse.guide import Guide
from calibfuse.hub.model_card import PLACEHOLDER, with_metadata
from calibfuse.vocabulary import TokenizerLike

TRANSFORMERS = "transformers"
FORMATS = {
    "calibfuse-calibrator": "calibfuse.calibrator.calibrator:Calibrator",
    TRANSFORMERS: "calibfuse.guides.causal_lm:CausalLMCalibrator",
}


Find = Callable[..., Path]
"""`hub.resolve_checkpoint` with the options that the user gave."""


class PretrainedCalibrator(ABC):
    """What every calibrator offers, whatever its format: binding, files, metadata.

    `config` has `heads`, `fusion` (recommended options), `training` (what is known of it) and `to_dict`.
    """

    config: Any

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
        dtype: torch.dtype | str = torch.float32,
    ) -> PretrainedCalibrator:
        """Load a calibrator of any format.

        Args:
            name_or_path: a local folder, a Hub id, or None for the bundled one. A causal LM of transformers will do
                too.
            reference: of a causal LM, a model of the same vocabulary that becomes the head "reference"; None: the
                folder `reference` of its checkpoint, where there is one.
            revision: branch, tag or commit on the Hub.
            cache_dir: of the Hub's files.
            local_files_only: never touch the network.
            token: Hub token.
            device: default CPU.
            dtype: of the weights in memory.

        Returns:
            The calibrator, in evaluation mode: a `Calibrator`, or for a checkpoint of transformers a
            `CausalLMCalibrator`; both bind in the same way.

        Raises:
            CheckpointError: nothing there, damaged, or not a calibrator.
            InputError: a reference for a calibrator that takes none, or a causal LM that cannot be one.
            CheckpointFormatError: written by a newer calibfuse.
        """
        find = partial(
            hub.resolve_checkpoint,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        device, dtype = as_device(device), as_dtype(dtype) or torch.float32
        folder = find(name_or_path)
        values = hub.read_json(folder / hub.CONFIG_NAME, "configuration of a calibrator")
        name = values.get("format", TRANSFORMERS if "model_type" in values else None)
        if name not in FORMATS:
            found = f"its format is {name!r}" if name is not None else "it has no entry 'format'"
            raise CheckpointError(
                f"Expected the configuration of a calibrator ({', '.join(FORMATS)}) in {str(folder)!r}, but {found}."
            )
        module, _, attribute = FORMATS[name].partition(":")
        kind: type[PretrainedCalibrator] = getattr(importlib.import_module(module), attribute)
        return kind.read(folder, name_or_path, find, reference=reference, device=device, dtype=dtype)

    @classmethod
    @abstractmethod
    def read(
        cls,
        folder: Path,
        name_or_path: str | os.PathLike[str] | None,
        find: Find,
        *,
        reference: str | os.PathLike[str] | None,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> PretrainedCalibrator:
        """Load a checkpoint of this format from `folder`, where `find` has found `name_or_path`."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of the weights; the key of everything derived from them."""

    @abstractmethod
    def bind(
        self,
        tokenizer: TokenizerLike,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        use_disk_cache: bool = True,
    ) -> Guide:
        """Compile the calibrator for one target vocabulary.

        Args:
            tokenizer: whatever `Vocabulary.from_tokenizer` takes.
            dtype: of a universal calibrator's token vectors, float32 (default) or bfloat16, which halves their memory
                at an error of about 0.01 nats; of another calibrator's weights, None: as they are.
            device: where the guide runs; None: where the calibrator is.
            use_disk_cache: keep a universal calibrator's vectors in the cache folder (CALIBFUSE_CACHE, else
                ~/.cache/calibfuse), keyed by the fingerprints of weights and vocabulary.

        Returns:
            The guide; it shares the weights of this object where dtype and device allow.

        Raises:
            VocabularyError: `tokenizer` is no usable tokenizer, or not one that this calibrator can be bound to.
            InputError: a dtype or device that will not do, or a model that cannot be followed token by token.
        """

    @abstractmethod
    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write config.json, the weights and README.md (the model card), and give the folder.

        A complete older checkpoint in it is replaced file by file, config last. Subclasses take `dtype`, that on disk.

        Raises:
            CheckpointError: the files cannot be written (disk full, no permission); nothing half-written is left.
        """

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its parameters, by name."""

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
        """Save into a temporary folder, upload it, and give the repository's address.

        Args:
            repo_id: `organisation/name`; made when missing.
            private: for a new repository; an existing one keeps its visibility.
            revision: branch, made when missing; None: the main one.
            commit_message: of the upload.
            token: Hub token; None: that of the login.
            card: text of README.md; None: the model card. Without metadata of its own it gets those of the model card.

        Raises:
            CheckpointError: the upload failed; the sentence says why.
        """
        with tempfile.TemporaryDirectory() as folder:
            place = self.save_pretrained(folder)
            readme = place / hub.README_NAME
            generated = readme.read_text(encoding="utf-8")
            text = generated if card is None else with_metadata(card, generated)
            readme.write_text(text.replace(PLACEHOLDER, repo_id), encoding="utf-8")
            return hub.upload_folder(
                place, repo_id, private=private, revision=revision, commit_message=commit_message, token=token
            )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and reports back; what matters of them is raised as an error."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    verbosity: int = logging.get_verbosity()
    had_bar, shows_downloads = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if shows_downloads:
        enable_progress_bars()  # transformers turns them off too, and a download may take minutes
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by itself or by its name, as transformers takes it; InputError where there is none."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is not None and not isinstance(found, torch.dtype) or (found is None and dtype is not None):
        raise InputError(f"dtype must be one of torch's, such as torch.bfloat16 or 'bfloat16', got {dtype!r}.")
    return found


def as_device(device: torch.device | str | None) -> torch.device | None:
    """A device by itself or by its name; InputError where there is none, or it cannot be used."""
    try:
        found = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device must be one of torch's, such as 'cpu' or 'cuda:0', got {device!r}.") from error
    try:
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"The device {device!r} cannot be used here: {reason_of(error)}.") from error
    return found
