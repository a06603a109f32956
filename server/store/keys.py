"""API keys: 256 random bits each, shown once, stored as SHA-256 only.

A slow password hash would add nothing against 256 random bits, and every call verifies a key.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from sqlalchemy import insert, select, update

from hueshift.adapters.errors import InvalidArgument
from hueshift.server.clock import Clock
from hueshift.server.rpc.names import check_id
from hueshift.server.store.database import Database
from hueshift.server.store.tables import api_keys

_PREFIX = "hs"
_ID_BYTES = 8
_SECRET_BYTES = 32
_SECRET = re.compile(rf"{_PREFIX}_([0-9a-f]{{{2 * _ID_BYTES}}})_[A-Za-z0-9_-]{{43}}")
_KEY_ID = re.compile(rf"[0-9a-f]{{{2 * _ID_BYTES}}}")
_MAX_LABEL = 120


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key without its secret. Times are seconds since the epoch; `revoked` is None while the key is valid."""

    key_id: str
    tenant: str
    label: str
    created: float
    revoked: float | None


class KeyStore:
    """The API keys of all tenants. Safe for several threads and processes."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def create(self, tenant: str, label: str = "") -> tuple[str, str]:
        """Make a key and return (key id, secret); the secret cannot be read again.

        Raises InvalidArgument on a malformed tenant or a label above 120 printable characters.
        """
        check_id(tenant, "tenant")
        if len(label) > _MAX_LABEL or not label.isprintable():
            raise InvalidArgument.for_field(
                "label", f"{label[:40]!r} ({len(label)} characters) given; allowed: at most {_MAX_LABEL} printable ones"
            )
        key_id = secrets.token_hex(_ID_BYTES)
        secret = f"{_PREFIX}_{key_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
        row = {"key_id": key_id, "secret_hash": _hash(secret), "tenant": tenant, "label": label}
        with self._database.write() as connection:
            connection.execute(insert(api_keys).values(**row, created=self._clock.time()))
        return key_id, secret

    def verify(self, secret: str) -> str | None:
        """Return the tenant of a valid key, None for anything else."""
        match = _SECRET.fullmatch(secret)
        if match is None:
            return None
        with self._database.read() as connection:
            row = connection.execute(
                select(api_keys.c.secret_hash, api_keys.c.tenant, api_keys.c.revoked).where(
                    api_keys.c.key_id == match[1]
                )
            ).one_or_none()
        # An unknown id is compared too, so that it takes the same time as a wrong secret.
        equal = hmac.compare_digest(_hash(secret), row.secret_hash if row is not None else "0" * 64)
        if row is None or not equal or row.revoked is not None:
            return None
        tenant: str = row.tenant
        return tenant

    def list(self) -> tuple[KeyRecord, ...]:
        """Return every key, oldest first, without secrets and their hashes."""
        columns = (api_keys.c.key_id, api_keys.c.tenant, api_keys.c.label, api_keys.c.created, api_keys.c.revoked)
        with self._database.read() as connection:
            rows = connection.execute(select(*columns).order_by(api_keys.c.created, api_keys.c.key_id))
            return tuple(KeyRecord(*row) for row in rows)

    def revoke(self, key_id: str) -> bool:
        """Make a key invalid. Returns False if there is no such key or it was revoked before."""
        if not _KEY_ID.fullmatch(key_id):
            return False
        with self._database.write() as connection:
            result = connection.execute(
                update(api_keys)
                .where(api_keys.c.key_id == key_id, api_keys.c.revoked.is_(None))
                .values(revoked=self._clock.time())
            )
        return result.rowcount == 1

    def any(self) -> bool:
        """Return True once a key was ever made: revoking the last one must not open the server to keyless calls."""
        with self._database.read() as connection:
            return connection.execute(select(api_keys.c.key_id).limit(1)).first() is not None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
