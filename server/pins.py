"""Pinned adapters stay in the engine: each by its newest revision, whoever made that, and on every server of a store.

A pin is the adapter's. A fine-tuning job that publishes a revision is another process, and so may be the server that
was asked to pin; so the table is looked at every few seconds, and the slots follow it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence, Set
from typing import Protocol, TypeVar

import structlog

from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.engines.residency import NO_WEIGHTS
from hueshift.server.clock import Clock
from hueshift.server.logs import tenant_hash
from hueshift.server.outages import Observer
from hueshift.server.rounds import keep_doing
from hueshift.server.store.adapter_records import AdapterRecord

T = TypeVar("T")
Mix = tuple[tuple[str, float], ...]
Pin = tuple[str, str, str]
"""Tenant, adapter id, and the content hash of the row that is pinned for it."""
# A picture with the new revision loads it by itself; until then only the pin is late.
EVERY_SECONDS = 2.0


class PinTable(Protocol):
    """The part of the adapter store that is needed here."""

    def pinned(self) -> Sequence[AdapterRecord]:
        """Return the pinned adapters of all tenants."""
        ...


class Slots(Protocol):
    """The part of the scheduler that is needed here."""

    async def warm(self, mix: Mix, pin: bool | None) -> bool:
        """Load the row of a mix; True pins it, False unpins it."""
        ...

    def resident(self, content_hash: str) -> bool:
        """Return True while a row made of that file is loaded."""
        ...


class Pins:
    """What this server keeps pinned. One event loop uses it."""

    def __init__(self, table: PinTable, slots: Slots) -> None:
        self._table, self._slots = table, slots
        self._held: set[Pin] = set()
        # Told once: what fails is tried again in every round.
        self._told: set[Pin] = set()
        # Pins for which there are no weights of their own beside what was held then: as long as that stays, each try
        # would only read 1.7 GB again.
        self._no_weights: dict[Pin, frozenset[Pin]] = {}
        self._lock = asyncio.Lock()
        self._log = structlog.get_logger()

    async def note(self, pin: Pin, record: Callable[[], Awaitable[T]]) -> T:
        """Know of a row that was pinned without this, while `record` writes its pin to the table; return what it does.

        Meanwhile nothing follows the table, which would take the row for one that nobody wants any more.
        """
        async with self._lock:
            # First: a row whose pin cannot be written is let go in the next round.
            self._held.add(pin)
            return await record()

    async def follow(self) -> int:
        """Bring the slots to what the table says; return how many adapters are pinned now.

        What cannot be loaded is logged, and tried again the next time. Raises as the table does.
        """
        async with self._lock:
            records = await asyncio.to_thread(self._table.pinned)
            wanted = {(record.tenant, record.adapter_id, record.newest.content_hash) for record in records}
            before = set(self._held)
            # A row of two adapters goes with the one that is deleted; the pin of the other brings it back.
            lost = {pin for pin in wanted & before if not self._slots.resident(pin[2])}
            self._no_weights = {pin: held for pin, held in self._no_weights.items() if pin in wanted}
            for pin in sorted((wanted - before) | lost):
                if self._no_weights.get(pin) == frozenset(self._held):
                    continue
                if not await self._pin(pin):
                    # Each try would load and compose a row, and push others out of memory, every two seconds.
                    break
            for pin in sorted(before - wanted):
                await self._unpin(pin, {content_hash for _, _, content_hash in wanted})
            self._told &= wanted | self._held
            return len(self._held & wanted)

    async def keep(
        self, every: float = EVERY_SECONDS, observer: Observer | None = None, clock: Clock | None = None
    ) -> None:
        """Follow the table until cancelled. A store that does not answer is asked again in the next round."""
        await keep_doing("pins", every, self.follow, observer, clock=clock)

    async def _pin(self, pin: Pin) -> bool:
        """Pin a row; False if there is no slot, for this one or any other. Where weights are lacking others go on."""
        content_hash = pin[2]
        try:
            await self._slots.warm(((content_hash, 1.0),), True)
        except HueshiftError as error:
            self._tell("pin failed", pin, error)
            weights = error.metadata == NO_WEIGHTS
            if weights and error.retry_after is None:
                self._no_weights[pin] = frozenset(self._held)
            return weights or error.reason is not Reason.SLOTS_EXHAUSTED
        self._held.add(pin)
        return True

    async def _unpin(self, pin: Pin, wanted: Set[str]) -> None:
        content_hash = pin[2]
        # Two adapters of one file share a row, and a row that is gone must not be loaded to be unpinned.
        if content_hash not in wanted and self._slots.resident(content_hash):
            try:
                await self._slots.warm(((content_hash, 1.0),), False)
            except HueshiftError as error:
                # Still held: the next round tries again, or nobody could ever have its slot.
                self._tell("unpin failed", pin, error)
                return
        self._held.discard(pin)

    def _tell(self, what: str, pin: Pin, error: HueshiftError) -> None:
        """Log a failure, once for each pin."""
        if pin not in self._told:
            self._told.add(pin)
            self._log.warning(what, tenant_hash=tenant_hash(pin[0]), reason=error.reason)
