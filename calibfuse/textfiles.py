"""Text files, streamed in bounded memory: .txt, .jsonl and .csv, plain or compressed (.gz, .xz).

What is missing, empty, binary, damaged or not UTF-8 is a DataError that names the file and the line.
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

from calibfuse.errors import DataError

TEXT_FIELDS = ("text", "content", "comment", "sentence", "document")
"""Names under which the text of a .jsonl or .csv row is looked for, in this order, when none is given."""

MAX_ROW_BYTES = 16_777_216  # a longer line is refused rather than read into memory
_SNIFF_BYTES = 8_192  # of a file that are looked at to tell text from something else

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_JSON_ROWS = (".jsonl", ".ndjson")
_KINDS = (".txt", *_JSON_ROWS, ".csv")
_SUPPORTED = ".txt, .jsonl, .csv (also with .gz or .xz)"
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_text(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file through the compression that its extension names; its bytes, from the start."""
    place = Path(path).expanduser()
    compression = place.suffix.lower()
    try:
        with _OPENERS.get(compression, open)(place, "rb") as stream:
            head = stream.read(_SNIFF_BYTES)
            if not head:
                raise DataError(f"{path} is empty (0 bytes of text). Give a file with text.")
            if head.startswith(_UTF16_MARKS):
                raise DataError(f"{path} is UTF-16 text; expected UTF-8. Convert it, for example with iconv.")
            if b"\0" in head:
                raise DataError(
                    f"{path} is a binary file (a zero byte at byte {head.index(0)}); expected UTF-8 text. "
                    "Give the text itself."
                )
            stream.seek(0)
            yield stream
    except FileNotFoundError as error:
        raise DataError(f"No such file or folder: {path}. Check the path of the text.") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or not a {compression} file ({error}). Compress it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_rows(path: str | os.PathLike[str], *, lines_are_rows: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of one file: the objects of a .jsonl file, or the rows of a .csv file under the names of its header.

    Each comes with the number of its line, from 1; blank lines are skipped. With `lines_are_rows` a file of any other
    extension will do as well: each of its lines is a row {"text": line}.
    """
    name, kind = os.fspath(path), _kind_of(Path(path))
    if kind not in (*_JSON_ROWS, ".csv") and not lines_are_rows:
        raise DataError(f"Expected rows in a .jsonl or .csv file (also with .gz or .xz), got {name}.")
    with open_text(path) as stream:
        if kind == ".csv":
            yield from _csv_rows(stream, name)
        else:
            for number, line in read_lines(stream, name):
                yield number, _json_row(line, f"{name}, line {number}") if kind in _JSON_ROWS else {"text": line}


def read_lines(stream: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """The lines of a stream that are not blank, without their ends, numbered from 1; `name` is for messages."""
    for number, line, complete in _pieces(stream, name, MAX_ROW_BYTES):
        if not complete:
            raise DataError(
                f"{name}, line {number}: expected at most {MAX_ROW_BYTES:,} bytes a line, got more. "
                "Write one text a line."
            )
        if line.strip():
            yield number, line.rstrip("\r\n")


def iter_documents(
    paths: Sequence[str | os.PathLike[str]],
    *,
    text_field: str | None = None,
    max_bytes: int = 65_536,
) -> Iterator[str]:
    """The texts of files, one after the other: blocks between blank lines (.txt), or rows.

    Surrounding white space is removed, and documents longer than `max_bytes` come in several pieces, nothing lost.

    Args:
        paths: files, or folders (all supported files inside, recursively, sorted by name).
        text_field: the field of rows that holds the text; without it the first of `TEXT_FIELDS` that is present.
        max_bytes: the longest piece that is returned, in UTF-8 bytes; at least 4.

    Raises:
        DataError: a path that cannot be read, a row without text, or a file without a usable line.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    for path in paths:
        for source in expand_source(path):
            found = False
            for document in _texts_of(source, text_field, max_bytes):
                for piece in split_passages(document, max_bytes):
                    if text := piece.strip():
                        found = True
                        yield text
            if not found:
                raise DataError(f"{source} holds no usable line, only blank ones. Give a file with text.")


def expand_source(path: str | os.PathLike[str]) -> list[str]:
    """The files behind one source: itself, or the supported files of a folder, sorted."""
    name, location = os.fspath(path), Path(path)
    if location.is_dir():
        files = sorted(str(file) for file in location.rglob("*") if file.is_file() and _kind_of(file) in _KINDS)
        if not files:
            raise DataError(f"Folder {name} holds no text file; expected files ending in {_SUPPORTED}.")
        return files
    if not location.exists():
        raise DataError(f"No such file or folder: {name}. Check the path of the text.")
    if not location.is_file():
        raise DataError(f"{name} is neither a file nor a folder. Give a file ending in {_SUPPORTED}.")
    if _kind_of(location) not in _KINDS:
        raise DataError(f"Unknown file extension of {name}; expected {_SUPPORTED}. Rename or convert the file.")
    return [name]


def split_passages(document: str, max_bytes: int = 600) -> Iterator[str]:
    """Cut a document into passages at the ends of paragraphs, lines, sentences or words, in this order of preference.

    Nothing is lost: the passages joined give the document back. `max_bytes` is in UTF-8, at least 4.

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


def up_to(texts: Iterable[str], byte_budget: int) -> Iterator[str]:
    """The first texts, until they have a number of UTF-8 bytes."""
    total = 0
    for text in texts:
        if total >= byte_budget:
            return
        total += len(text.encode())
        yield text


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


def _kind_of(path: Path) -> str:
    """The extension of a path in lower case, without that of its compression."""
    stem = Path(path.stem) if path.suffix.lower() in _OPENERS else path
    return stem.suffix.lower()


def _texts_of(source: str, text_field: str | None, max_bytes: int) -> Iterator[str]:
    if _kind_of(Path(source)) == ".txt":
        with open_text(source) as stream:
            yield from _blocks(stream, source, max_bytes)
    else:
        for number, row in read_rows(source):
            yield _text_of(row, text_field, f"{source}, line {number}")


def _pieces(stream: IO[bytes], name: str, limit: int) -> Iterator[tuple[int, str, bool]]:
    """Decoded lines in pieces of at most `limit` bytes: (line number from 1, text, whether the line ends here)."""
    number, offset, rest = 1, 0, b""
    while chunk := stream.readline(limit):
        offset += len(chunk)
        is_full = len(chunk) == limit
        complete = chunk.endswith(b"\n") or not is_full
        data, rest = rest + (chunk.removeprefix(_UTF8_MARK) if offset == len(chunk) else chunk), b""
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            # A chunk that was cut by `limit` may end inside a character, which the next chunk completes.
            if error.reason != "unexpected end of data" or not is_full:
                raise DataError(
                    f"{name}, line {number}: expected UTF-8 text, got the byte 0x{data[error.start]:02x} at byte "
                    f"{offset - len(data) + error.start}. Convert the file to UTF-8, for example with iconv."
                ) from error
            data, rest = data[: error.start], data[error.start :]
            text = data.decode()
        if "\0" in text:
            at = offset - len(rest) - len(data) + data.index(b"\0")
            raise DataError(f"{name}, line {number}: expected UTF-8 text, got a zero byte at byte {at}: a binary file?")
        yield number, text, complete
        number += complete


def _blocks(stream: IO[bytes], name: str, max_bytes: int) -> Iterator[str]:
    """Blocks of a .txt file between blank lines; a block is handed on early once it reaches `max_bytes`."""
    block: list[str] = []
    size = 0
    line_is_open = False
    for _, text, complete in _pieces(stream, name, max(max_bytes, _SNIFF_BYTES)):
        text = text.replace("\r\n", "\n")
        ends = not text.strip() and not line_is_open and complete
        if not ends:
            block.append(text)
            size += len(text)
            line_is_open = not complete
        if block and (ends or size >= max_bytes):
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object per line, got invalid JSON ({error}).") from error
    if not isinstance(row, dict):
        raise DataError(f'{where}: expected a JSON object such as {{"text": "..."}}, got {type(row).__name__}.')
    return row


def _csv_rows(stream: IO[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # The csv module refuses a field over its own limit (131,072 characters), so an unclosed quote stays bounded.
    reader = csv.reader(text for _, text, _ in _pieces(stream, name, MAX_ROW_BYTES))
    try:
        header = next((row for row in reader if row), [])
        columns = [column.strip() for column in header]
        for row in reader:
            if row and len(row) < len(columns):
                raise DataError(
                    f"{name}, line {reader.line_num}: expected the header's {len(columns)} columns, got {len(row)}."
                )
            if row:
                yield reader.line_num, dict(zip(columns, row, strict=False))
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: not a valid .csv row ({error}). Check the quotes.") from error


def _text_of(row: dict[str, Any], text_field: str | None, where: str) -> str:
    wanted = TEXT_FIELDS if text_field is None else (text_field,)
    field = next((each for each in wanted if each in row), None)
    if field is None:
        shown = ", ".join(repr(each) for each in list(row)[:8]) or "none"
        raise DataError(
            f"{where}: expected a text field named {' or '.join(wanted)}, got the fields {shown}. "
            "Name it with text_field."
        )
    if not isinstance(row[field], str):
        raise DataError(f"{where}: expected a string in the field {field!r}, got {type(row[field]).__name__}.")
    return str(row[field]).replace("\r\n", "\n")
