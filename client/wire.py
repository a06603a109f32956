"""Small conversions between protobuf's types and Python's own."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

E = TypeVar("E", bound=StrEnum)
V = TypeVar("V", bound=int)
T = TypeVar("T")


class ProtoEnum(Protocol[V]):
    """A generated enum type."""

    def Value(self, name: str) -> V:
        """Return the number of a name."""
        ...

    def Name(self, number: V) -> str:
        """Return the name of a number."""
        ...


def to_enum(kind: ProtoEnum[V], prefix: str, word: StrEnum) -> V:
    """Return the generated value of one of our words: prefix SAMPLER and `ddim` give SAMPLER_DDIM.

    Raises ValueError for a word that can only be received, like `unknown`.
    """
    try:
        return kind.Value(f"{prefix}_{word.value.upper()}")
    except ValueError as error:
        raise ValueError(f"{word.value!r} cannot be asked for") from error


def from_enum(kind: ProtoEnum[V], prefix: str, words: type[E], number: V, unknown: E | None = None) -> E:
    """Return our word for a received number; `unknown`, else ValueError, for numbers newer than this client."""
    try:
        return words(kind.Name(number).removeprefix(f"{prefix}_").lower())
    except ValueError:
        if unknown is None:
            raise
        return unknown


def known_enums(kind: ProtoEnum[V], prefix: str, words: type[E], numbers: Sequence[V]) -> tuple[E, ...]:
    """Return our words for the received numbers, leaving out numbers newer than this client."""
    names = (kind.Name(n).removeprefix(f"{prefix}_").lower() for n in numbers if _named(kind, n))
    return tuple(words(name) for name in names if name in set(words))


def to_datetime(stamp: Timestamp) -> datetime:
    """Return a UTC time."""
    return stamp.ToDatetime(tzinfo=UTC)


def to_seconds(duration: Duration) -> float:
    """Return seconds."""
    return duration.seconds + duration.nanos / 1e9


def optional(present: bool, read: Callable[[], T]) -> T | None:
    """Return the field's value, or None where the message lacks it."""
    return read() if present else None


def _named(kind: ProtoEnum[V], number: V) -> bool:
    try:
        kind.Name(number)
    except ValueError:
        return False
    return True
