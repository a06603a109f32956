"""Answers kept by idempotency key, written in the transaction of the change itself: both are there, or neither."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, cast

from sqlalchemy import Connection, delete, insert, select

from hueshift.adapters.errors import AlreadyExists, InvalidArgument, Reason
from hueshift.server.store.database import lock, now
from hueshift.server.store.tables import idempotency

_MAX_KEY = 64


def check_key(key: str, field: str = "idempotency_key") -> str:
    """Return the key; empty means none. Raises InvalidArgument above 64 characters or outside printable ASCII."""
    if len(key) > _MAX_KEY or not (key.isascii() and key.isprintable()):
        raise InvalidArgument.for_field(
            field, f"{key[:80]!r} ({len(key)} characters) given; allowed: at most {_MAX_KEY} printable ASCII characters"
        )
    return key


def hash_request(parts: Iterable[bytes]) -> str:
    """SHA-256 over the parts with their lengths, so that moving a byte from one part to the next changes it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def recall(connection: Connection, tenant: str, method: str, key: str, request_hash: str) -> dict[str, Any] | None:
    """Return the kept answer, None if the key is new or empty.

    In a writing transaction no other call with this key can pass until it ends. Raises AlreadyExists
    (IDEMPOTENCY_CONFLICT) if the key was used for another request.
    """
    if not key:
        return None
    lock(connection, f"idempotency/{tenant}/{method}/{key}")
    row = connection.execute(
        select(idempotency.c.request_hash, idempotency.c.result).where(
            idempotency.c.tenant == tenant, idempotency.c.method == method, idempotency.c.key == key
        )
    ).one_or_none()
    if row is None:
        return None
    if row.request_hash != request_hash:
        raise AlreadyExists(
            Reason.IDEMPOTENCY_CONFLICT,
            f"idempotency_key: {key!r} was used for a different {method} request; use a new key for a new request",
            metadata={"idempotency_key": key},
        )
    return cast(dict[str, Any], row.result)


def remember(
    connection: Connection, tenant: str, method: str, key: str, request_hash: str, result: Mapping[str, Any]
) -> None:
    """Keep the answer, plain JSON data, in the caller's transaction. Does nothing for an empty key."""
    if key:
        row = {"tenant": tenant, "method": method, "key": key, "request_hash": request_hash}
        connection.execute(insert(idempotency).values(**row, result=dict(result), created=now(connection)))


def forget(connection: Connection, before: float) -> int:
    """Remove answers kept before that time, in seconds since the epoch. Returns how many."""
    return connection.execute(delete(idempotency).where(idempotency.c.created < before)).rowcount
