"""Batches that do not fit are cut and tried again, and a device that is gone ends the server and nothing hangs."""

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest
from fake_engine import FakeEngine
from generation_bench import IDLE, Bench, counts, error_of, images
from merging_engine import out_of_memory, refuse_above
from structlog.testing import capture_logs
from torch import Tensor

from hueshift.adapters.errors import Reason, ResourceExhausted, Unavailable
from hueshift.engines.interface import Plan
from hueshift.engines.samplers import SamplerKind
from hueshift.server.step_runner import RowLimits


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """Catch the log: tracebacks drawn for people take seconds each."""
    with capture_logs() as caught:
        yield caught


async def draw(engine: FakeEngine) -> tuple[Bench, list[bytes]]:
    """Eight pictures, some of which draw noise at every step."""
    bench = Bench(engine=engine)
    handles = [
        bench.submit(f"t{i}", {f"low-0.{i + 1}": 1.0}, sampler=SamplerKind.LCM if i % 2 else SamplerKind.DDIM)
        for i in range(8)
    ]
    bench.run()
    return bench, [(await images(handle))[0].data for handle in handles]


@pytest.mark.parametrize("make", [out_of_memory, MemoryError])
async def test_what_does_not_fit_is_cut_and_drawn_all_the_same(make: Callable[[], Exception]) -> None:
    _, expected = await draw(FakeEngine(slots=12))
    engine = FakeEngine(slots=12, on_call=refuse_above(3, make))
    bench, found = await draw(engine)
    assert found == expected
    assert max(rows for _, rows in engine.calls) <= 3
    # Four rows are refused once: the limit is known from then on.
    assert bench.value("hueshift_batch_splits_total", reason="memory") == 1
    assert counts(bench) == IDLE


async def test_only_the_picture_that_does_not_fit_alone_fails() -> None:
    bench = Bench()

    def refuse_large(plan: Plan, adapter_index: Tensor) -> None:
        if adapter_index.shape[0] > 1:
            raise out_of_memory()

    bench.engine.on_call = refuse_large
    guided = bench.submit("a", guidance_scale=5.0)
    plain = [bench.submit(tenant) for tenant in ("b", "c")]
    bench.run()
    error = await error_of(guided)
    assert isinstance(error, ResourceExhausted)
    assert error.reason is Reason.DEVICE_MEMORY
    assert [len(await images(handle)) for handle in plain] == [1, 1]
    assert counts(bench) == IDLE


async def test_a_request_ends_once_though_only_some_of_its_pictures_fit() -> None:
    bench = Bench()
    calls = 0

    def refuse_some(plan: Plan, adapter_index: Tensor) -> None:
        nonlocal calls
        calls += 1
        if adapter_index.shape[0] > 1 or calls % 3 == 0:
            raise out_of_memory()

    bench.engine.on_call = refuse_some
    handle = bench.submit(seeds=(1, 2, 3, 4), steps=1)
    bench.run()
    assert (await error_of(handle)).reason is Reason.DEVICE_MEMORY
    assert counts(bench) == IDLE


async def test_a_lost_device_ends_everything_and_says_so_once() -> None:
    bench = Bench()
    running, other = bench.submit(steps=50), bench.submit("b", steps=50, adapters={"low-0.1": 1.0})
    bench.turn(3)

    def lose(plan: Plan, adapter_index: Tensor) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    bench.engine.on_call = lose
    waiting = bench.submit("c")
    bench.turn(2)
    for handle in (running, other, waiting):
        error = await error_of(handle)
        assert isinstance(error, Unavailable)
        assert error.reason is Reason.DEVICE_LOST
    assert bench.scheduler.watch.lost.result(0).reason is Reason.DEVICE_LOST
    with pytest.raises(Unavailable) as refused:
        bench.submit()
    assert refused.value.reason is Reason.DRAINING
    assert counts(bench) == IDLE


async def test_a_device_lost_while_decoding_counts_too() -> None:
    bench = Bench()

    def lose() -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    bench.vae.on_decode = lose
    handle = bench.submit()
    bench.run()
    await error_of(handle)
    assert bench.scheduler.watch.lost.done()


def test_a_limit_grows_again_when_all_is_calm() -> None:
    limits, size = RowLimits(16), (64, 64)
    assert limits[size] == 16
    limits.too_many(size, 16)
    limits.too_many(size, 8)
    assert (limits[size], limits[8, 8]) == (4, 16)
    for expected in (8, 16):
        for _ in range(512):
            limits.ran(size)
        assert limits[size] == expected
    limits.too_many(size, 1)
    assert limits[size] == 1
