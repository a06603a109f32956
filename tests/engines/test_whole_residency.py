"""Mixes with dense deltas among the slots: as many at a time as the engine has weights for, and none left behind."""

import pytest
from fake_engine import FakeEngine
from residency_log import ResidencyLog
from tiny_layout import dense_adapter, lowrank_adapter, tiny_rows

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import FailedPrecondition, Reason, ResourceExhausted
from hueshift.engines.mixes import Mix, make_mix
from hueshift.engines.residency import NO_WEIGHTS, SlotCache
from hueshift.engines.residency_host import HostCache, RowCache


def load(content_hash: str) -> Adapter:
    """`d1` is dense, `l1` is not."""
    mark = float(content_hash[1:])
    return dense_adapter(mark) if content_hash.startswith("d") else lowrank_adapter(mark)


def caches(dense_slots: int, slots: int = 6) -> tuple[SlotCache, FakeEngine]:
    """Slots over an engine that holds so many."""
    engine, log = FakeEngine(slots=slots), ResidencyLog()
    engine.dense_slots = dense_slots
    host = HostCache(load, 10**6, log)
    return SlotCache(engine, RowCache(host, *tiny_rows(), 10**6, log), log), engine


def mix(*hashes: str) -> Mix:
    """Adapters at full weight."""
    return make_mix([(content_hash, 1.0) for content_hash in hashes])


def acquire(slots: SlotCache, *hashes: str) -> int | None:
    """Prepare and acquire a mix."""
    return slots.acquire(slots.prepare(mix(*hashes)))


def test_only_as_many_as_there_are_weights_and_others_go_on() -> None:
    slots, engine = caches(dense_slots=2)
    first, second = acquire(slots, "d1"), acquire(slots, "d2", "l1")
    assert engine.dense == {first, second}
    third = slots.prepare(mix("d3"))
    assert third.needs_weights
    assert slots.acquire(third) is None
    assert slots.lacks_weights([third])
    assert acquire(slots, "d1") == first
    others = [acquire(slots, f"l{number}") for number in (2, 3, 4)]
    assert None not in others
    # Slots are out now: that is no lack of weights.
    assert acquire(slots, "l5") is None
    assert not slots.lacks_weights([slots.prepare(mix("l5"))])
    slots.release(mix("d2", "l1"))
    assert not slots.lacks_weights([third])
    assert slots.acquire(third) == second
    assert engine.dense == {first, second}


def test_an_evicted_or_dropped_one_leaves_its_weights_at_once() -> None:
    slots, engine = caches(dense_slots=1)
    assert acquire(slots, "d1") is not None
    slots.release(mix("d1"))
    slots.drop(["d1"])
    assert engine.dense == frozenset()
    # Another slot than the one that it had: none of its weights may be in the way.
    assert acquire(slots, "l1") is not None
    assert acquire(slots, "d2") is not None
    assert len(engine.dense) == 1


def test_pins_leave_weights_for_others() -> None:
    slots, engine = caches(dense_slots=2)
    slots.pin(slots.prepare(mix("d1")), True)
    with pytest.raises(ResourceExhausted, match="holds 2 at a time") as refused:
        slots.pin(slots.prepare(mix("d2")), True)
    assert refused.value.reason is Reason.SLOTS_EXHAUSTED
    assert (refused.value.metadata, refused.value.retry_after) == (dict(NO_WEIGHTS), None)
    assert acquire(slots, "d5") is not None
    with pytest.raises(ResourceExhausted, match="in use by running pictures") as busy:
        slots.pin(slots.prepare(mix("d2")), None)
    assert (busy.value.metadata, busy.value.retry_after) == (dict(NO_WEIGHTS), 1.0)
    slots.release(mix("d5"))
    for number in (3, 4):
        assert acquire(slots, f"d{number}") is not None
        slots.release(mix(f"d{number}"))
    assert slots.resident("d1")
    assert len(engine.dense) == 2


def test_an_engine_without_weights_refuses_when_it_is_prepared() -> None:
    slots, engine = caches(dense_slots=0)
    with pytest.raises(FailedPrecondition, match=r"the fake engine does not serve") as refused:
        slots.prepare(mix("d1"))
    assert refused.value.reason is Reason.PLAN_UNAVAILABLE
    assert engine.loads == []
