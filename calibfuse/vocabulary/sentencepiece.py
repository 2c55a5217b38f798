"""Reads the pieces of a SentencePiece model file, since neither sentencepiece nor protobuf need be installed.

One protocol buffer message, `ModelProto`: field 1 are the pieces, of a piece field 1 is the string and 3 the type.
"""

from collections.abc import Iterator

# Types of pieces, numbered as in sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_VARINT, _BYTES = 0, 2
_FIXED_SIZES = {1: 8, 5: 4}


def read_pieces(data: bytes) -> list[tuple[str, int]]:
    """Text and type of the pieces of a .model file, by id, at least one; ValueError where it is damaged."""
    pieces = []
    for number, value in _fields(data):
        if number == 1:
            if isinstance(value, int):
                raise ValueError("a piece is a number")
            content = dict(_fields(value))
            text, kind = content.get(1, b""), content.get(3, NORMAL)
            if not isinstance(text, bytes) or kind not in range(NORMAL, BYTE + 1):
                raise ValueError(f"a piece of type {kind!r}")
            pieces.append((text.decode("utf-8"), int(kind)))
    if not pieces:
        raise ValueError("the message holds no pieces")
    return pieces


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
