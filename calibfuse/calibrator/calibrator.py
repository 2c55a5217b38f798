"""Calibrator: the universal calibrator as users see it: the network, its binding to vocabularies, its files."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from calibfuse import hub
from calibfuse.calibrator.binding import BoundCalibrator, compose_vocabulary
from calibfuse.calibrator.bound_files import bound_path, load_bound, save_bound, vocabulary_of
from calibfuse.calibrator.model import FORMAT_VERSION, CalibratorConfig, CalibratorNetwork
from calibfuse.calibrator.word_bias import WordBias
from calibfuse.errors import CheckpointError, InputError
from calibfuse.hub.model_card import calibrator_card
from calibfuse.loading import Find, PretrainedCalibrator, as_device, as_dtype
from calibfuse.vocabulary import TokenizerLike

FORMAT_NAME = "calibfuse-calibrator"


class Calibrator(CalibratorNetwork, PretrainedCalibrator):
    """The universal calibrator; weights are freshly initialised from torch's global random state."""

    config: CalibratorConfig

    def bind(
        self,
        tokenizer: TokenizerLike,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        use_disk_cache: bool = True,
    ) -> BoundCalibrator:
        dtype = as_dtype(dtype) or torch.float32
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"Bound vectors can be float32, bfloat16 or float16, got dtype={dtype}.")
        vocabulary, config = vocabulary_of(tokenizer, use_disk_cache=use_disk_cache), self.config
        path, tensors = None, None
        if use_disk_cache:
            path = bound_path(self.fingerprint, vocabulary, dtype, FORMAT_VERSION)
            tensors = load_bound(path, (len(vocabulary), config.token_width), (len(vocabulary), len(config.heads)))
        words = WordBias(config.words, vocabulary)
        vectors, biases = tensors or compose_vocabulary(self, vocabulary, dtype, words)
        if tensors is None:
            save_bound(path, vectors, biases)
        bound = BoundCalibrator(self, vocabulary, vectors, biases, words)
        return bound.to(as_device(device) or self.boundary.device)

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.bfloat16) -> Path:
        config = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **self.config.to_dict()}
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        lowered = sum(bias < 0.0 for bias in self.config.words.values())
        counts = {"biased_words_and_beginnings": lowered, "protected_names": len(self.config.words) - lowered}
        words = {name: count for name, count in counts.items() if count}
        card = calibrator_card({**config["training"], **words, "fusion": config["fusion"]})
        hub.write_checkpoint(Path(folder), config=config, tensors=tensors, files={"README.md": card})
        return Path(folder)

    @classmethod
    def read(
        cls,
        folder: Path,
        name_or_path: str | os.PathLike[str] | None,
        find: Find,
        *,
        reference: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Calibrator:
        if reference is not None:
            raise InputError(
                f"reference= is for causal language models of transformers; the universal calibrator in "
                f"{str(folder)!r} has its reference as a head of its own."
            )
        values = hub.read_config(folder, format_name=FORMAT_NAME, supported_version=FORMAT_VERSION)
        try:
            config = CalibratorConfig.from_dict(
                {key: value for key, value in values.items() if key not in ("format", "format_version")}
            )
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
    """`Calibrator.from_pretrained` where no other format will do; `why` begins the message of the InputError."""
    loaded = Calibrator.from_pretrained(name_or_path, local_files_only=local_files_only)
    if not isinstance(loaded, Calibrator):
        raise InputError(f"{why} (format {FORMAT_NAME}), and {str(name_or_path)!r} is a {type(loaded).__name__}.")
    return loaded
