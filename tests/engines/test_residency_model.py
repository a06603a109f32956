"""The tiers against a model, by random histories: budgets, pins, uses, single flight, and never a stale row."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import FakeEngine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from residency_log import ResidencyLog
from tiny_layout import lowrank_adapter, spectral_adapter, tiny_rows

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import ResourceExhausted
from hueshift.engines.interface import BASE_SLOT
from hueshift.engines.mixes import Mix, make_mix
from hueshift.engines.residency import PreparedMix, SlotCache
from hueshift.engines.residency_host import HostCache, RowCache
from hueshift.engines.residency_tiers import Tier

KEYS = tuple("abcde")
SLOTS = 4
ADAPTER_BYTES = spectral_adapter(1.0).nbytes
MIXES = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from((0.5, 1.0))), min_size=0, max_size=2).map(make_mix)


class Files:
    """The store: what a key names changes when it is dropped, as if another file had come under the same name."""

    def __init__(self) -> None:
        self.marks = {key: float(number) for number, key in enumerate(KEYS, 1)}
        self.loads = 0

    def load(self, key: str) -> Adapter:
        """Make the adapter as it is now."""
        self.loads += 1
        make = spectral_adapter if key in "ace" else lowrank_adapter
        return make(self.marks[key])

    def replace(self, key: str) -> None:
        """Put another one there."""
        self.marks[key] += 100.0

    def mark(self, mix: Mix) -> float:
        """What the row of a mix sums to now."""
        plain = [(key, weight) for key, weight in mix if isinstance(weight, float)]
        return sum(self.marks[key] * weight for key, weight in plain)


class Tiers(RuleBasedStateMachine):
    """Requests prepare, acquire and release; operators pin and drop; files change when they are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.files, self.log, self.engine = Files(), ResidencyLog(), FakeEngine(slots=SLOTS)
        self.host = HostCache(self.files.load, 3 * ADAPTER_BYTES, self.log)
        self.rows = RowCache(self.host, *tiny_rows(), 200, self.log)
        self.slots = SlotCache(self.engine, self.rows, self.log)
        self.prepared: list[tuple[PreparedMix, float]] = []
        self.running: list[tuple[Mix, int, float]] = []
        self.pinned: set[Mix] = set()

    @rule(mix=MIXES)
    def prepare(self, mix: Mix) -> None:
        """A request comes."""
        self.prepared.append((self.slots.prepare(mix), self.files.mark(mix)))

    @rule(mix=MIXES)
    def prefetch(self, mix: Mix) -> None:
        """One is expected; asking twice loads nothing more."""
        self.slots.prefetch(mix)
        if mix in self.rows:
            loads = self.files.loads
            self.slots.prefetch(mix)
            assert self.files.loads == loads

    @precondition(lambda self: self.prepared)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        """It enters the batch, if a slot can be had."""
        prepared, mark = self.prepared.pop(data.draw(st.integers(0, len(self.prepared) - 1)))
        if not self.slots.fits(prepared):
            return
        slot = self.slots.acquire(prepared)
        if slot is None:
            in_the_way = {mix for mix, _, _ in self.running if mix} | self.pinned
            assert len(in_the_way - {prepared.mix}) >= SLOTS - 1
            return
        self.running.append((prepared.mix, slot, self.engine.marks[slot]))
        if not prepared.mix:
            assert slot == BASE_SLOT
        elif prepared.row is not None and slot in self.engine.loads[-1:]:
            assert self.engine.marks[slot] == pytest.approx(mark) or self.shared(prepared.mix)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """It leaves the batch."""
        mix, slot, mark = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        # Nobody overwrote the row from under it.
        assert self.engine.marks[slot] == mark
        self.slots.release(mix)

    @rule(mix=MIXES, wanted=st.booleans())
    def pin(self, mix: Mix, wanted: bool) -> None:
        """An operator pins or unpins."""
        try:
            self.slots.pin(self.slots.prepare(mix), wanted)
        except ResourceExhausted:
            return
        if mix:
            (self.pinned.add if wanted else self.pinned.discard)(mix)

    @rule(key=st.sampled_from(KEYS))
    def drop(self, key: str) -> None:
        """An adapter is deleted, and another comes under its key; what was prepared of the old one is thrown away."""
        self.files.replace(key)
        self.slots.drop([key])
        self.pinned = {mix for mix in self.pinned if all(name != key for name, _ in mix)}
        self.prepared = [one for one in self.prepared if all(name != key for name, _ in one[0].mix)]

    @rule(mix=MIXES)
    def a_new_request_sees_the_files_as_they_are(self, mix: Mix) -> None:
        """No tier hands out what was dropped, unless a running picture still holds the slot."""
        prepared = self.slots.prepare(mix)
        if prepared.row is not None:
            total = sum(float(part.sum()) for part in (prepared.row.spectral, prepared.row.lowrank) if part is not None)
            assert total == pytest.approx(self.files.mark(mix))

    @invariant()
    def budgets_and_pins_hold(self) -> None:
        """Bytes and slots stay within their bounds, and what is pinned stays."""
        assert self.host.nbytes <= 3 * ADAPTER_BYTES
        assert self.rows.nbytes <= 200
        snapshot = self.slots.snapshot()
        assert snapshot["held"] <= SLOTS - 1
        assert snapshot["uses"] == sum(1 for mix, _, _ in self.running if mix)
        assert snapshot["pinned"] == len(self.pinned)
        for mix in self.pinned:
            assert self.slots.slot_of(mix) is not None
        contents = self.log.contents.get(Tier.ROWS, (0, 0))
        assert contents == (len(self.rows), self.rows.nbytes)

    def shared(self, mix: Mix) -> bool:
        """True if a running picture holds the mix."""
        return any(other == mix for other, _, _ in self.running)


TestTiers = Tiers.TestCase
TestTiers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_many_threads_compose_a_mix_once() -> None:
    files, gate, log = Files(), threading.Event(), ResidencyLog()

    def load(key: str) -> Adapter:
        assert gate.wait(10)
        return files.load(key)

    rows = RowCache(HostCache(load, 10**6, log), *tiny_rows(), 10**6, log)
    mix = make_mix([("a", 1.0), ("b", 0.5)])
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(rows.get, mix) for _ in range(8)]
        while not rows.coming(mix):
            pass
        gate.set()
        composed = {id(future.result(10)) for future in waiting}
    assert len(composed) == 1
    assert files.loads == 2
    assert log.counts["rows loads"] == 1


def test_a_row_composed_while_its_adapter_is_dropped_is_not_kept() -> None:
    files, gate, log = Files(), threading.Event(), ResidencyLog()

    def load(key: str) -> Adapter:
        assert gate.wait(10)
        return files.load(key)

    rows = RowCache(HostCache(load, 10**6, log), *tiny_rows(), 10**6, log)
    mix = make_mix([("a", 1.0)])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(rows.get, mix)
        while not rows.coming(mix):
            pass
        rows.drop(["a"])
        gate.set()
        assert waiting.result(10).row.needs_factored
    assert mix not in rows
    assert len(rows.host) == 0


def test_a_mix_that_lost_its_slot_comes_back_without_its_adapters() -> None:
    files, log = Files(), ResidencyLog()
    engine = FakeEngine(slots=2)
    slots = SlotCache(engine, RowCache(HostCache(files.load, 0, log), *tiny_rows(), 10**6, log), log)
    for key in ("a", "b", "a"):
        mix = make_mix([(key, 1.0)])
        assert slots.acquire(slots.prepare(mix)) == 1
        slots.release(mix)
    assert files.loads == 2
    assert engine.marks[1] == pytest.approx(1.0)
    assert log.counts["rows hits"] == 1


def test_a_mix_that_is_pinned_after_it_was_dropped_stays_when_its_last_use_ends() -> None:
    files, log = Files(), ResidencyLog()
    slots = SlotCache(
        FakeEngine(slots=SLOTS), RowCache(HostCache(files.load, 10**6, log), *tiny_rows(), 10**6, log), log
    )
    mix = make_mix([("b", 0.5)])
    slot = slots.acquire(slots.prepare(mix))
    slots.drop(["b"])
    slots.pin(slots.prepare(mix), True)
    slots.release(mix)
    assert slots.slot_of(mix) == slot
    assert slots.snapshot() == {"held": 1, "uses": 0, "pinned": 1}
    # One that nobody pinned goes, as before.
    slots.pin(slots.prepare(mix), False)
    slots.acquire(slots.prepare(mix))
    slots.drop(["b"])
    slots.release(mix)
    assert slots.slot_of(mix) is None
