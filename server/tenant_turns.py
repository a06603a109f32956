"""Few places for work of one kind, for which tenants take turns: a burst of one does not keep the others waiting."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hueshift.server.fair_queue import FairQueue

Turn = asyncio.Future[None]


class TenantTurns:
    """At most `places` blocks run at a time. One event loop uses it."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: FairQueue[tuple[str, Turn]] = FairQueue()

    @asynccontextmanager
    async def taken(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a place and hold it while the block runs."""
        await self._take(tenant)
        try:
            yield
        finally:
            self._give_back()

    async def _take(self, tenant: str) -> None:
        if self._free:
            self._free -= 1
            return
        turn: Turn = asyncio.get_running_loop().create_future()
        mine = (tenant, turn)
        self._waiting.push(tenant, mine)
        try:
            await turn
        except asyncio.CancelledError:
            self._waiting.remove(tenant, mine)
            if turn.done() and not turn.cancelled():
                # The place came in the same moment.
                self._give_back()
            raise

    def _give_back(self) -> None:
        following = self._waiting.first(lambda waiting: not waiting[1].done())
        if following is None:
            self._free += 1
            return
        tenant, turn = following
        self._waiting.charge(tenant, 1.0)
        self._waiting.remove(tenant, following)
        turn.set_result(None)
