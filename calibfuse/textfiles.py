"""Streaming readers of training text, in bounded memory.

Reads .txt, .jsonl and .csv, plain or compressed (.gz, .xz), whole folders of them, and data sets of the Hub
(`hf:NAME`), one document at a time: no file is ever held in memory.

Left out: no language detection, no deduplication, no cleaning; what is in the file is what is trained on.
"""

import csv
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from calibfuse.errors import DataError, MissingDependencyError

__all__ = ["HUB_PREFIX", "TEXT_FIELDS", "expand_source", "iter_documents", "split_passages"]

TEXT_FIELDS = ("text", "content", "comment", "sentence", "document")
"""Names under which the text of a .jsonl or .csv row is looked for, in this order, when none is given."""

HUB_PREFIX = "hf:"
DEFAULT_MAX_BYTES = 65_536
# A .jsonl line longer than this is refused rather than read into memory.
MAX_ROW_BYTES = 16_777_216
# How much of a file is looked at to tell text from something else.
SNIFF_BYTES = 8_192

_KINDS = (".txt", ".jsonl", ".csv")
_COMPRESSIONS = (".gz", ".xz")
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")


def iter_documents(
    paths: Sequence[str | os.PathLike[str]],
    *,
    text_field: str | None = None,
    min_bytes: int = 1,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Iterator[str]:
    r"""Read documents one after the other, in bounded memory.

    A document is a block between blank lines (.txt), a row (.jsonl, .csv) or an example (Hub). Surrounding white
    space is removed, line ends become `\n`, and documents longer than `max_bytes` come in several pieces, nothing lost.

    Args:
        paths: files, folders (all supported files inside, recursively, sorted by name) or `hf:NAME[:[CONFIG:]SPLIT]`.
        text_field: the field of .jsonl and .csv rows that holds the text; without it the first of `TEXT_FIELDS`
            that is present.
        min_bytes: documents with fewer UTF-8 bytes are skipped.
        max_bytes: the longest piece that is returned, in UTF-8 bytes; at least 4.

    Yields:
        The documents, in the order of `paths`.

    Raises:
        DataError: a path does not exist, has an unknown extension, is empty, binary, damaged or not UTF-8; a row has
            no text; or a file holds no usable line. The sentence names the file and, where there is one, the line.
        MissingDependencyError: `hf:` without the `datasets` package (extra `train`).
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    for path in paths:
        for source in expand_source(path):
            found = False
            for document in _iter_source(source, text_field, max_bytes):
                for piece in split_passages(document, max_bytes):
                    text = piece.strip()
                    if text and len(text.encode()) >= min_bytes:
                        found = True
                        yield text
            if not found:
                raise DataError(
                    f"{source} holds no usable line: expected text of at least {min_bytes} bytes, found only blank or "
                    "shorter lines. Give a file with text."
                )


def expand_source(path: str | os.PathLike[str]) -> list[str]:
    """The files behind one entry of a list of sources: itself, or the supported files of a folder, sorted.

    Args:
        path: a file, a folder or `hf:NAME`.

    Returns:
        File paths (or the `hf:` entry unchanged), at least one.

    Raises:
        DataError: nothing is there, the folder holds no supported file, or the extension is unknown.
    """
    name = os.fspath(path)
    if name.startswith(HUB_PREFIX):
        return [name]
    location = Path(name)
    if location.is_dir():
        files = sorted(str(file) for file in location.rglob("*") if file.is_file() and _kind_of(file) is not None)
        if not files:
            raise DataError(f"Folder {name} holds no text file; expected files ending in {_supported()}.")
        return files
    if not location.exists():
        raise DataError(f"No such file or folder: {name}. Check the path of the training text.")
    if not location.is_file():
        raise DataError(f"{name} is neither a file nor a folder. Give a file ending in {_supported()}.")
    if _kind_of(location) is None:
        raise DataError(f"Unknown file extension of {name}; expected {_supported()}. Rename or convert the file.")
    return [name]


def split_passages(document: str, max_bytes: int = 600) -> Iterator[str]:
    """Cut a document into passages at the ends of paragraphs, lines, sentences or words, in this order of preference.

    Nothing is lost: the passages joined give the document back. A cut falls inside a character sequence without any
    space only if there is no other place, and never inside a character.

    Args:
        document: the text.
        max_bytes: the longest passage in UTF-8 bytes; at least 4, the longest character.

    Yields:
        Passages, none empty.

    Raises:
        DataError: `max_bytes` is below 4.

    Example:
        >>> list(split_passages("One sentence. Another one.", max_bytes=16))
        ['One sentence.', ' Another one.']
    """
    if max_bytes < 4:
        raise DataError(f"max_bytes must be at least 4, the longest UTF-8 character, got {max_bytes}.")
    # Lone surrogates (half an emoji, from JSON escapes) have no UTF-8 form; they become the replacement character.
    data = document.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
    start = 0
    while len(data) - start > max_bytes:
        end = _cut(data, start, max_bytes)
        yield data[start:end].decode()
        start = end
    if start < len(data):
        yield data[start:].decode()


def _cut(data: bytes, start: int, max_bytes: int) -> int:
    """The end of the passage that begins at `start`: the last good boundary in the second half of the window."""
    stop = start + max_bytes
    middle = start + max_bytes // 2
    for marks in ((b"\n\n",), (b"\n",), (b". ", b"! ", b"? ", b'." ', b".) ", b'!" ', b'?" ')):
        # The white space after a mark goes to the next passage, so that no passage ends in a lone space.
        best = max(data.rfind(mark, middle, stop) + len(mark.rstrip()) for mark in marks)
        if best > middle:
            return best
    space = data.rfind(b" ", start + 1, stop)
    if space > start:
        return space
    while data[stop] & 0xC0 == 0x80:  # a continuation byte: the character began before the window's end
        stop -= 1
    return stop


def _kind_of(path: Path) -> str | None:
    """`.txt`, `.jsonl` or `.csv` of a path, compressed or not; None for anything else."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _KINDS else None


def _supported() -> str:
    return f"{', '.join(_KINDS)} (also with {' or '.join(_COMPRESSIONS)})"


def _iter_source(source: str, text_field: str | None, max_bytes: int) -> Iterator[str]:
    """Documents of one file or Hub data set, not yet cut or stripped."""
    if source.startswith(HUB_PREFIX):
        yield from _iter_hub(source, text_field)
        return
    kind = _kind_of(Path(source))
    with _opened(source) as stream:
        if kind == ".txt":
            yield from _iter_blocks(source, stream, max_bytes)
        elif kind == ".jsonl":
            yield from _iter_json_rows(source, stream, text_field)
        else:
            yield from _iter_csv_rows(source, stream, text_field)


@contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    """Open a file through its compression; refuse empty and binary ones; turn read errors into DataError."""
    suffix = Path(source).suffix.lower()
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    opener = openers.get(suffix, open)
    try:
        with opener(source, "rb") as stream:
            head = stream.read(SNIFF_BYTES)
            if not head:
                raise DataError(f"{source} is empty (0 bytes of text). Give a file with text.")
            if head.startswith(_BYTE_ORDER_MARKS):
                raise DataError(f"{source} is UTF-16 text; expected UTF-8. Convert it, for example with iconv.")
            if b"\0" in head:
                raise DataError(
                    f"{source} is a binary file (a zero byte at byte {head.index(0)}); expected UTF-8 text. "
                    "Give the text itself."
                )
            stream.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
            yield stream
    except DataError:
        raise
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{source} is damaged or not a {suffix} file ({error}). Compress it again.") from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error


def _iter_lines(source: str, stream: IO[bytes], limit: int) -> Iterator[tuple[int, str, bool]]:
    """Decoded lines of at most `limit` bytes as (line number from 1, text, whether the line ends here)."""
    number, offset, rest = 1, stream.tell(), b""
    while chunk := stream.readline(limit):
        offset += len(chunk)
        data, rest = rest + chunk, b""
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            # A chunk that was cut by `limit` may end inside a character, which the next chunk completes.
            if error.reason != "unexpected end of data" or len(chunk) < limit:
                raise _not_utf8(source, number, offset - len(data) + error.start, data[error.start :]) from error
            data, rest = data[: error.start], data[error.start :]
            text = data.decode()
        if "\0" in text:
            at = offset - len(rest) - len(data) + data.index(b"\0")
            raise DataError(
                f"{source}, line {number}: expected UTF-8 text, got a zero byte at byte {at}: a binary file?"
            )
        complete = chunk.endswith(b"\n") or len(chunk) < limit
        yield number, text, complete
        number += complete


def _not_utf8(source: str, number: int, offset: int, rest: bytes) -> DataError:
    return DataError(
        f"{source}, line {number}: expected UTF-8 text, got the byte 0x{rest[0]:02x} at byte {offset}. "
        "Convert the file to UTF-8, for example with iconv."
    )


def _iter_blocks(source: str, stream: IO[bytes], max_bytes: int) -> Iterator[str]:
    """Blocks of a .txt file between blank lines; a block is handed on early once it reaches `max_bytes`."""
    block: list[str] = []
    size = 0
    line_is_open = False
    for _, text, complete in _iter_lines(source, stream, max(max_bytes, SNIFF_BYTES)):
        text = text.replace("\r\n", "\n")
        if not text.strip() and not line_is_open and complete:
            if block:
                yield "".join(block)
            block, size = [], 0
            continue
        block.append(text)
        size += len(text)
        line_is_open = not complete
        if size >= max_bytes:
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)


def _iter_json_rows(source: str, stream: IO[bytes], text_field: str | None) -> Iterator[str]:
    """The text of each line of a .jsonl file; blank lines are skipped."""
    for number, line, complete in _iter_lines(source, stream, MAX_ROW_BYTES):
        if not complete:
            raise DataError(
                f"{source}, line {number}: expected one JSON object per line, got a row of more than {MAX_ROW_BYTES} "
                "bytes. Write one document per line."
            )
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: expected one JSON object per line, got invalid JSON ({error}).") from error
        if not isinstance(row, dict):
            raise DataError(f'{where}: expected a JSON object such as {{"text": "..."}}, got {type(row).__name__}.')
        yield _text_of(row, text_field, where)


def _iter_csv_rows(source: str, stream: IO[bytes], text_field: str | None) -> Iterator[str]:
    """The text column of a .csv file with a header row."""
    # The csv module refuses a field over its own limit (131,072 characters), so an unclosed quote stays bounded.
    lines = (text for _, text, _ in _iter_lines(source, stream, MAX_ROW_BYTES))
    reader = csv.reader(lines)
    try:
        header = next((row for row in reader if row), None)
        if header is None:
            return
        columns = [name.strip() for name in header]
        where = f"{source}, line {reader.line_num}"
        column = columns.index(_field_of(columns, text_field, where))
        for row in reader:
            if not row:
                continue
            if len(row) <= column:
                raise DataError(
                    f"{source}, line {reader.line_num}: expected the header's {len(columns)} columns, got {len(row)}."
                )
            yield row[column].replace("\r\n", "\n")
    except csv.Error as error:
        where = f"{source}, line {reader.line_num}"
        raise DataError(f"{where}: not a valid .csv row ({error}). Check the quotes.") from error


def _field_of(names: Iterable[str], text_field: str | None, where: str) -> str:
    """The name of the text field among the names of a row."""
    known = list(names)
    wanted = TEXT_FIELDS if text_field is None else (text_field,)
    for name in wanted:
        if name in known:
            return name
    shown = ", ".join(repr(name) for name in known[:8]) or "none"
    raise DataError(
        f"{where}: expected a text field named {' or '.join(wanted)}, got the fields {shown}. Name it with text_field."
    )


def _text_of(row: dict[str, Any], text_field: str | None, where: str) -> str:
    name = _field_of(row, text_field, where)
    text = row[name]
    if not isinstance(text, str):
        raise DataError(f"{where}: expected a string in the field {name!r}, got {type(text).__name__}.")
    return text.replace("\r\n", "\n")


def _iter_hub(source: str, text_field: str | None) -> Iterator[str]:
    """Documents of a data set of the Hub, streamed: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`."""
    try:
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise MissingDependencyError(
            f"Reading {source} needs the package datasets; install it with `pip install calibfuse[train] datasets`."
        ) from error
    name, *options = source[len(HUB_PREFIX) :].split(":")
    if not name or len(options) > 2:
        raise DataError(f"Expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, got {source}.")
    split = options[-1] if options else "train"
    config = options[0] if len(options) == 2 else None
    try:
        rows = iter(datasets.load_dataset(name, config, split=split, streaming=True))
    except Exception as error:  # the package raises many kinds: network, script, missing split
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"Data set {source} cannot be loaded: {reason}") from error
    for number, row in enumerate(rows, start=1):
        yield _text_of(row, text_field, f"{source}, example {number}")
