"""Adapters at hand: a host tier of whole adapters, bounded by bytes, and a slot tier of composed rows in the engine.

Reading a file and composing a row happen on the threads that prepare requests. What is left to the engine's thread is
one copy of a finished row into a slot.
"""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from operator import itemgetter
from typing import Protocol

from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.blocks import Weight, add_weights
from hueshift.adapters.errors import Reason, ResourceExhausted
from hueshift.engines.interface import BASE_SLOT, EngineRow, UNetEngine
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text_side import TextSide, compose_text_side

Mix = tuple[tuple[str, Weight], ...]
"""Content hashes of adapters with their weights, sorted, each hash once. The empty mix is the base model."""


class Tier(StrEnum):
    """Where a row can be found."""

    HOST = "host"
    SLOT = "slot"


class ResidencyObserver(Protocol):
    """Hears what the caches do, from any thread."""

    def looked_up(self, tier: Tier, *, hit: bool) -> None:
        """Something was asked for, and was there or not."""

    def loaded(self, tier: Tier, seconds: float) -> None:
        """Something was brought in, in `seconds`."""

    def evicted(self, tier: Tier) -> None:
        """Something was thrown out."""

    def holds(self, tier: Tier, entries: int, nbytes: int) -> None:
        """The tier's contents changed."""


def make_mix(adapters: Iterable[tuple[str, Weight]]) -> Mix:
    """Return the canonical mix of (content hash, weight): sorted, equal hashes added up, zero weights left out.

    Weights by block are canonical when they come from `resolve_blocks`, so that equal mixes share a slot.
    """
    weights: dict[str, Weight] = {}
    for content_hash, weight in adapters:
        weights[content_hash] = add_weights(weights.get(content_hash, 0.0), weight)
    return tuple((key, weight) for key, weight in sorted(weights.items(), key=itemgetter(0)) if weight != 0)


class HostCache:
    """Adapters in host memory by content hash, least recently used out first. Safe to call from any thread.

    Several threads that miss the same adapter at once cause one `load`; they all get its result, or its error, and an
    error is not remembered. An adapter larger than `max_bytes` is handed out but not kept.
    """

    def __init__(self, load: Callable[[str], Adapter], max_bytes: int, observer: ResidencyObserver) -> None:
        self._load, self._max_bytes, self._observer = load, max_bytes, observer
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Adapter] = OrderedDict()
        self._nbytes = 0
        self._flights: dict[str, Future[Adapter]] = {}

    def get(self, content_hash: str) -> Adapter:
        """Return the adapter, loading it if need be. Raises what `load` raises."""
        with self._lock:
            adapter = self._held.get(content_hash)
            if adapter is not None:
                self._held.move_to_end(content_hash)
            flight = self._flights.get(content_hash)
            mine: Future[Adapter] = Future()
            if adapter is None and flight is None:
                self._flights[content_hash] = mine
        self._observer.looked_up(Tier.HOST, hit=adapter is not None)
        if adapter is not None:
            return adapter
        return flight.result() if flight is not None else self._fly(content_hash, mine)

    def drop(self, content_hashes: Iterable[str]) -> None:
        """Forget adapters; one that is being loaded right now is handed out but not kept."""
        with self._lock:
            for content_hash in content_hashes:
                self._flights.pop(content_hash, None)
                if content_hash in self._held:
                    self._forget(content_hash)
            self._tell()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._nbytes

    def __contains__(self, content_hash: str) -> bool:
        """True if the adapter is held."""
        return content_hash in self._held

    def __len__(self) -> int:
        """Adapters held."""
        return len(self._held)

    def _fly(self, content_hash: str, flight: Future[Adapter]) -> Adapter:
        begin = time.perf_counter()
        try:
            adapter = self._load(content_hash)
        except BaseException as error:
            with self._lock:
                self._land(content_hash, flight)
            flight.set_exception(error)
            raise
        self._observer.loaded(Tier.HOST, time.perf_counter() - begin)
        with self._lock:
            # A drop in the meantime took the flight away: then the adapter must not be kept.
            if self._land(content_hash, flight) and adapter.nbytes <= self._max_bytes:
                self._held[content_hash] = adapter
                self._nbytes += adapter.nbytes
                while self._nbytes > self._max_bytes:
                    self._forget(next(iter(self._held)))
                self._tell()
        flight.set_result(adapter)
        return adapter

    def _land(self, content_hash: str, flight: Future[Adapter]) -> bool:
        if self._flights.get(content_hash) is not flight:
            return False
        del self._flights[content_hash]
        return True

    def _forget(self, content_hash: str) -> None:
        self._nbytes -= self._held.pop(content_hash).nbytes
        self._observer.evicted(Tier.HOST)

    def _tell(self) -> None:
        self._observer.holds(Tier.HOST, len(self._held), self._nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedMix:
    """A mix ready to enter a slot. `row` is None for the base, and for a mix that was in a slot already.

    `text` is what its adapters teach the text side. `seconds` is what loading and composing took.
    """

    mix: Mix
    row: EngineRow | None = None
    needs_factored: bool = False
    text: TextSide = field(default_factory=TextSide)
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class _Resident:
    slot: int
    nbytes: int
    needs_factored: bool
    text: TextSide
    uses: int = 0
    pinned: bool = False
    doomed: bool = False


class SlotCache:
    """Which mix is in which slot of the engine; least recently used out first, never one in use or pinned.

    `prepare`, `resident` and `snapshot` may be called from any thread; the rest only from the engine's own.
    """

    def __init__(
        self,
        engine: UNetEngine,
        host: HostCache,
        rows: RowLayout,
        factors: SpectralFactors,
        norms: Mapping[str, Tensor],
        observer: ResidencyObserver,
    ) -> None:
        self._engine, self._host, self._observer = engine, host, observer
        self._rows, self._factors, self._norms = rows, factors, norms
        self._lock = threading.Lock()
        self._held: OrderedDict[Mix, _Resident] = OrderedDict()
        self._holders: Counter[str] = Counter()
        self._free = [slot for slot in range(engine.slots) if slot != BASE_SLOT][::-1]

    @property
    def host(self) -> HostCache:
        """The tier below."""
        return self._host

    def prepare(self, mix: Mix) -> PreparedMix:
        """Load and compose what `mix` needs; free of cost for the base and for a mix in a slot.

        Raises what loading raises, what RowLayout.compose raises, and InvalidArgument (ADAPTERS_INCOMPATIBLE) when two
        adapters learned the same word.
        """
        if not mix:
            return PreparedMix(mix)
        with self._lock:
            held = self._held.get(mix)
        self._observer.looked_up(Tier.SLOT, hit=held is not None)
        if held is not None:
            return PreparedMix(mix, None, held.needs_factored, held.text)
        begin = time.perf_counter()
        weighted = [(self._host.get(content_hash), weight) for content_hash, weight in mix]
        row = self._rows.compose(weighted, self._factors, self._norms)
        text = compose_text_side(weighted, self._factors)
        return PreparedMix(mix, row, row.needs_factored, text, time.perf_counter() - begin)

    def fits(self, prepared: PreparedMix) -> bool:
        """False if the mix was in a slot when it was prepared, but has been evicted since: prepare it again."""
        return not prepared.mix or prepared.row is not None or prepared.mix in self._held

    def acquire(self, prepared: PreparedMix) -> int | None:
        """Return the mix's slot, in use until `release`, or None while every slot is in use or pinned.

        Raises what the engine raises on a row that it cannot take.
        """
        if not prepared.mix:
            return BASE_SLOT
        held = self._held.get(prepared.mix)
        if held is None:
            slot = self._find_slot()
            if slot is None or prepared.row is None:
                return None
            held = self._bring_in(slot, prepared, prepared.row)
        held.uses += 1
        with self._lock:
            self._held.move_to_end(prepared.mix)
        return held.slot

    def acquire_all(self, prepared: Sequence[PreparedMix]) -> list[int] | None:
        """Return a slot for each mix, all in use until released one by one; or None, and then none is in use.

        Raises what `acquire` raises, and then none is in use either.
        """
        slots: dict[int, int] = {}
        try:
            # Those that are there first: bringing another in could evict them, and they may have no row any more.
            for number in sorted(range(len(prepared)), key=lambda number: prepared[number].row is not None):
                slot = self.acquire(prepared[number])
                if slot is None:
                    break
                slots[number] = slot
        finally:
            if len(slots) < len(prepared):
                for number in slots:
                    self.release(prepared[number].mix)
        return [slots[number] for number in range(len(prepared))] if len(slots) == len(prepared) else None

    def can_hold(self, mixes: Iterable[Mix]) -> bool:
        """False if so many slots are pinned for others that the mixes cannot be in slots together."""
        wanted = {mix for mix in mixes if mix}
        pinned = sum(held.pinned for mix, held in self._held.items() if mix not in wanted)
        return len(wanted) <= self._engine.slots - 1 - pinned

    def release(self, mix: Mix) -> None:
        """Give back one use of the mix."""
        if not mix:
            return
        held = self._held[mix]
        held.uses -= 1
        if held.doomed and held.uses == 0:
            self._evict(mix)

    def pin(self, prepared: PreparedMix, pinned: bool | None) -> None:
        """Bring the mix into a slot and, unless `pinned` is None, keep it there for good or no longer.

        Raises ResourceExhausted (SLOTS_EXHAUSTED) if no slot is free, or if no slot would be left to evict.
        """
        if not prepared.mix:
            return
        held = self._held.get(prepared.mix)
        newly = pinned is True and (held is None or not held.pinned)
        if newly and 1 + sum(other.pinned for other in self._held.values()) >= self._engine.slots - 1:
            raise ResourceExhausted(
                Reason.SLOTS_EXHAUSTED,
                f"all but one of the engine's {self._engine.slots - 1} adapter slots are pinned; unpin an adapter, or "
                "raise the setting engine.slots",
            )
        if self.acquire(prepared) is None:
            raise ResourceExhausted(
                Reason.SLOTS_EXHAUSTED,
                "every adapter slot of the engine is in use by a running picture or pinned; try again",
                retry_after=1.0,
            )
        if pinned is not None:
            self._held[prepared.mix].pinned = pinned
        self.release(prepared.mix)

    def drop(self, content_hashes: Iterable[str]) -> None:
        """Evict every mix that holds one of the adapters, pinned or not; one in use goes when its last use ends."""
        gone = set(content_hashes)
        self._host.drop(gone)
        for mix in [mix for mix in self._held if any(content_hash in gone for content_hash, _ in mix)]:
            held = self._held[mix]
            held.pinned, held.doomed = False, True
            if held.uses == 0:
                self._evict(mix)

    def slot_of(self, mix: Mix) -> int | None:
        """The slot that holds a mix, None if none does."""
        if not mix:
            return BASE_SLOT
        held = self._held.get(mix)
        return None if held is None else held.slot

    def resident(self, content_hash: str) -> bool:
        """True if some slot holds a mix with the adapter."""
        with self._lock:
            return self._holders[content_hash] > 0

    def snapshot(self) -> dict[str, int]:
        """Slots held, their uses by running samples, and slots pinned."""
        with self._lock:
            held = list(self._held.values())
        return {"held": len(held), "uses": sum(r.uses for r in held), "pinned": sum(r.pinned for r in held)}

    def _find_slot(self) -> int | None:
        if not self._free:
            idle = next((mix for mix, r in self._held.items() if r.uses == 0 and not r.pinned), None)
            if idle is None:
                return None
            self._evict(idle)
        return self._free[-1]

    def _bring_in(self, slot: int, prepared: PreparedMix, row: EngineRow) -> _Resident:
        begin = time.perf_counter()
        # The slot stays on the free list until the copy is made, so that a row the engine refuses costs no slot.
        self._engine.load_row(slot, row)
        self._observer.loaded(Tier.SLOT, time.perf_counter() - begin)
        held = _Resident(slot, row.nbytes + prepared.text.nbytes, prepared.needs_factored, prepared.text)
        with self._lock:
            self._free.pop()
            self._held[prepared.mix] = held
            self._holders.update(content_hash for content_hash, _ in prepared.mix)
        self._tell()
        return held

    def _evict(self, mix: Mix) -> None:
        with self._lock:
            self._free.append(self._held.pop(mix).slot)
            self._holders -= Counter(content_hash for content_hash, _ in mix)
        self._observer.evicted(Tier.SLOT)
        self._tell()

    def _tell(self) -> None:
        self._observer.holds(Tier.SLOT, len(self._held), sum(r.nbytes for r in self._held.values()))
