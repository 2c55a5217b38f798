"""Alignment: the matrix A that maps a calibrator's states into one target's hidden space (mode "embedding").

It lies in `alignments/<key>/` beside the calibrator, or in the cache folder, and is told by the vocabulary, the hidden
size and a sketch of the target's embeddings, not by a name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibfuse import hub
from calibfuse.calibrator.binding import BoundCalibrator, GuideStates
from calibfuse.calibrator.bound_files import cache_folder
from calibfuse.errors import (
    CheckpointError,
    InputError,
    MissingHeadError,
    VocabularyMismatchError,
)
from calibfuse.guide import CALIBRATOR_HEAD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calibfuse.guide import Guide, NextTokenScores
    from calibfuse.vocabulary import Vocabulary

FORMAT_NAME = "calibfuse-alignment"
FORMAT_VERSION = 1
FOLDER = "alignments"
METADATA_FILE = "alignment.json"
WEIGHTS_FILE = "alignment.safetensors"

_SKETCH_TOKENS, _SKETCH_CHANNELS = 32, 64
# A fine-tuned model keeps its base's sketch to about 0.99; two models trained apart have about 0.
_SAME_MODEL = 0.9


@dataclass(frozen=True, kw_only=True)
class AlignmentMetadata:
    """What an alignment was made for and how."""

    target: str  # its name, for people
    calibrator_fingerprint: str  # of the weights
    vocabulary_fingerprint: str  # of the target's vocabulary
    width: int  # of the calibrator's states
    hidden_size: int  # of the target
    common_tokens: int  # with an embedding on both sides
    held_out_tokens: int  # of these, kept from training
    epochs: int
    seed: int
    held_out_loss: float | None  # cross-entropy of the held-out tokens, in nats


@dataclass(frozen=True, eq=False)
class Alignment:
    """The matrix with its metadata."""

    matrix: Tensor  # A, float32 [width, hidden_size], CPU
    sketch: Tensor  # float32, a few numbers of the target's embeddings, by which the target is known again
    metadata: AlignmentMetadata

    @property
    def key(self) -> str:
        """Name of its folder: a digest of calibrator, vocabulary and target."""
        made_for, digest = self.metadata, hashlib.sha256()
        # "input": of what embeddings, where earlier files had a choice
        for part in (made_for.calibrator_fingerprint, made_for.vocabulary_fingerprint, "input", made_for.hidden_size):
            digest.update(f"{part}\0".encode())
        digest.update(self.sketch.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write it into `folder`/alignments/<key>/, where one for the same target is replaced; gives that folder."""
        place = Path(folder).expanduser() / FOLDER / self.key
        hub.write_checkpoint(
            place,
            config={"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **asdict(self.metadata)},
            tensors={"matrix": self.matrix, "sketch": self.sketch},
            names=(WEIGHTS_FILE, METADATA_FILE),
        )
        return place

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Alignment:
        """Read the two files of a folder; a CheckpointError where they are missing, damaged, or no alignment."""
        values = hub.read_config(Path(folder), METADATA_FILE, format_name=FORMAT_NAME, supported_version=FORMAT_VERSION)
        tensors = hub.read_tensors(Path(folder) / WEIGHTS_FILE)
        try:
            metadata = AlignmentMetadata(**{item.name: values[item.name] for item in fields(AlignmentMetadata)})
            matrix, sketch = (tensors[name].float() for name in ("matrix", "sketch"))
            if matrix.shape != (metadata.width, metadata.hidden_size):
                raise ValueError(f"a matrix of shape {tuple(matrix.shape)}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The two files of the alignment in {str(folder)!r} do not belong together ({error}); make it anew "
                "with `calibfuse align-embedding`."
            ) from error
        return cls(matrix, sketch, metadata)

    def check(self, bound: BoundCalibrator) -> None:
        """Make sure that it was made for a bound calibrator, else raise a VocabularyMismatchError."""
        for what, made_for, found in (
            ("calibrator", self.metadata.calibrator_fingerprint, bound.calibrator.fingerprint),
            ("vocabulary", self.metadata.vocabulary_fingerprint, bound.vocabulary.fingerprint),
        ):
            if made_for != found:
                raise VocabularyMismatchError(
                    f"The alignment with {self.metadata.target!r} was made for another {what} ({made_for[:12]}, not "
                    f"{found[:12]}). Make one with `calibfuse align-embedding`."
                )

    def similarity(self, target: PreTrainedModel, vocabulary: Vocabulary) -> float:
        """Cosine of a target's sketch with that of the target it was made for: 1 the same, about 0 another model."""
        rows = target_embeddings(target)
        sketch = sketch_of(rows, common_tokens(vocabulary, rows))
        if (sketch.shape, rows.shape[1]) != (self.sketch.shape, self.metadata.hidden_size):
            return 0.0
        return float(torch.nn.functional.cosine_similarity(sketch.flatten(), self.sketch.flatten(), dim=0))


def alignment_folders(calibrator_folder: Path | None, calibrator_fingerprint: str) -> tuple[Path, ...]:
    """Where a calibrator's alignments are looked for: beside it, then in the cache folder, where there is one."""
    cache = cache_folder()
    cached = None if cache is None else cache / "aligned" / calibrator_fingerprint[:24]
    return tuple(folder for folder in (calibrator_folder, cached) if folder is not None)


def find_alignment(folders: Sequence[Path], guide: Guide, target: PreTrainedModel, *, calibrator: str) -> Alignment:
    """The alignment of a calibrator with a target.

    Raises:
        MissingHeadError: there is none in `folders` (`alignment_folders`); `calibrator` is the name for the message.
        CheckpointError: one of those there is damaged.
    """
    bound = alignable(guide)
    found: list[tuple[float, Alignment]] = []
    for place in (path.parent for folder in folders for path in sorted((folder / FOLDER).glob(f"*/{METADATA_FILE}"))):
        alignment = Alignment.load(place)
        metadata = alignment.metadata
        if (metadata.calibrator_fingerprint, metadata.vocabulary_fingerprint) == (
            bound.calibrator.fingerprint,
            bound.vocabulary.fingerprint,
        ):
            similarity = alignment.similarity(target, bound.vocabulary)
            if similarity >= _SAME_MODEL:
                found.append((similarity, alignment))
    if not found:
        name = getattr(target, "name_or_path", "") or type(target).__name__
        raise MissingHeadError(
            f"Mode 'embedding' needs an alignment of the calibrator, with the weights that it has now, with the target "
            f"{name!r}. Make it with `calibfuse align-embedding --calibrator {calibrator} --model {name}`."
        )
    return max(found, key=lambda entry: entry[0])[1]


def alignable(guide: Guide) -> BoundCalibrator:
    """The guide, if it has embeddings and states that can be aligned; else an InputError."""
    if not isinstance(guide, BoundCalibrator):
        raise InputError(
            f"Mode 'embedding' needs a calibrator with hidden states of its own, got a {type(guide).__name__}."
        )
    if CALIBRATOR_HEAD not in guide.heads:
        raise MissingHeadError(f"Mode 'embedding' needs the head {CALIBRATOR_HEAD!r}, which the calibrator has not.")
    return guide


def last_states(said: NextTokenScores) -> Tensor:
    """The calibrator's last hidden states, float [..., width]: what the query of its "calibrator" head reads."""
    if not isinstance(said, GuideStates):
        raise InputError(f"Mode 'embedding' needs the states of a universal calibrator, got {type(said).__name__}.")
    head: Any = said.bound.calibrator.heads[CALIBRATOR_HEAD]
    with torch.no_grad():
        states: Tensor = head.state(said.hidden)
    return states


def target_embeddings(target: PreTrainedModel) -> Tensor:
    """The target's input embeddings, [rows, hidden_size], as they lie in the model (not a copy)."""
    model: Any = target  # transformers types this method in some versions only
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.device.type == "meta":
        raise InputError(
            f"The input embeddings of {type(target).__name__} cannot be read (there are none, or they are quantised or "
            "offloaded); load the model without that."
        )
    return weight.detach()


def common_tokens(vocabulary: Vocabulary, rows: Tensor) -> Tensor:
    """Ids with bytes and a row: int64 [common], ascending."""
    has_bytes = torch.from_numpy(~vocabulary.is_special[: rows.shape[0]])
    return has_bytes.nonzero().squeeze(1)


def sketch_of(rows: Tensor, ids: Tensor) -> Tensor:
    """A few channels of a few tokens' embeddings, centred: float32 [tokens, channels], CPU."""
    tokens = ids[torch.linspace(0, len(ids) - 1, min(_SKETCH_TOKENS, len(ids))).long()]
    channels = torch.linspace(0, rows.shape[1] - 1, min(_SKETCH_CHANNELS, rows.shape[1])).long()
    sketch = rows[tokens.to(rows.device)][:, channels.to(rows.device)].to("cpu", torch.float32)
    # The mean of all tokens is large, and alike within a family.
    return sketch - sketch.mean(dim=0)
