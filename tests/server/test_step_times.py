"""The overhead of the step loop: what it takes beside the engine's calls, unless the device works meanwhile."""

import torch
from fake_clock import FakeClock
from fake_engine import FakeEngine
from generation_bench import Bench
from recording_lane import RecordingLane
from tiny_unet import SD1_LIKE, tiny_parts
from torch import Tensor

from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_options import CudaOptions
from hueshift.engines.interface import Plan, RunsAhead

LOOP, CALLS = "hueshift_step_loop_seconds_total", "hueshift_step_call_seconds_total"


class AheadEngine(FakeEngine):
    """An engine whose device still works when the next call comes, if `working` says so."""

    working = False


def make(engine: FakeEngine, clock: FakeClock) -> Bench:
    """A bench whose calls take 4 seconds, and what the loop does between two of them 1."""

    def call(plan: Plan, rows: Tensor) -> None:
        clock.advance(4)

    engine.on_call = call
    bench = Bench(engine=engine, clock=clock)
    report = bench.scheduler._loop._report

    def slowly() -> None:
        report()
        clock.advance(1)

    bench.scheduler._loop._report = slowly  # type: ignore[method-assign]
    return bench


async def test_the_overhead_is_what_the_loop_takes_beside_its_calls() -> None:
    clock = FakeClock()
    bench = make(FakeEngine(), clock)
    bench.submit(steps=4)
    bench.run()
    assert (bench.value(LOOP), bench.value(CALLS)) == (20, 16)
    # An idle loop counts nothing, however long.
    clock.advance(1000)
    bench.turn(3)
    bench.submit(steps=1)
    bench.run()
    assert (bench.value(LOOP), bench.value(CALLS)) == (25, 20)
    bench.scheduler.close()


async def test_work_beside_a_busy_device_is_no_overhead() -> None:
    engine = AheadEngine()
    engine.working = True
    bench = make(engine, FakeClock())
    bench.submit(steps=4)
    bench.run()
    # But for the second after the last call, which nothing hides.
    assert (bench.value(LOOP), bench.value(CALLS)) == (20, 19)
    bench.scheduler.close()


def test_the_cuda_engine_tells_whether_its_device_still_works() -> None:
    tiny, lane = tiny_parts(SD1_LIKE), RecordingLane(passing=False)
    options = CudaOptions(warm_sizes=((8, 8),), max_area=64, weight_slots=0)
    given = (tiny.base, tiny.factors, tiny.rows, tiny.norms)
    engine = CudaEngine(*given, slots=2, max_batch=2, lane=lane, options=options)
    assert isinstance(engine, RunsAhead)
    seen = [engine.working]
    engine.denoise(Plan.DENSE, *tiny.inputs(1), torch.tensor([0]))
    seen.append(engine.working)
    lane.marks[-1].passed = True
    assert [*seen, engine.working] == [False, True, False]
