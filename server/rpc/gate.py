"""The gate: nothing passes before warm-up has ended, nothing new passes while the server drains."""

import asyncio
from collections import Counter
from collections.abc import Collection
from enum import StrEnum
from typing import Any

from hueshift.adapters.errors import Reason, ResourceExhausted, Unavailable
from hueshift.server.rpc.call import CURRENT_CALL
from hueshift.server.rpc.handlers import Call, Interceptor, Proceed

# Long enough for a balancer to have noticed, short enough not to be felt.
_RETRY_SECONDS = 1.0


class GateState(StrEnum):
    """Where the server stands."""

    WARMING = "warming"
    OPEN = "open"
    DRAINING = "draining"


class Gate(Interceptor):
    """Counts the calls inside and lets them out. One event loop uses it.

    At most `most` calls are inside at a time, and of one tenant `each`, 0 for no limit: each holds memory, and an
    upload disk, before any quota of its tenant counts it. `resumable` names the streams that a client can take up again
    elsewhere (WatchFineTune): a drain ends them at once, because they may stay open for hours. Every other call inside
    gets the drain's time to finish.
    """

    def __init__(self, resumable: Collection[str], most: int = 0, each: int = 0) -> None:
        self._most, self._each = most, each
        self._of: Counter[str] = Counter()
        self._resumable = frozenset(resumable)
        self._inside: dict[asyncio.Timeout, str] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self.state = GateState.WARMING

    @property
    def inside(self) -> int:
        """Calls that have passed and not ended."""
        return len(self._inside)

    def open(self) -> None:
        """Let calls pass, unless the server drains already."""
        if self.state is GateState.WARMING:
            self.state = GateState.OPEN

    async def drain(self, seconds: float) -> int:
        """Refuse new calls and wait for those inside; return how many were cut off after `seconds`."""
        self.state = GateState.DRAINING
        for limit, method in list(self._inside.items()):
            if method in self._resumable:
                _end(limit)
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            return self.cut()
        return 0

    def cut(self) -> int:
        """End every call inside with UNAVAILABLE; return how many."""
        self.state = GateState.DRAINING
        for limit in list(self._inside):
            _end(limit)
        return len(self._inside)

    async def run(self, call: Call, request: Any, proceed: Proceed) -> Any:
        """Pass or refuse one call.

        Raises Unavailable (WARMING_UP, DRAINING), ResourceExhausted (TOO_MANY_CALLS, TENANT_QUOTA).
        """
        if not call.is_ours:
            return await proceed(request)
        if self.state is GateState.WARMING:
            raise Unavailable(
                Reason.WARMING_UP, "the server is warming up; its health turns to SERVING", retry_after=_RETRY_SECONDS
            )
        if self.state is GateState.DRAINING:
            raise _draining()
        if self._most and len(self._inside) >= self._most:
            raise ResourceExhausted(
                Reason.TOO_MANY_CALLS,
                f"{len(self._inside)} calls are inside; allowed: {self._most} (server.max_calls). Try again soon.",
                retry_after=_RETRY_SECONDS,
            )
        info = CURRENT_CALL.get(None)
        tenant = "" if info is None else info.tenant
        self._check_tenant(tenant)
        try:
            async with asyncio.timeout(None) as limit:
                self._inside[limit] = call.method
                self._of[tenant] += 1
                self._empty.clear()
                try:
                    return await proceed(request)
                finally:
                    del self._inside[limit]
                    self._of[tenant] -= 1
                    if not self._of[tenant]:
                        del self._of[tenant]
                    if not self._inside:
                        self._empty.set()
        except TimeoutError:
            if limit.expired():
                raise _draining() from None
            raise

    def _check_tenant(self, tenant: str) -> None:
        used = self._of[tenant]
        if self._each and used >= self._each:
            raise ResourceExhausted(
                Reason.TENANT_QUOTA,
                f"{used} calls of yours are inside; allowed: {self._each} (server.tenant_calls). End some of them.",
                metadata={"quota": "tenant_calls", "limit": str(self._each), "used": str(used)},
                retry_after=_RETRY_SECONDS,
            )


def _end(limit: asyncio.Timeout) -> None:
    if not limit.expired():
        limit.reschedule(asyncio.get_running_loop().time())


def _draining() -> Unavailable:
    return Unavailable(
        Reason.DRAINING, "the server is shutting down; another one takes the call", retry_after=_RETRY_SECONDS
    )
