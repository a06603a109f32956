"""Bytes going up: read whole, sent in pieces the server takes."""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

CHUNK_BYTES = 1024 * 1024

Source: TypeAlias = bytes | bytearray | str | Path
"""A file's bytes, or its path."""


def read_source(source: Source) -> bytes:
    """Return the bytes. Raises OSError where the path cannot be read."""
    return Path(source).read_bytes() if isinstance(source, str | Path) else bytes(source)


def chunks(data: bytes) -> Iterator[bytes]:
    """Yield the bytes in pieces of at most 1 MiB, the contract's limit for one message."""
    for begin in range(0, len(data), CHUNK_BYTES):
        yield data[begin : begin + CHUNK_BYTES]


def new_key() -> str:
    """Return a fresh idempotency key: a call repeated with it is done once."""
    return uuid4().hex
