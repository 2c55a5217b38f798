"""Calibrator: the universal calibrator as users see it: the network, its binding to vocabularies, its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from calibfuse import hub
from calibfuse.calibrator.binding import BoundCalibrator, bind
from calibfuse.calibrator.model import FORMAT_VERSION, CalibratorConfig, CalibratorNetwork
from calibfuse.errors import CheckpointError, InputError
from calibfuse.hub.model_card import calibrator_card
from calibfuse.loading import PretrainedCalibrator, Source, load_calibrator
from calibfuse.vocabulary import TokenizerLike

FORMAT_NAME = "calibfuse-calibrator"


class Calibrator(CalibratorNetwork, PretrainedCalibrator):
    """The universal calibrator.

    Args:
        config: its shape; weights are freshly initialised from torch's global random state.
    """

    config: CalibratorConfig

    def bind(
        self,
        tokenizer: TokenizerLike,
        *,
        dtype: torch.dtype | str | None = None,
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
        lowered = sum(bias < 0.0 for bias in self.config.words.values())
        counts = {"biased_words_and_beginnings": lowered, "protected_names": len(self.config.words) - lowered}
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
        dtype: torch.dtype | str = torch.float32,
    ) -> PretrainedCalibrator:
        """Load a calibrator of any format.

        Args:
            name_or_path: a local folder, a Hub id, or None for the bundled one. A causal LM of transformers will do
                too, and so will a value guide of `calibfuse train-guide`.
            reference: of a causal LM, a model of the same vocabulary that becomes the head "reference".
            revision: branch, tag or commit on the Hub.
            cache_dir: of the Hub's files.
            local_files_only: never touch the network.
            token: Hub token.
            device: default CPU.
            dtype: of the weights in memory.

        Returns:
            The calibrator, in evaluation mode: a `Calibrator`, or for a checkpoint of transformers a
            `CausalLMCalibrator`, or a `ValueLM`; all of them bind in the same way.

        Raises:
            CheckpointError: nothing there, damaged, or not a calibrator.
            InputError: a reference for a universal calibrator, or a causal LM that cannot be one.
            CheckpointFormatError: written by a newer calibfuse.
        """
        source = Source(
            name_or_path=name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        return load_calibrator(source, reference=reference, device=device, dtype=dtype)

    @classmethod
    def read(
        cls,
        folder: Path,
        source: Source,
        *,
        reference: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Calibrator:
        """See `PretrainedCalibrator.read`."""
        if reference is not None:
            raise InputError(
                f"reference= is for causal language models of transformers; the universal calibrator in "
                f"{str(folder)!r} has its reference as a head of its own."
            )
        values: dict[str, Any] = hub.read_config(folder, format_name=FORMAT_NAME, supported_version=FORMAT_VERSION)
        values = {key: value for key, value in values.items() if key not in ("format", "format_version")}
        try:
            config = CalibratorConfig.from_dict(values)
        except InputError as error:
            raise CheckpointError(f"The config of the calibrator in {folder} is not valid: {error}") from error
        with torch.device("meta"):
            model = cls(config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tensors = hub.read_tensors(folder / hub.WEIGHTS_NAME, expected=expected)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
        model.lay_out_for_decoding()
        return model.to(device or "cpu").eval()


def load_universal(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    local_files_only: bool = False,
    why: str = "This needs a universal calibrator",
) -> Calibrator:
    """Load a universal calibrator where no other format will do.

    Args:
        name_or_path: see `Calibrator.from_pretrained`.
        local_files_only: never touch the network.
        why: begins the message.

    Raises:
        InputError: it is of another format.
        CheckpointError: it cannot be loaded.
    """
    loaded = Calibrator.from_pretrained(name_or_path, local_files_only=local_files_only)
    if not isinstance(loaded, Calibrator):
        raise InputError(f"{why} (format {FORMAT_NAME}), and {str(name_or_path)!r} is a {type(loaded).__name__}.")
    return loaded
