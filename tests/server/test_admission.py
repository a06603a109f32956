"""The door: bounds in pictures, in all and per tenant; refusals say when to come back."""

import pytest
from generation_bench import Bench, Limits

from hueshift.adapters.errors import DeadlineExceeded, Reason, ResourceExhausted, Unavailable
from hueshift.server.generation import GenerationRequest, QueuedEvent
from hueshift.server.pace import Pace


async def test_the_queue_is_counted_in_pictures() -> None:
    bench = Bench(max_batch=1, limits=Limits(queue_size=10, tenant_queue_size=8))
    first = bench.submit("a", seeds=tuple(range(4)))
    second = bench.submit("b", seeds=tuple(range(4)))
    with pytest.raises(ResourceExhausted) as refused:
        bench.submit("c", seeds=(1, 2, 3))
    assert refused.value.reason is Reason.QUEUE_FULL
    assert refused.value.retry_after is not None
    assert 0.5 <= refused.value.retry_after <= 30
    third = bench.submit("c", seeds=(1, 2))
    positions = [await anext(handle.events()) for handle in (first, second, third)]
    assert positions == [QueuedEvent(0), QueuedEvent(4), QueuedEvent(8)]


async def test_a_tenant_has_a_bound_of_its_own() -> None:
    bench = Bench(max_batch=1, limits=Limits(queue_size=100, tenant_queue_size=4))
    bench.submit("a", seeds=(1, 2, 3))
    with pytest.raises(ResourceExhausted) as refused:
        bench.submit("a", seeds=(1, 2))
    assert refused.value.reason is Reason.TENANT_QUOTA
    bench.submit("b", seeds=(1, 2, 3))
    # One picture joins the batch: that place is free again.
    bench.turn(2)
    bench.submit("a", seeds=(1, 2))


async def test_retry_after_follows_the_pace() -> None:
    bench = Bench(max_batch=1, limits=Limits(queue_size=20))
    bench.engine.on_call = lambda plan, slots: bench.clock.advance(0.1)  # type: ignore[attr-defined]
    bench.submit(steps=40)
    bench.run()
    for _ in range(20):
        bench.submit(steps=10)
    with pytest.raises(ResourceExhausted) as refused:
        bench.submit(steps=10)
    # 20 pictures of 10 steps of 0.1 s are 20 s; half of that is a fair time to ask again.
    assert refused.value.retry_after == pytest.approx(10)


async def test_a_deadline_that_has_passed_is_refused() -> None:
    bench = Bench()
    with pytest.raises(DeadlineExceeded) as refused:
        bench.submit(deadline=bench.clock.monotonic())
    assert refused.value.reason is Reason.DEADLINE_TOO_SHORT
    assert bench.scheduler.snapshot().waiting == 0


async def test_draining_refuses_with_a_time_to_come_back() -> None:
    bench = Bench()
    bench.scheduler._admission.drain()
    with pytest.raises(Unavailable) as refused:
        bench.submit()
    assert refused.value.reason is Reason.DRAINING
    assert refused.value.retry_after


def test_requests_know_their_rows_and_mix() -> None:
    def request(guidance: float, **adapters: float) -> GenerationRequest:
        return Bench().request(adapters=adapters, guidance_scale=guidance)

    assert (request(1.0).rows, request(1.01).rows) == (1, 2)
    assert request(1.0, a=0.0, b=-1.0).mix == (("b", -1.0),)


def test_pace_says_nothing_until_warm_and_then_little() -> None:
    pace = Pace()
    for i in range(15):
        pace.observe((8, 8), 2.0, 1.0 + i)
    assert pace.seconds_at_least((8, 8), 10) == 0
    assert pace.seconds_for(1.0) is None
    pace.observe((8, 8), 2.0, 100.0)
    assert pace.seconds_at_least((8, 8), 10) == 10 * 1.0 * 0.5
    assert pace.seconds_at_least((16, 8), 10) == 0
    for _ in range(64):
        pace.observe((8, 8), 2.0, 0.5)
    assert pace.seconds_at_least((8, 8), 10) == 2.5
    assert pace.seconds_for(8.0) == pytest.approx(2.0)
