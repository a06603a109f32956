"""Adapters at hand in the engine: the slot tier, over composed rows and whole adapters (engines/residency_tiers.py).

Reading a file and composing a row happen on the threads that prepare requests. What is left to the engine's thread is
one copy of a finished row into a slot.
"""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from hueshift.adapters.errors import Reason, ResourceExhausted
from hueshift.engines.interface import BASE_SLOT, EngineRow, UNetEngine, dense_slots
from hueshift.engines.mixes import Mix
from hueshift.engines.residency_host import HostCache, RowCache
from hueshift.engines.residency_tiers import ResidencyObserver, Tier
from hueshift.engines.text_side import TextSide
from hueshift.engines.whole_rows import no_dense_deltas

# With SLOTS_EXHAUSTED where weights are lacking, not slots: mixes that need none may still find a slot.
NO_WEIGHTS = MappingProxyType({"setting": "engine.merged_slots"})


@dataclass(frozen=True, slots=True, eq=False)
class PreparedMix:
    """A mix ready to enter a slot. `row` is None for the base, and for a mix that was in a slot already.

    `needs_weights` as EngineRow's. `text` is what its adapters teach the text side. `seconds` is what loading and
    composing took.
    """

    mix: Mix
    row: EngineRow | None = None
    needs_factored: bool = False
    text: TextSide = field(default_factory=TextSide)
    seconds: float = 0.0
    needs_weights: bool = False


@dataclass(slots=True, eq=False)
class _Resident:
    slot: int
    nbytes: int
    needs_factored: bool
    text: TextSide
    needs_weights: bool = False
    uses: int = 0
    pinned: bool = False
    doomed: bool = False

    @property
    def busy(self) -> bool:
        """True if it must stay."""
        return self.uses > 0 or self.pinned


class SlotCache:
    """Which mix is in which slot of the engine; least recently used out first, never one in use or pinned.

    `prepare`, `prefetch`, `at_hand`, `resident` and `snapshot` may be called from any thread; the rest only from the
    engine's own.
    """

    def __init__(self, engine: UNetEngine, rows: RowCache, observer: ResidencyObserver) -> None:
        self._engine, self._rows, self._observer = engine, rows, observer
        self._lock = threading.Lock()
        self._held: OrderedDict[Mix, _Resident] = OrderedDict()
        self._holders: Counter[str] = Counter()
        self._free = [slot for slot in range(engine.slots) if slot != BASE_SLOT][::-1]

    @property
    def host(self) -> HostCache:
        """The tier of whole adapters."""
        return self._rows.host

    def prepare(self, mix: Mix) -> PreparedMix:
        """Load and compose what `mix` needs; free of cost for the base and for a mix in a slot.

        Raises what loading raises, what RowLayout.compose raises, InvalidArgument (ADAPTERS_INCOMPATIBLE) when two
        adapters learned the same word, and FailedPrecondition (PLAN_UNAVAILABLE) for dense deltas that the engine does
        not serve.
        """
        if not mix:
            return PreparedMix(mix)
        with self._lock:
            held = self._held.get(mix)
        self._observer.looked_up(Tier.SLOT, hit=held is not None)
        if held is not None:
            return PreparedMix(mix, None, held.needs_factored, held.text, needs_weights=held.needs_weights)
        begin = time.perf_counter()
        composed = self._rows.get(mix)
        seconds = time.perf_counter() - begin
        row = composed.row
        if row.needs_weights and not dense_slots(self._engine):
            raise no_dense_deltas(self._engine.name)
        return PreparedMix(mix, row, row.needs_factored, composed.text, seconds, row.needs_weights)

    def at_hand(self, mix: Mix) -> bool:
        """True if `prepare` would find all that it needs in memory, composed."""
        return not mix or mix in self._held or mix in self._rows

    def prefetch(self, mix: Mix) -> None:
        """Compose a mix ahead of its preparation, unless it is at hand or on its way. Raises what `prepare` raises."""
        if mix and mix not in self._held and not self._rows.coming(mix):
            self._rows.get(mix)

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
            if prepared.needs_weights and not self._find_weights():
                return None
            slot = self._find_slot()
            if slot is None or prepared.row is None:
                return None
            held = self._bring_in(slot, prepared, prepared.row)
        held.uses += 1
        with self._lock:
            self._held.move_to_end(prepared.mix)
        return held.slot

    def lacks_weights(self, prepared: Sequence[PreparedMix]) -> bool:
        """True if one of the mixes needs weights of its own, and all that the engine has are in use or pinned."""
        whole = self._whole()
        if len(whole) < dense_slots(self._engine) or not all(self._held[mix].busy for mix in whole):
            return False
        return any(one.needs_weights and one.mix not in self._held for one in prepared)

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
        whole = sum(held.pinned and held.needs_weights for held in self._held.values())
        if newly and prepared.needs_weights and 1 + whole >= dense_slots(self._engine):
            raise ResourceExhausted(
                Reason.SLOTS_EXHAUSTED,
                f"the adapter changes whole weights, of which the engine holds {dense_slots(self._engine)} at a time: "
                "with it pinned there would be none left for others; leave it unpinned, or raise engine.merged_slots",
                metadata=NO_WEIGHTS,
            )
        if self.acquire(prepared) is None:
            if self.lacks_weights([prepared]):
                raise ResourceExhausted(
                    Reason.SLOTS_EXHAUSTED,
                    "the adapter changes whole weights, and all that the engine holds are in use by running pictures "
                    "or pinned; try again",
                    metadata=NO_WEIGHTS,
                    retry_after=1.0,
                )
            raise ResourceExhausted(
                Reason.SLOTS_EXHAUSTED,
                "every adapter slot of the engine is in use by a running picture or pinned; try again",
                retry_after=1.0,
            )
        if pinned is not None:
            resident = self._held[prepared.mix]
            resident.pinned = pinned
            # Adapters are named by their content: one that was dropped, and is still in use, has come back as it was.
            resident.doomed = resident.doomed and not pinned
        self.release(prepared.mix)

    def drop(self, content_hashes: Iterable[str]) -> None:
        """Evict every mix that holds one of the adapters, pinned or not; one in use goes when its last use ends."""
        gone = set(content_hashes)
        self._rows.drop(gone)
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
            idle = next((mix for mix, held in self._held.items() if not held.busy), None)
            if idle is None:
                return None
            self._evict(idle)
        return self._free[-1]

    def _find_weights(self) -> bool:
        """Make room for one more mix with weights of its own; False while all that there is room for are in use."""
        whole = self._whole()
        if len(whole) < dense_slots(self._engine):
            return True
        idle = next((mix for mix in whole if not self._held[mix].busy), None)
        if idle is not None:
            self._evict(idle)
        return idle is not None

    def _whole(self) -> list[Mix]:
        return [mix for mix, held in self._held.items() if held.needs_weights]

    def _bring_in(self, slot: int, prepared: PreparedMix, row: EngineRow) -> _Resident:
        begin = time.perf_counter()
        # The slot stays on the free list until the copy is made, so that a row the engine refuses costs no slot.
        self._engine.load_row(slot, row)
        self._observer.loaded(Tier.SLOT, time.perf_counter() - begin)
        nbytes = row.nbytes + prepared.text.nbytes
        held = _Resident(slot, nbytes, prepared.needs_factored, prepared.text, prepared.needs_weights)
        with self._lock:
            self._free.pop()
            self._held[prepared.mix] = held
            self._holders.update(content_hash for content_hash, _ in prepared.mix)
        self._tell()
        return held

    def _evict(self, mix: Mix) -> None:
        with self._lock:
            held = self._held.pop(mix)
            self._free.append(held.slot)
            self._holders -= Counter(content_hash for content_hash, _ in mix)
        if held.needs_weights:
            # The engine keeps its weights until the slot holds another row.
            self._engine.load_row(held.slot, EngineRow())
        self._observer.evicted(Tier.SLOT)
        self._tell()

    def _tell(self) -> None:
        self._observer.holds(Tier.SLOT, len(self._held), sum(r.nbytes for r in self._held.values()))
