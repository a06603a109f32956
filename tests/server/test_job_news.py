"""Watchers that wait for events of jobs share one query, and none is left waiting."""

import asyncio
from collections.abc import Collection, Mapping

import pytest

from hueshift.adapters.errors import Reason, Unavailable
from hueshift.server.job_news import JobNews


class Numbers:
    """Numbers of last events, which may be away; counts how often it is asked."""

    def __init__(self) -> None:
        self.last, self.asked, self.away = {"a": 1, "b": 1}, list[set[str]](), False

    def __call__(self, job_ids: Collection[str]) -> Mapping[str, int]:
        self.asked.append(set(job_ids))
        if self.away:
            raise Unavailable(Reason.STORE_UNAVAILABLE, "away")
        return {job_id: self.last[job_id] for job_id in job_ids if job_id in self.last}


async def asked_once(numbers: Numbers) -> None:
    """Wait for a round that begins from now on."""
    before = len(numbers.asked)
    async with asyncio.timeout(5):
        while len(numbers.asked) == before:  # noqa: ASYNC110 (a list cannot set an event)
            await asyncio.sleep(0.01)


async def test_all_watchers_share_one_query_and_only_news_wake_them() -> None:
    numbers = Numbers()
    news = JobNews(numbers, every=0.02)
    first = [asyncio.create_task(news.wait("a", 1)) for _ in range(50)]
    other = asyncio.create_task(news.wait("b", 1))
    await asked_once(numbers)
    assert numbers.asked == [{"a", "b"}] * len(numbers.asked)
    assert len(numbers.asked) <= 3
    numbers.last["a"] = 2
    await asyncio.wait_for(asyncio.gather(*first), 5)
    await asked_once(numbers)
    await asked_once(numbers)
    assert (numbers.asked[-1], other.done()) == ({"b"}, False)
    # Whoever comes late finds what has happened before.
    await asyncio.wait_for(news.wait("a", 1), 5)
    # A job that is gone is news too: reading it says so.
    del numbers.last["b"]
    await asyncio.wait_for(other, 5)


async def test_nobody_waits_nothing_is_asked() -> None:
    numbers = Numbers()
    news = JobNews(numbers, every=0.01)
    watcher = asyncio.create_task(news.wait("a", 1))
    await asked_once(numbers)
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)
    await asyncio.sleep(0.02)
    asked = len(numbers.asked)
    await asyncio.sleep(0.1)
    assert len(numbers.asked) == asked
    # One goes and one comes in the same moment.
    watcher = asyncio.create_task(news.wait("a", 1))
    await asked_once(numbers)
    watcher.cancel()
    following = asyncio.create_task(news.wait("a", 1))
    await asyncio.gather(watcher, return_exceptions=True)
    numbers.last["a"] = 2
    await asyncio.wait_for(following, 5)


async def test_a_table_that_is_away_ends_the_waiting_and_the_next_watch_asks_again() -> None:
    numbers = Numbers()
    news = JobNews(numbers, every=0.01)
    numbers.away = True
    watchers = [asyncio.create_task(news.wait("a", 1)) for _ in range(2)]
    for watcher in watchers:
        with pytest.raises(Unavailable):
            await asyncio.wait_for(watcher, 5)
    numbers.away, numbers.last["a"] = False, 2
    await asyncio.wait_for(news.wait("a", 1), 5)
