"""The cost model in the step loop: merged weights for bursts, and nobody waits longer for it.

The clock moves by what the table says each call costs, so every run of these is the same.
"""

from fake_clock import FakeClock
from generation_bench import IDLE, Bench, counts, images
from merging_engine import MergingFakeEngine

from hueshift.engines.cost_model import CostTable
from hueshift.engines.interface import Plan

SIZE = (8, 8)
DENSE = {1: 5.8, 2: 10.1, 4: 15.8, 8: 27.8}
FACTORED = {1: 8.1, 2: 13.2, 4: 19.8, 8: 34.4}
TABLE = CostTable(
    {(Plan.DENSE, rows, SIZE): ms for rows, ms in DENSE.items()}
    | {(Plan.FACTORED, rows, SIZE): ms for rows, ms in FACTORED.items()}
    | {(Plan.MERGED, rows, SIZE): ms for rows, ms in DENSE.items()},
    merge_ms=5.4,
    overhead_ms=0.3,
)


def make_bench(*, planned: bool, weight_slots: int = 1) -> tuple[Bench, MergingFakeEngine]:
    """A bench whose clock the engine moves."""
    clock = FakeClock()
    engine = MergingFakeEngine(TABLE, clock, weight_slots=weight_slots)
    return Bench(engine=engine, clock=clock, table=TABLE if planned else None), engine


async def finish_times(*, planned: bool) -> dict[str, float]:
    """A tenant floods the queue with one adapter; others come one by one with their own. Seconds until each is done."""
    bench, _ = make_bench(planned=planned)
    begin = bench.clock.monotonic()
    flood = [bench.submit("flood", {"spec-0.1": 1.0}, steps=20) for _ in range(48)]
    bench.turn(5)
    others = {}
    for number in range(2, 7):
        others[f"t{number}"] = bench.submit(f"t{number}", {f"spec-0.{number}": 1.0}, steps=20)
        bench.turn(3)
    done: dict[str, float] = {}
    for _ in range(10_000):
        bench.turn()
        bench.decode()
        for name, handle in others.items():
            if name not in done and handle.stream.closed:
                done[name] = bench.clock.monotonic() - begin
        if bench.scheduler.snapshot().live == 0:
            break
    for handle in (*flood, *others.values()):
        assert len(await images(handle)) == 1
    assert counts(bench) == IDLE
    return done | {"all": bench.clock.monotonic() - begin}


async def test_nobody_waits_longer_for_the_choice() -> None:
    plain, planned = await finish_times(planned=False), await finish_times(planned=True)
    assert planned["all"] < plain["all"]
    for name, seconds in plain.items():
        assert planned[name] <= seconds * 1.02, name


async def test_a_burst_of_one_adapter_is_merged_and_a_crowd_is_not() -> None:
    bench, engine = make_bench(planned=True)
    one = bench.submit("a", {"spec-0.1": 1.0}, steps=20)
    bench.run()
    assert engine.merges == [1]
    assert (await images(one))[0].plans == (Plan.FACTORED, Plan.MERGED)
    crowd = [bench.submit(f"t{i}", {f"spec-0.{i}": 1.0}, steps=20) for i in range(2, 9)]
    bench.turn(4)
    assert engine.merges == [1]
    assert engine.calls[-1] == (Plan.FACTORED, 7)
    bench.run()
    for handle in crowd:
        assert len(await images(handle)) == 1


async def test_pictures_are_the_same_however_they_are_divided() -> None:
    found = []
    for planned in (False, True):
        bench, engine = make_bench(planned=planned, weight_slots=2)
        handles = [bench.submit(f"t{i}", {f"{kind}-0.{i}": 1.0}) for i, kind in enumerate(("spec", "low", "spec"), 1)]
        handles += [bench.submit("u", {"low-0.5": 1.0}, seeds=(1, 2, 3))]
        bench.run()
        found.append([image.data for handle in handles for image in await images(handle)])
        if planned:
            assert len({plan for plan, _ in engine.calls}) > 1
            assert bench.value("hueshift_batch_splits_total", reason="cost") > 0
    assert found[0] == found[1]


async def test_adapters_are_fetched_when_a_request_is_accepted() -> None:
    bench = Bench()
    handle = bench.submit("a", {"spec-0.1": 1.0, "low-0.2": 0.5})
    # Before the loop has had a turn.
    assert sorted(bench.folder.loads) == ["low-0.2", "spec-0.1"]
    bench.run()
    assert len(bench.folder.loads) == 2
    assert len(await images(handle)) == 1
    assert bench.value("hueshift_adapter_cache_hits_total", tier="rows") == 1
