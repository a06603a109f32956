"""Messages of more values than any request needs, refused before protobuf reads them.

protobuf fills a map while the whole process stands still, batch and other tenants' calls included, before anything is
known of the caller; and keys in the order that its own maps give them out make that quadratic. 1,200,000 labels of
12.7 MiB took 14.6 s, 300,000 took 2.2 s (upb of protobuf 7.36, 2-core x86 CPU, 2026-11-20). Here 20,000 take 20 ms.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError

MAX_VALUES = 20_000
"""Values of one message, nested ones included; an entry of a map is one, and so is a packed list of numbers.

The largest request that passes every other check has under 2,000: five mixes of four adapters with 64 blocks each.
"""

# A value takes two bytes or more, so nothing shorter than this can hold too many.
_SMALL = 2 * MAX_VALUES
# Kinds of values; 3 and 4 begin and end a group.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class CrowdedMessage(DecodeError):
    """A message has more than MAX_VALUES values; `field` is the path of the one that was one too many."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.field = path


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """Which fields of a message type hold messages that may hold lists: number -> name and shape."""

    names: Mapping[int, str]
    inner: dict[int, "Shape"] = field(default_factory=dict)


def shape_of(message: Any, known: dict[str, Shape] | None = None) -> Shape:
    """Return the shape of a message type, given by its descriptor (protobuf has several types for them)."""
    known = {} if known is None else known
    if message.full_name in known:
        return known[message.full_name]
    shape = known[message.full_name] = Shape({each.number: each.name for each in message.fields})
    for each in message.fields:
        if each.message_type is not None and not each.message_type.GetOptions().map_entry:
            shape.inner[each.number] = shape_of(each.message_type, known)
    return shape


def counted(parse: Callable[[bytes], Any] | None, shape: Shape) -> Callable[[bytes], Any]:
    """Return `parse` (None: the bytes as they are) that raises CrowdedMessage instead of reading too many values."""

    def parse_counted(data: bytes) -> Any:
        if len(data) > _SMALL:
            _walk(data, 0, len(data), shape, "", MAX_VALUES)
        return data if parse is None else parse(data)

    return parse_counted


def _walk(data: bytes, at: int, end: int, shape: Shape, path: str, room: int) -> int:
    """Return how many values still have room after those of `data[at:end]`.

    What is not well formed ends the walk of that message alone, and is protobuf's to refuse: it may lie inside of a
    group, which protobuf skips unread.
    """
    while at < end:
        tag, at = _read_varint(data, at, end)
        kind, number = tag & 7, tag >> 3
        if kind > _FIXED32:
            return room
        room -= 1
        if room < 0:
            raise CrowdedMessage(path + shape.names.get(number, str(number)))
        if kind == _VARINT:
            _, at = _read_varint(data, at, end)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        elif kind == _BYTES:
            length, at = _read_varint(data, at, end)
            if length < 0:
                return room
            if number in shape.inner:
                inside = f"{path}{shape.names[number]}."
                room = _walk(data, at, min(at + length, end), shape.inner[number], inside, room)
            at += length
    return room


def _read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Return a number of up to ten bytes and the place after it; -1 and the end if there is none."""
    value = 0
    for place in range(at, min(at + 10, end)):
        byte = data[place]
        value |= (byte & 0x7F) << 7 * (place - at)
        if byte < 0x80:
            return value, place + 1
    return -1, end
