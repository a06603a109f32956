"""Adapters at hand: bounded, least recently used out first, loaded once, never evicted from under a sample."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_engine import FakeEngine
from residency_log import ResidencyLog
from tiny_layout import lowrank_adapter, spectral_adapter, tiny_rows

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import InvalidArgument, NotFound, Reason, ResourceExhausted
from hueshift.engines.interface import BASE_SLOT, EngineRow
from hueshift.engines.mixes import make_mix
from hueshift.engines.residency import SlotCache
from hueshift.engines.residency_host import HostCache, RowCache
from hueshift.engines.residency_tiers import Tier
from hueshift.engines.text_side import merge_words
from hueshift.engines.transfer import pinned_bytes

SIZE = spectral_adapter(1).nbytes


class Store:
    """Counts loads. Adapter `n` has mark n; even ones are spectral."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def load(self, content_hash: str) -> Adapter:
        """Build an adapter once the gate is open."""
        self.loads.append(content_hash)
        assert self.gate.wait(10)
        if content_hash == "missing":
            raise NotFound(Reason.ADAPTER_NOT_FOUND, "gone")
        mark = float(content_hash)
        return spectral_adapter(mark) if mark % 2 == 0 else lowrank_adapter(mark)


def caches(slots: int = 4, max_bytes: int = 10**6) -> tuple[SlotCache, FakeEngine, Store, ResidencyLog]:
    """Both tiers over a counting store."""
    store, log, engine = Store(), ResidencyLog(), FakeEngine(slots=slots)
    host = HostCache(store.load, max_bytes, log)
    return SlotCache(engine, RowCache(host, *tiny_rows(), max_bytes, log), log), engine, store, log


def test_host_cache_keeps_the_recently_used_within_its_bytes() -> None:
    store, log = Store(), ResidencyLog()
    host = HostCache(store.load, 2 * SIZE, log)
    for key in ("2", "4", "2", "6"):
        host.get(key)
    assert ("2" in host, "4" in host, "6" in host) == (True, False, True)
    assert host.nbytes == 2 * SIZE
    assert log.contents[Tier.HOST] == (2, 2 * SIZE)
    assert log.counts == {"host hits": 1, "host misses": 3, "host loads": 3, "host evictions": 1}


@pytest.mark.parametrize(
    ("nbytes", "taken"), [(0, 0), (1, 1), (4096, 4096), (4097, 8192), (77 << 20, 128 << 20), (3 << 30, 4 << 30)]
)
def test_page_locked_blocks_are_powers_of_two(nbytes: int, taken: int) -> None:
    assert pinned_bytes(nbytes) == taken


def test_host_cache_hands_out_what_it_cannot_keep() -> None:
    host = HostCache(Store().load, 1, ResidencyLog())
    assert host.get("2").norm
    assert len(host) == 0


def test_loads_once_for_many_threads() -> None:
    store = Store()
    host = HostCache(store.load, 10**6, ResidencyLog())
    store.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(host.get, "2") for _ in range(8)]
        while not store.loads:
            pass
        store.gate.set()
        adapters = {id(future.result(10)) for future in waiting}
    assert len(adapters) == 1
    assert store.loads == ["2"]


def test_a_failed_load_reaches_all_and_is_not_remembered() -> None:
    store = Store()
    host = HostCache(store.load, 10**6, ResidencyLog())
    store.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(host.get, "missing") for _ in range(4)]
        while not store.loads:
            pass
        store.gate.set()
        assert all(isinstance(future.exception(10), NotFound) for future in waiting)
    with pytest.raises(NotFound):
        host.get("missing")
    assert store.loads[-1] == "missing"


def test_an_adapter_dropped_while_it_loads_is_not_kept() -> None:
    store = Store()
    host = HostCache(store.load, 10**6, ResidencyLog())
    store.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(host.get, "2")
        while not store.loads:
            pass
        host.drop(["2"])
        store.gate.set()
        assert waiting.result(10).norm
    assert "2" not in host


def test_mixes_are_canonical() -> None:
    assert make_mix([("b", 1.0), ("a", 0.5), ("b", -0.25), ("c", 0.0)]) == (("a", 0.5), ("b", 0.75))
    assert make_mix([("a", 1.0), ("a", -1.0)]) == ()


def test_the_base_needs_nothing() -> None:
    slots, engine, store, _ = caches()
    prepared = slots.prepare(())
    assert slots.acquire(prepared) == BASE_SLOT
    slots.release(())
    assert (engine.loads, store.loads) == ([], [])


def test_rows_are_loaded_once_and_reused() -> None:
    slots, engine, store, log = caches()
    mix = make_mix([("3", 0.5), ("2", 1.0)])
    first = slots.prepare(mix)
    slot = slots.acquire(first)
    assert slot is not None
    again = slots.prepare(mix)
    assert again.row is None
    assert again.needs_factored
    assert slots.acquire(again) == slot
    assert engine.loads == [slot]
    assert sorted(store.loads) == ["2", "3"]
    assert engine.marks[slot] == pytest.approx(2 * 1.0 + 3 * 0.5)
    assert log.counts["slot hits"] == log.counts["slot misses"] == 1
    assert slots.resident("3")
    assert not slots.resident("5")


def test_only_idle_slots_are_evicted_oldest_first() -> None:
    slots, _, _, log = caches(slots=3)
    one, two, three = (make_mix([(key, 1.0)]) for key in ("1", "2", "3"))
    for mix in (one, two):
        assert slots.acquire(slots.prepare(mix)) is not None
    third = slots.prepare(three)
    assert slots.acquire(third) is None
    slots.release(two)
    slots.release(one)
    # Mix one was released last, but mix two was acquired last: use, not release, counts.
    assert slots.acquire(third) is not None
    assert (slots.resident("1"), slots.resident("2"), slots.resident("3")) == (False, True, True)
    assert log.counts["slot evictions"] == 1
    slots.release(three)
    assert slots.snapshot() == {"held": 2, "uses": 0, "pinned": 0}


def test_an_evicted_mix_must_be_prepared_again() -> None:
    slots, _, _, _ = caches(slots=2)
    one, two = make_mix([("1", 1.0)]), make_mix([("2", 1.0)])
    slots.acquire(slots.prepare(one))
    slots.release(one)
    stale = slots.prepare(one)
    assert slots.fits(stale)
    slots.acquire(slots.prepare(two))
    slots.release(two)
    assert not slots.fits(stale)
    assert slots.acquire(stale) is None
    assert slots.acquire(slots.prepare(one)) is not None


def test_pins_hold_and_leave_a_slot_for_others() -> None:
    slots, _, _, _ = caches(slots=3)
    one, two = (slots.prepare(make_mix([(key, 1.0)])) for key in ("1", "2"))
    slots.pin(one, True)
    with pytest.raises(ResourceExhausted) as refused:
        slots.pin(two, True)
    assert refused.value.reason is Reason.SLOTS_EXHAUSTED
    for key in ("3", "5", "7"):
        mix = make_mix([(key, 1.0)])
        assert slots.acquire(slots.prepare(mix)) is not None
        slots.release(mix)
    assert slots.resident("1")
    slots.pin(one, None)
    assert slots.snapshot()["pinned"] == 1
    slots.pin(one, False)
    slots.pin(two, True)
    assert slots.snapshot()["pinned"] == 1


def test_dropping_evicts_at_once_or_after_the_last_use() -> None:
    slots, _, _, _ = caches()
    shared, alone, other = (make_mix(m) for m in ([("1", 1.0), ("2", 1.0)], [("1", 1.0)], [("2", 1.0)]))
    for mix in (shared, alone, other):
        slots.acquire(slots.prepare(mix))
    slots.release(alone)
    slots.release(other)
    slots.drop(["1"])
    assert "1" not in slots.host
    assert slots.snapshot() == {"held": 2, "uses": 1, "pinned": 0}
    slots.release(shared)
    assert not slots.resident("1")
    assert slots.resident("2")


def test_a_row_the_engine_refuses_costs_no_slot() -> None:
    class Picky(FakeEngine):
        def load_row(self, slot: int, row: EngineRow) -> None:
            if row.spectral is not None:
                raise InvalidArgument(Reason.ADAPTER_SHAPE_MISMATCH, "no")
            super().load_row(slot, row)

    store, log = Store(), ResidencyLog()
    slots = SlotCache(Picky(slots=2), RowCache(HostCache(store.load, 10**6, log), *tiny_rows(), 10**6, log), log)
    with pytest.raises(InvalidArgument):
        slots.acquire(slots.prepare(make_mix([("2", 1.0)])))
    assert slots.acquire(slots.prepare(make_mix([("1", 1.0)]))) is not None


def test_two_meanings_of_a_word_are_refused() -> None:
    one, two = torch.ones(1, 4), torch.zeros(1, 4)
    assert merge_words(
        [spectral_adapter(1, {"sks": one}), lowrank_adapter(1, {"sks": one.clone(), "fox": two})]
    ).keys() == {
        "sks",
        "fox",
    }
    with pytest.raises(InvalidArgument) as refused:
        merge_words([spectral_adapter(1, {"sks": one}), spectral_adapter(1, {"sks": two})])
    assert refused.value.reason is Reason.ADAPTERS_INCOMPATIBLE
