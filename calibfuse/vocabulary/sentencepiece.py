"""Reads the pieces of a SentencePiece model file without the sentencepiece package.

The file is one protocol buffer message, `ModelProto` of sentencepiece_model.proto; only its field 1 (the pieces) is
read, and of a piece its string (field 1) and type (field 3). Wire format:
https://protobuf.dev/programming-guides/encoding/. Written by hand because the package is optional: a vocabulary is
read in many places where nothing is ever encoded.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple


class PieceType(IntEnum):
    """Types of pieces, numbered as in sentencepiece_model.proto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its position."""

    text: str
    type: PieceType


class WireFormatError(ValueError):
    """The bytes are no protocol buffer message of the expected form."""


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_pieces(data: bytes) -> list[Piece]:
    """The pieces of a .model file in the order of their ids; at least one.

    Raises:
        WireFormatError: the bytes are damaged, truncated or something else.
    """
    pieces = [_piece(value) for number, value in _fields(data) if number == 1]
    if not pieces:
        raise WireFormatError("the message holds no pieces")
    return pieces


def _piece(value: bytes | int) -> Piece:
    if isinstance(value, int):
        raise WireFormatError("a piece is a number")
    text, kind = "", PieceType.NORMAL
    for number, content in _fields(value):
        if number == 1 and isinstance(content, bytes):
            text = content.decode("utf-8")  # UnicodeDecodeError is a ValueError like WireFormatError
        elif number == 3 and isinstance(content, int):
            kind = PieceType(content)
    return Piece(text, kind)


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The (field number, value) pairs of a message; fixed-width values stay bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise WireFormatError("field number 0")
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, position = _varint(message, position)
        elif wire_type in (_FIXED64, _FIXED32):
            size = 8 if wire_type == _FIXED64 else 4
        else:
            raise WireFormatError(f"wire type {wire_type}")
        if position + size > len(message):
            raise WireFormatError("the message ends inside a field")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message) and shift < 64:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise WireFormatError("the message ends inside a number")
