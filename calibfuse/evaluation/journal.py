"""The files of an evaluation, so that a killed run goes on where it was: continuations as they come, finished stages.

A journal holds the continuations of one method as JSON Lines: a header with the settings that made the text, then one
line per prompt. A line that a kill tore is cut off when the file is opened again. A stage (scores, a suite, timings) is
one JSON file with its settings, written when it is finished.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from calibfuse.errors import CheckpointError, DataError, InputError
from calibfuse.generation.continuations import Continuation
from calibfuse.hub import write_files

FORMAT = "calibfuse-continuations"
FORMAT_VERSION = 1
STAGE_FORMAT = "calibfuse-evaluation-stage"
STAGE_FORMAT_VERSION = 1
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class PromptRecord:
    """A prompt with all of its continuations."""

    prompt_id: str  # of the prompt
    prompt: str  # its text
    continuations: tuple[Continuation, ...]  # in the order of their sample numbers

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> PromptRecord:
        """Inverse of `to_line`; raises ValueError, KeyError or TypeError on anything else."""
        values = json.loads(line)
        said = [
            Continuation(each["text"], tuple(each["token_ids"]), each["is_finished"])
            for each in values["continuations"]
        ]
        return cls(values["prompt_id"], values["prompt"], tuple(said))


class Journal:
    """The continuations of one method.

    Args:
        path: the file; made, with its folder, at the first record.
        settings: JSON values that determine the continuations; a file with other settings is refused.
        resume: go on with an existing file; otherwise it is replaced.

    Raises:
        InputError: the file was made with other settings, or is no journal.
        DataError: a line of the file cannot be read.
        CheckpointError: the file cannot be opened or written.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path)
        self.settings = json.loads(json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **settings}))
        self._places: dict[str, int] = {}
        self._texts: dict[str, int] = {}  # hashes of the prompts' texts
        with self._writing():
            if resume and self.path.exists() and self.path.stat().st_size:
                self._open_again()
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                header = json.dumps(self.settings, ensure_ascii=False) + "\n"
                self.path.write_text(header, encoding="utf-8", newline="\n")

    def __len__(self) -> int:
        return len(self._places)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"Cannot write the continuations to {str(self.path)!r}: {error.strerror or error}."
            ) from error

    def has(self, prompt_id: str, text: str) -> bool:
        """Whether the continuations of a prompt are there.

        Raises:
            InputError: there are some of another text under that id: the prompts are not those of the first run.
        """
        if prompt_id not in self._places:
            return False
        if self._texts[prompt_id] != hash(text):
            raise InputError(
                f"The continuations in {str(self.path)!r} were made for other prompts: {prompt_id!r} has another text. "
                "Resume with the same ones, or start anew in another folder."
            )
        return True

    def _index(self, record: PromptRecord, place: int) -> None:
        self._places[record.prompt_id] = place
        self._texts[record.prompt_id] = hash(record.prompt)

    def append(self, records: Sequence[PromptRecord]) -> None:
        """Add records and hand them to the operating system.

        Raises:
            CheckpointError: the disk is full or the like; what was written before stays.
        """
        with self._writing(), self.path.open("ab") as stream:
            place = stream.tell()
            for record in records:
                data = record.to_line().encode("utf-8")
                stream.write(data)
                self._index(record, place)
                place += len(data)

    def records(self, prompt_ids: Sequence[str]) -> Iterator[PromptRecord]:
        """The records of some prompts, in the given order, one in memory at a time; KeyError where one is missing."""
        with self.path.open("rb") as stream:
            for prompt_id in prompt_ids:
                stream.seek(self._places[prompt_id])
                yield PromptRecord.from_line(stream.readline().decode("utf-8"))

    def _open_again(self) -> None:
        """Check the header, index the records, cut off a torn last line."""
        with self.path.open("r+b") as stream:
            self._check_header(stream.readline())
            place = stream.tell()
            number = 1
            while line := stream.readline():
                number += 1
                if not line.endswith(b"\n"):
                    stream.truncate(place)
                    break
                try:
                    self._index(PromptRecord.from_line(line.decode("utf-8")), place)
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"Line {number} of the continuations in {str(self.path)!r} is damaged; start anew in another "
                        "folder."
                    ) from error
                place += len(line)

    def _check_header(self, header: bytes) -> None:
        try:
            found = json.loads(header)
            if found["format"] != FORMAT:
                raise ValueError("format")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{str(self.path)!r} holds no continuations of an evaluation; choose another output folder."
            ) from error
        if found != self.settings:
            different = sorted(key for key in {*found, *self.settings} if found.get(key) != self.settings.get(key))
            raise InputError(
                f"The continuations in {str(self.path)!r} were made with other settings ({', '.join(different)}); "
                "resume with the same ones, or start anew in another folder."
            )


def run_stage(
    path: str | os.PathLike[str],
    kind: type[_Found],
    settings: Mapping[str, Any],
    compute: Callable[[], _Found],
    *,
    resume: bool,
) -> _Found:
    """What a stage found: from its file, where that was made with the same settings, else computed and written.

    Args:
        path: the file.
        kind: a dataclass of numbers, texts, arrays, tuples, dictionaries by text, and such dataclasses.
        settings: JSON values that determine the result.
        compute: what to do where there is no such file, or it is damaged.
        resume: whether to look for one.

    Raises:
        CheckpointError: the file cannot be written.
    """
    place = Path(path)
    header = {"format": STAGE_FORMAT, "format_version": STAGE_FORMAT_VERSION, "settings": settings}
    header = json.loads(json.dumps(header))
    if resume:
        # Whatever is wrong with the file, its stage can be computed again.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            data = json.loads(place.read_bytes())
            if {name: data[name] for name in header} == header:
                found: _Found = _decode(kind, data["found"])
                return found
    found = compute()
    encoded = json.dumps({**header, "found": found}, default=_encode)
    write_files(place.parent, {place.name: encoded.encode("utf-8")})
    return found


def _encode(value: Any) -> Any:  # noqa: ANN401
    """What `json.dumps` does not know."""
    return asdict(value) if is_dataclass(value) else value.tolist()  # type: ignore[arg-type]


def _decode(kind: Any, value: Any) -> Any:  # noqa: ANN401
    """A value of a type from what `json.loads` made of it."""
    arguments = get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{each.name: _decode(hints[each.name], value[each.name]) for each in fields(kind)})  # type: ignore[operator]
    if get_origin(kind) is UnionType:  # X | None
        return None if value is None else _decode(arguments[0], value)
    if kind == NDArray[np.float64]:
        return np.asarray(value, dtype=np.float64)
    if get_origin(kind) is tuple:
        return tuple(_decode(arguments[0], each) for each in value)
    if get_origin(kind) is dict:
        return {key: _decode(arguments[1], each) for key, each in value.items()}
    return value
