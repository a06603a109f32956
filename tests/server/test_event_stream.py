"""Events across threads: in order, bounded where they may be, nothing lost, no side waits."""

import asyncio
import threading

import pytest

from hueshift.server.event_stream import EventStream


async def drained(stream: EventStream[int]) -> list[int]:
    """All events."""
    return [event async for event in stream]


async def test_events_arrive_in_order_and_the_end_after_them() -> None:
    stream: EventStream[int] = EventStream()
    for event in range(5):
        stream.send(event)
    assert stream.close(last=5)
    assert not stream.close(ValueError("late"), last=6)
    stream.send(9)
    assert await drained(stream) == [0, 1, 2, 3, 4, 5]


async def test_an_unread_event_of_a_slot_is_replaced_in_its_place() -> None:
    stream: EventStream[int] = EventStream()
    stream.send(1, slot="progress")
    stream.send(100)
    stream.send(2, slot="progress")
    stream.send(7, slot="preview")
    assert await anext(aiter(stream)) == 2
    stream.send(3, slot="progress")
    stream.close()
    assert await drained(stream) == [100, 7, 3]


async def test_the_error_comes_after_the_events() -> None:
    stream: EventStream[int] = EventStream()
    stream.send(1)
    assert stream.error is None
    stream.close(ValueError("over"))
    iterator = aiter(stream)
    assert await anext(iterator) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="over"):
            await anext(iterator)


async def test_many_threads_and_a_waiting_reader() -> None:
    stream: EventStream[int] = EventStream()

    def send(first: int) -> None:
        for event in range(first, first + 500):
            stream.send(event)

    threads = [threading.Thread(target=send, args=(1000 * i,)) for i in range(4)]
    reading = asyncio.create_task(drained(stream))
    await asyncio.sleep(0)
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    stream.close()
    events = await asyncio.wait_for(reading, 10)
    assert len(events) == 2000
    for i in range(4):
        own = [event for event in events if event // 1000 == i]
        assert own == sorted(own)


def test_a_closed_event_loop_ends_the_stream() -> None:
    async def make() -> EventStream[int]:
        return EventStream()

    stream = asyncio.run(make())
    assert not stream.closed
    stream.send(1)
    assert stream.closed
