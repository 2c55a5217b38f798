"""The file that continuations are written to as they come, so that a killed run goes on where it was.

A journal is JSON Lines: a header with the settings that made the text, then one line per prompt with all of its
continuations. A line that a kill tore is cut off when the file is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibfuse.errors import CheckpointError, DataError, InputError
from calibfuse.generation.continuations import Continuation

FORMAT = "calibfuse-continuations"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PromptRecord:
    """A prompt with all of its continuations.

    Attributes:
        prompt_id: of the prompt.
        prompt: its text.
        continuations: in the order of their sample numbers.
        seconds: its share of the time that its batch took in `generate`.
    """

    prompt_id: str
    prompt: str
    continuations: tuple[Continuation, ...]
    seconds: float

    def to_line(self) -> str:
        """One line of JSON."""
        said = [
            {"text": each.text, "token_ids": list(each.token_ids), "is_finished": each.is_finished}
            for each in self.continuations
        ]
        record = {"prompt_id": self.prompt_id, "prompt": self.prompt, "continuations": said, "seconds": self.seconds}
        return json.dumps(record, ensure_ascii=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> PromptRecord:
        """Inverse of `to_line`; raises ValueError, KeyError or TypeError on anything else."""
        values = json.loads(line)
        said = [
            Continuation(each["text"], tuple(each["token_ids"]), each["is_finished"])
            for each in values["continuations"]
        ]
        return cls(values["prompt_id"], values["prompt"], tuple(said), float(values["seconds"]))


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
        try:
            if resume and self.path.exists() and self.path.stat().st_size:
                self._open_again()
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(
                    json.dumps(self.settings, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
                )
        except OSError as error:
            raise CheckpointError(
                f"Cannot write the continuations to {str(self.path)!r}: {error.strerror or error}."
            ) from error

    def __len__(self) -> int:
        return len(self._places)

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
                "Resume with the same ones, or run without --resume to start anew."
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
        try:
            with self.path.open("ab") as stream:
                place = stream.tell()
                for record in records:
                    data = record.to_line().encode("utf-8")
                    stream.write(data)
                    self._index(record, place)
                    place += len(data)
        except OSError as error:
            raise CheckpointError(
                f"Cannot write the continuations to {str(self.path)!r}: {error.strerror or error}."
            ) from error

    def records(self, prompt_ids: Sequence[str]) -> Iterator[PromptRecord]:
        """The records of some prompts, in the given order, one in memory at a time.

        Raises:
            KeyError: one is not there.
        """
        with self.path.open("rb") as stream:
            for prompt_id in prompt_ids:
                stream.seek(self._places[prompt_id])
                yield PromptRecord.from_line(stream.readline().decode("utf-8"))

    def _open_again(self) -> None:
        """Check the header, index the records, cut off a torn last line."""
        with self.path.open("r+b") as stream:
            header = stream.readline()
            self._check_header(header)
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
                        f"Line {number} of the continuations in {str(self.path)!r} is damaged; run without --resume to "
                        "start anew."
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
                "resume with the same ones, or run without --resume to start anew."
            )
