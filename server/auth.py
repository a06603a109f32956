"""Who calls: API keys sent as `authorization: Bearer hs_...`, mapped to tenants.

Without any key the server answers loopback callers as one tenant. From the first key on, every call needs one.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hueshift.adapters.errors import Reason, Unauthenticated
from hueshift.server.clock import Clock

# A revoked key stops working, and a first key starts to be asked for, within this time.
CACHE_SECONDS = 1.0
_CACHE_ENTRIES = 4096
_MAX_SECRET = 256


class Keys(Protocol):
    """The part of the key store that is needed here. Both calls read the database, so they run in a thread."""

    def verify(self, secret: str) -> str | None:
        """Return the tenant of a valid key, else None."""
        ...

    def any(self) -> bool:
        """Return True once a key was ever made, revoked ones too: revoking the last one lets no keyless call in."""
        ...


@dataclass(frozen=True, slots=True)
class _Answer:
    tenant: str | None
    expires: float


class Authenticator:
    """Finds the tenant of a call. One event loop uses it; threads read the database, once a second per key at most.

    `required` refuses keyless calls even while no key exists.
    """

    def __init__(self, keys: Keys, clock: Clock, *, default_tenant: str, required: bool) -> None:
        self._keys = keys
        self._clock = clock
        self._default_tenant = default_tenant
        self._required = required
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()
        self._keys_exist = False
        self._checked_until = float("-inf")

    async def tenant(self, authorization: Sequence[str]) -> str:
        """Return the tenant named by the values of the `authorization` metadata key.

        Raises Unauthenticated (CREDENTIAL_MISSING, CREDENTIAL_INVALID).
        """
        if not authorization:
            if self._required or await self._any():
                raise Unauthenticated(
                    Reason.CREDENTIAL_MISSING, "no API key was sent; send metadata 'authorization: Bearer hs_...'"
                )
            return self._default_tenant
        scheme, _, secret = authorization[0].partition(" ")
        if len(authorization) > 1 or scheme.lower() != "bearer" or not 0 < len(secret) <= _MAX_SECRET:
            raise Unauthenticated(
                Reason.CREDENTIAL_INVALID, "the credential is not one 'authorization: Bearer hs_...' value"
            )
        tenant = await self._verify(secret)
        if tenant is None:
            raise Unauthenticated(Reason.CREDENTIAL_INVALID, "the API key is unknown or revoked")
        return tenant

    async def _verify(self, secret: str) -> str | None:
        # Hashed, so that secrets do not stay in memory longer than their call.
        digest = hashlib.sha256(secret.encode(errors="replace")).digest()
        now = self._clock.monotonic()
        answer = self._answers.get(digest)
        if answer is None or answer.expires <= now:
            tenant = await asyncio.to_thread(self._keys.verify, secret)
            answer = _Answer(tenant, now + CACHE_SECONDS)
            self._answers[digest] = answer
            self._answers.move_to_end(digest)
            while len(self._answers) > _CACHE_ENTRIES:
                self._answers.popitem(last=False)
        return answer.tenant

    async def _any(self) -> bool:
        now = self._clock.monotonic()
        if now >= self._checked_until:
            self._keys_exist = await asyncio.to_thread(self._keys.any)
            self._checked_until = now + CACHE_SECONDS
        return self._keys_exist
