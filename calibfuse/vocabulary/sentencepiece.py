"""Reads the pieces of a SentencePiece model file, since neither sentencepiece nor protobuf need be installed.

One protocol buffer message, `ModelProto`: field 1 are the pieces, of a piece field 1 is the string and 3 the type.
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


_VARINT, _BYTES = 0, 2
_FIXED_SIZES = {1: 8, 5: 4}


def read_pieces(data: bytes) -> list[Piece]:
    """The pieces of a .model file in the order of their ids, at least one; ValueError where it is damaged."""
    pieces = [_piece(value) for number, value in _fields(data) if number == 1]
    if not pieces:
        raise ValueError("the message holds no pieces")
    return pieces


def _piece(value: bytes | int) -> Piece:
    if isinstance(value, int):
        raise ValueError("a piece is a number")
    text, kind = "", PieceType.NORMAL
    for number, content in _fields(value):
        if number == 1 and isinstance(content, bytes):
            text = content.decode("utf-8")
        elif number == 3 and isinstance(content, int):
            kind = PieceType(content)
    return Piece(text, kind)


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The (field number, value) pairs of a message; fixed-width values stay bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if number == 0 or wire_type not in (_VARINT, _BYTES, *_FIXED_SIZES):
            raise ValueError(f"field number {number}, wire type {wire_type}")
        size = _FIXED_SIZES.get(wire_type, 0)
        if not size:
            size, position = _varint(message, position)
            if wire_type == _VARINT:
                yield number, size
                continue
        if position + size > len(message):
            raise ValueError("the message ends inside a field")
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
    raise ValueError("the message ends inside a number")
