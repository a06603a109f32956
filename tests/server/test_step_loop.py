"""What happens between two steps, turn by turn, by hand."""

import asyncio
from collections import Counter

import pytest
from generation_bench import IDLE, Bench, Limits, collect, counts, error_of, images

from hueshift.adapters.errors import (
    Cancelled,
    DeadlineExceeded,
    Reason,
)
from hueshift.engines.interface import Plan
from hueshift.server.generation import (
    FinishedEvent,
    ImageEvent,
    ProgressEvent,
    QueuedEvent,
)


async def test_events_of_one_request() -> None:
    bench = Bench()
    handle = bench.submit(seeds=(5, 6), steps=4, adapters={"low-0.3": 0.5}, prompt="x" * 60)
    bench.run()
    events = await collect(handle)
    assert isinstance(events[0], QueuedEvent)
    # Nobody read in between, so one Progress stands for all.
    assert [event for event in events if isinstance(event, ProgressEvent)] == [ProgressEvent(8, 8)]
    finished = events[-1]
    assert isinstance(finished, FinishedEvent)
    assert (finished.images, finished.truncated_tokens) == (2, 1)
    pictures = [event for event in events if isinstance(event, ImageEvent)]
    assert [(picture.index, picture.seed) for picture in pictures] == [(0, 5), (1, 6)]
    assert pictures[0].data != pictures[1].data
    assert (pictures[0].width, pictures[0].height, pictures[0].engine) == (64, 64, "fake")
    assert pictures[0].plans == (Plan.DENSE,)
    assert pictures[0].adapters[0].weight == 0.5
    assert counts(bench) == IDLE


async def test_progress_is_streamed_to_a_reader_that_keeps_up() -> None:
    bench = Bench()
    handle = bench.submit(steps=3)
    events = handle.events()
    assert await anext(events) == QueuedEvent(0)
    for step in (1, 2, 3):
        bench.turn(2 if step == 1 else 1)
        assert await anext(events) == ProgressEvent(step, 3)
    bench.decode()
    assert isinstance(await anext(events), ImageEvent)
    await events.aclose()


async def test_pictures_join_and_leave_at_any_step() -> None:
    bench = Bench(max_batch=3)
    handles = [bench.submit("a", seeds=(i,), steps=steps) for i, steps in enumerate((5, 2, 4, 3))]
    bench.turn(2)
    assert counts(bench)["active"] == 3
    bench.run()
    for handle in handles:
        assert len(await images(handle)) == 1
    # 5 + 2 + 4 + 3 rows in as few calls as three at a time allow: the fourth took the place of the second.
    assert [rows for _, rows in bench.engine.calls] == [3, 3, 3, 3, 2]


async def test_factored_only_when_needed() -> None:
    bench = Bench()
    bench.submit(steps=2)
    spectral = bench.submit(steps=4, adapters={"spec-0.2": 1.0})
    weightless = bench.submit(steps=1, adapters={"spec-0.7": 0.0})
    bench.turn(2)
    assert bench.scheduler.snapshot().slots_held == 1
    bench.run()
    assert {plan for plan, _ in bench.engine.calls} == {Plan.FACTORED}
    assert (await images(spectral))[0].plans == (Plan.FACTORED,)
    assert len(await images(weightless)) == 1
    assert bench.folder.loads == ["spec-0.2"]
    alone = bench.submit(steps=1, adapters={"spec-0.7": 0.0})
    bench.run()
    assert (await images(alone))[0].plans == (Plan.DENSE,)


async def test_two_tenants_share_the_rows_whatever_their_bursts() -> None:
    bench = Bench(max_batch=4)
    for i in range(40):
        bench.submit("greedy", seeds=(i,), steps=5)
    bench.turn(2)
    late = [bench.submit("late", seeds=(i,), steps=5) for i in range(8)]
    finished: Counter[int] = Counter()
    for turn in range(60):
        bench.turn()
        bench.decode()
        finished[turn] = sum(handle.stream.closed for handle in late)
        if finished[turn] == len(late):
            break
    # Half the rows are its: 8 pictures of 5 steps on 2 of 4 rows take 20 steps, after the batch it found running.
    assert turn <= 5 + 20 + 2


async def test_priority_counts_within_the_tenant_only() -> None:
    bench = Bench(max_batch=1)
    order: list[str] = []
    submitted = {
        name: bench.submit(name[0], seeds=(1,), steps=1, priority=priority)
        for name, priority in (("a-normal", 2), ("a-low", 1), ("b-low", 1), ("a-high", 3))
    }
    for _ in range(10):
        bench.turn()
        bench.decode()
        order += [name for name, handle in submitted.items() if handle.stream.closed and name not in order]
    assert order == ["a-high", "b-low", "a-normal", "a-low"]


async def test_cancelling_frees_the_rows_before_the_next_step() -> None:
    bench = Bench(max_batch=2)
    first = bench.submit(seeds=(1, 2), steps=50, adapters={"low-0.1": 1.0})
    second = bench.submit(steps=2)
    bench.turn(2)
    assert counts(bench)["rows"] == 2
    first.cancel()
    bench.turn()
    assert (counts(bench)["rows"], counts(bench)["slot_uses"]) == (1, 0)
    assert isinstance(await error_of(first), Cancelled)
    bench.run()
    assert len(await images(second)) == 1
    assert bench.value("hueshift_samples_ended_total", outcome="cancelled") == 2
    assert counts(bench) == IDLE


async def test_cancelling_while_queued_frees_the_place_in_the_queue() -> None:
    bench = Bench(max_batch=1, limits=Limits(queue_size=2))
    running = bench.submit(steps=50)
    bench.turn(2)
    queued = bench.submit(seeds=(1, 2))
    queued.cancel()
    bench.turn()
    again = bench.submit(seeds=(3, 4), steps=1)
    running.cancel()
    bench.run()
    assert len(await images(again)) == 2


async def test_leaving_the_events_cancels() -> None:
    bench = Bench()
    handle = bench.submit(steps=50)
    bench.turn(2)

    async def read() -> None:
        async for _ in handle.events():
            pass

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    bench.turn()
    assert counts(bench) == IDLE


async def test_deadline_inside_denoising() -> None:
    bench = Bench()
    handle = bench.submit(steps=50, deadline=bench.clock.monotonic() + 5, adapters={"spec-0.1": 1})
    bench.turn(4)
    assert counts(bench)["active"] == 1
    bench.clock.advance(6)  # type: ignore[attr-defined]
    bench.turn()
    error = await error_of(handle)
    assert isinstance(error, DeadlineExceeded)
    assert error.reason is Reason.DEADLINE_PASSED
    assert bench.value("hueshift_samples_ended_total", outcome="deadline") == 1
    assert counts(bench) == IDLE


async def test_a_deadline_that_cannot_be_kept_is_refused_once_the_pace_is_known() -> None:
    bench = Bench()
    bench.engine.on_call = lambda plan, slots: bench.clock.advance(1.0)  # type: ignore[attr-defined]
    # Nothing is known yet, so even this is let in.
    cold = bench.submit(steps=50, deadline=bench.clock.monotonic() + 2)
    bench.run()
    assert (await error_of(cold)).reason is Reason.DEADLINE_PASSED
    bench.submit(steps=20)
    bench.run()
    with pytest.raises(DeadlineExceeded) as refused:
        bench.submit(steps=50, deadline=bench.clock.monotonic() + 20)
    assert refused.value.reason is Reason.DEADLINE_TOO_SHORT
    # What is merely doubtful is let in, and another size is another matter.
    bench.submit(steps=50, deadline=bench.clock.monotonic() + 30).cancel()
    bench.submit(steps=50, width=128, deadline=bench.clock.monotonic() + 20).cancel()
    bench.run()


async def test_a_request_that_waited_too_long_does_not_waste_rows() -> None:
    bench = Bench(max_batch=1)
    bench.engine.on_call = lambda plan, slots: bench.clock.advance(1.0)  # type: ignore[attr-defined]
    bench.submit(steps=30)
    bench.turn(20)
    doomed = bench.submit(steps=30, deadline=bench.clock.monotonic() + 20)
    calls = len(bench.engine.calls)
    bench.run()
    assert (await error_of(doomed)).reason is Reason.DEADLINE_PASSED
    assert len(bench.engine.calls) - calls == 11


async def test_sizes_take_turns_and_none_starves() -> None:
    bench = Bench(max_batch=4)
    small = [bench.submit("a", seeds=(i,), steps=6) for i in range(4)]
    large = bench.submit("b", seeds=(9,), steps=6, width=128, height=64)
    wide = bench.submit("b", seeds=(9,), steps=6, width=64, height=128)
    bench.run()
    assert (await images(large))[0].width == 128
    assert (await images(wide))[0].height == 128
    for handle in small:
        assert len(await images(handle)) == 1
    # All sizes go on from the start: a step of the four small ones is as much work as two of the larger.
    assert {(8, 8), (8, 16), (16, 8)} == set(bench.engine.sizes[:8])
    assert bench.engine.sizes.count((8, 16)) == bench.engine.sizes.count((16, 8)) == 6


async def test_many_sizes_of_one_tenant_do_not_slow_another() -> None:
    bench = Bench(max_batch=16)
    for i in range(8):
        bench.submit("many", seeds=(i,), steps=40, width=64 + 8 * i)
    single = bench.submit("one", seeds=(1,), steps=10, height=128)
    bench.turn(3)
    begin = len(bench.engine.calls)
    while not single.stream.closed:
        bench.turn()
        bench.decode()
    # It asks for twice the work of a small picture per step and owns half of the machine.
    assert len(bench.engine.calls) - begin <= 10 * 4


async def test_a_guided_picture_is_not_overtaken_for_ever() -> None:
    bench = Bench(max_batch=2)
    bench.submit("a", steps=3)
    bench.turn(2)
    guided = bench.submit("b", steps=1, guidance_scale=4.0)
    for i in range(30):
        bench.submit("c", seeds=(i,), steps=3)
    bench.turn(4)
    bench.decode()
    assert len(await images(guided)) == 1


async def test_a_mix_waits_for_a_slot_and_gets_it() -> None:
    bench = Bench(slots=2, max_batch=8)
    first = bench.submit("a", steps=4, adapters={"low-0.1": 1.0})
    bench.turn(2)
    second = bench.submit("b", steps=2, adapters={"low-0.2": 1.0})
    base = bench.submit("c", steps=2)
    # More of the first mix must not keep the slot for ever.
    more = [bench.submit("a", seeds=(i,), steps=4, adapters={"low-0.1": 1.0}) for i in range(3)]
    bench.turn(2)
    assert counts(bench)["active"] == 2
    bench.run()
    for handle in (first, second, base, *more):
        assert len(await images(handle)) == 1
    assert counts(bench) == IDLE
    assert bench.folder.loads == ["low-0.1", "low-0.2"]


async def test_metrics_tell_what_happened() -> None:
    bench = Bench(max_batch=8)
    bench.submit(steps=3, guidance_scale=4.0, adapters={"low-0.1": 1.0})
    bench.submit("b", steps=3, adapters={"spec-0.1": 1.0})
    bench.submit(steps=3)
    for _ in range(3):
        bench.scheduler._inbox.popleft()()
    bench.scheduler._loop._report()
    bench.clock.advance(3)  # type: ignore[attr-defined]
    bench.scheduler._loop._report()
    assert bench.value("hueshift_queue_depth") == 3
    assert bench.value("hueshift_queue_tenants") == 2
    assert bench.value("hueshift_queue_oldest_seconds") == 3
    bench.run()
    assert bench.value("hueshift_queue_tenants") == 0
    assert bench.value("hueshift_queue_depth") == bench.value("hueshift_active_samples") == 0
    assert bench.value("hueshift_images_total") == 3
    assert bench.value("hueshift_samples_ended_total", outcome="done") == 3
    for stage in ("queue", "adapter_load", "text", "denoise", "decode"):
        assert bench.value("hueshift_stage_seconds_count", stage=stage) == 3
    assert bench.value("hueshift_batch_rows_sum", plan="factored") == 3 * 4
    assert bench.value("hueshift_batch_adapters_sum") == 3 * 3
    assert bench.value("hueshift_swap_seconds_count", tier="slot") == 2
    assert bench.value("hueshift_adapter_cache_misses_total", tier="host") == 2
    assert bench.value("hueshift_adapter_cache_entries", tier="slot") == 2
