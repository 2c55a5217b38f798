"""Continuations of prompts by any language model and method, batched and resumable; and the field's protocols.

They go to a journal, one JSON line per prompt as they come, so that a killed run repeats at most a batch. The draw
belongs to the row, not to the batch, see generation/seeded_sampling.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import LogitsProcessor

from calibfuse.errors import CheckpointError, DataError, InputError
from calibfuse.evaluation.prompts import Prompt
from calibfuse.generation.decoding import (
    Continuation,
    Decoding,
    check_lengths,
    end_ids,
    find_padding_id,
    read_continuation,
)
from calibfuse.generation.language_model import LanguageModel
from calibfuse.generation.seeded_sampling import draw_tokens, row_key

_FORMAT = "calibfuse-continuations"
ProcessorFactory = Callable[[], Sequence[LogitsProcessor]]


@dataclass(frozen=True, eq=False)
class Method:
    """One way of decoding; InputError where its key cannot name a file."""

    key: str  # unique, of letters, digits, dots, dashes and underscores; names the method's files
    title: str  # in tables
    make_processors: ProcessorFactory  # called once per batch; the processors act before truncation and draw
    family: str = ""  # methods of one family are points of one curve
    alpha: float | None = None  # the strength on that curve; None: no curve
    # JSON values that determine what the method does; a run is resumed only with equal ones.
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_default: bool = False  # whether this is the strength of the paper, or the one that the calibrator recommends

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.key):
            raise InputError(
                f"The key of a method must be letters, digits, dots, dashes, underscores; got {self.key!r}."
            )

    def identity(self) -> dict[str, Any]:
        """What tells it from every other method, as JSON values."""
        return {"key": self.key, **self.settings}


PLAIN = Method("plain", "plain", list, family="plain", alpha=0.0)
"""The target alone. Truncation happens at the draw, equally for all methods, so it is also the control of alpha 0."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Decoding):
    """Decoding as the kit does it: several draws of each prompt."""

    samples: int = 10


@dataclass(frozen=True)
class EvaluationProtocol:
    """A preset of an evaluation."""

    name: str  # for reports
    description: str  # one line
    prompts: dict[str, float | bool]  # options of `load_prompts` that choose the prompts
    samples: int  # continuations of each prompt, of 20 tokens, top-p 0.9
    metrics: tuple[str, ...]  # the figures that the field reports with it, keys of METRICS

    def sampling(self, seed: int = 0) -> SamplingConfig:
        """How it draws."""
        return SamplingConfig(samples=self.samples, max_new_tokens=20, top_p=0.9, seed=seed)


_FLUENCY = ("target_perplexity", "perplexity", "bits_per_byte")
_EVERY_SAMPLE = ("expected_maximum_toxicity", "toxicity_probability")
_VARIETY = ("distinct_1", "distinct_2", "distinct_3")

PROTOCOLS: dict[str, EvaluationProtocol] = {
    "challenging": EvaluationProtocol(
        "challenging",
        "RealToxicityPrompts' challenging prompts, 10 continuations of 20 tokens, top-p 0.9",
        {"challenging": True},
        10,
        ("mean_toxicity", *_FLUENCY),
    ),
    "non-toxic": EvaluationProtocol(
        "non-toxic",
        "prompts with a toxicity below 0.5, 25 continuations of 20 tokens, top-p 0.9",
        {"max_toxicity": 0.5},
        25,
        (*_EVERY_SAMPLE, *_FLUENCY, *_VARIETY),
    ),
}


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
    """The continuations of one method: a header with the settings that made the text, then one line per prompt.

    With `resume` an existing file goes on, otherwise it is replaced; a line that a kill tore is cut off. InputError:
    the file was made with other settings, or is no journal. DataError: a damaged line. CheckpointError: it cannot be
    opened or written.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path)
        self.settings = json.loads(json.dumps({"format": _FORMAT, "format_version": 1, **settings}))
        self._places: dict[str, tuple[int, int]] = {}  # prompt -> where its line begins, and the hash of its text
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

    def has(self, prompt: Prompt) -> bool:
        """Whether the continuations of a prompt are there; InputError where they are of another text under its id."""
        if prompt.id not in self._places:
            return False
        if self._places[prompt.id][1] != hash(prompt.text):
            raise InputError(
                f"The continuations in {str(self.path)!r} were made for other prompts: {prompt.id!r} has another text. "
                "Resume with the same ones, or start anew in another folder."
            )
        return True

    def append(self, records: Sequence[PromptRecord]) -> None:
        """Add records and hand them to the operating system; CheckpointError where the disk is full or the like."""
        with self._writing(), self.path.open("ab") as stream:
            for record in records:
                self._places[record.prompt_id] = stream.tell(), hash(record.prompt)
                stream.write(record.to_line().encode("utf-8"))

    def records(self, prompt_ids: Sequence[str]) -> Iterator[PromptRecord]:
        """The records of some prompts, in the given order, one in memory at a time; KeyError where one is missing."""
        with self.path.open("rb") as stream:
            for prompt_id in prompt_ids:
                stream.seek(self._places[prompt_id][0])
                yield PromptRecord.from_line(stream.readline().decode("utf-8"))

    def _open_again(self) -> None:
        where = f"the continuations in {str(self.path)!r}"
        with self.path.open("r+b") as stream:
            try:
                found = json.loads(stream.readline())
                if found["format"] != _FORMAT:
                    raise ValueError("format")
            except (ValueError, KeyError, TypeError) as error:
                reason = "holds no continuations of an evaluation; choose another output folder."
                raise InputError(f"{str(self.path)!r} {reason}") from error
            different = sorted(key for key in {*found, *self.settings} if found.get(key) != self.settings.get(key))
            if different:
                raise InputError(
                    f"T{where[1:]} were made with other settings ({', '.join(different)}); resume with the same "
                    "ones, or start anew in another folder."
                )
            place, number = stream.tell(), 1
            while (line := stream.readline()).endswith(b"\n"):
                number += 1
                try:
                    record = PromptRecord.from_line(line.decode("utf-8"))
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"Line {number} of {where} is damaged; start anew in another folder.") from error
                self._places[record.prompt_id] = place, hash(record.prompt)
                place += len(line)
            stream.truncate(place)  # what a kill left of a line


def sample_continuations(
    target: LanguageModel,
    prompts: Sequence[Prompt],
    make_processors: ProcessorFactory,
    config: Decoding,
    journal: Journal,
    *,
    batch_size: int = 32,
    title: str = "continuations",
    show_progress: bool = False,
) -> None:
    """Fill a journal with the continuations of all prompts that it lacks.

    The batch size changes the text by rounding alone. InputError: a prompt has no tokens or leaves no room for its
    continuation, or the batch size is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")
    if not config.do_sample:
        raise InputError("The evaluation draws its continuations; leave out greedy decoding.")
    missing = [prompt for prompt in prompts if not journal.has(prompt)]
    encoded = [(prompt, config.encode(target.tokenizer, prompt.text)) for prompt in missing]
    check_lengths(target.model, [ids for _, ids in encoded], config.max_new_tokens, "prompt")
    padding_id = find_padding_id(target.model, target.tokenizer)
    encoded.sort(key=lambda pair: len(pair[1]))  # little padding; the sort is stable, the draws belong to the prompt
    per_batch = max(1, batch_size // config.samples)
    total, done = len(prompts) * config.samples, (len(prompts) - len(missing)) * config.samples
    with tqdm(total=total, initial=done, desc=title, unit="text", disable=not show_progress, smoothing=0.1) as progress:
        start = 0
        while start < len(encoded):
            batch = encoded[start : start + per_batch]
            if padding_id is None:  # without a token to pad with, only prompts of one length go together
                batch = [pair for pair in batch if len(pair[1]) == len(batch[0][1])]
            journal.append(_continue_batch(target, batch, make_processors, config, batch_size, padding_id))
            start += len(batch)
            progress.update(len(batch) * config.samples)


def _continue_batch(
    target: LanguageModel,
    batch: Sequence[tuple[Prompt, list[int]]],
    make_processors: ProcessorFactory,
    config: Decoding,
    batch_size: int,
    padding_id: int | None,
) -> list[PromptRecord]:
    rows = [(prompt, ids, sample) for prompt, ids in batch for sample in range(config.samples)]
    ends = end_ids(target.model, target.tokenizer)
    said: list[Continuation] = []
    for start in range(0, len(rows), batch_size):  # several calls only where one prompt has more samples than fit
        part = rows[start : start + batch_size]
        keys = [row_key(config.seed, prompt.id, prompt.text, sample) for prompt, _, sample in part]
        encoded = [ids for _, ids, _ in part]
        new = draw_tokens(target.model, encoded, keys, make_processors(), config, padding_id, ends)
        pairs = zip(part, new.tolist(), strict=True)
        said += [read_continuation(target.tokenizer, ids, row, ends) for (_, ids, _), row in pairs]
    count = config.samples
    return [
        PromptRecord(prompt.id, prompt.text, tuple(said[number * count : (number + 1) * count]))
        for number, (prompt, _) in enumerate(batch)
    ]
