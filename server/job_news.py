"""Watchers of jobs wait here: one query for all of them in each round, and none while nobody waits."""

import asyncio
from collections.abc import Callable, Collection, Mapping

# Half of what a person notices in a progress bar.
EVERY_SECONDS = 0.25


class JobNews:
    """Tells whoever waits that a job has new events. One event loop uses it.

    `sequences` returns the number of the last event of each job of those ids; it is called in a thread.
    """

    def __init__(
        self, sequences: Callable[[Collection[str]], Mapping[str, int]], *, every: float = EVERY_SECONDS
    ) -> None:
        self._sequences, self._every = sequences, every
        self._waiting: dict[asyncio.Future[None], tuple[str, int]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def wait(self, job_id: str, sequence: int) -> None:
        """Return once the job's last event is another one than `sequence`. Raises what asking for it raises."""
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[news] = (job_id, sequence)
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(), name="job-news")
        try:
            await news
        finally:
            self._waiting.pop(news, None)
            if not self._waiting and self._asking is not None:
                # Forgotten at once: who comes before it has ended needs another.
                self._asking.cancel()
                self._asking = None

    async def _ask(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            asked = dict(self._waiting)
            try:
                found = await asyncio.to_thread(self._sequences, {job_id for job_id, _ in asked.values()})
            # Whatever it was: whoever waits must not wait for ever.
            except Exception as error:
                for news in asked:
                    if not news.done():
                        news.set_exception(error)
                continue
            for news, (job_id, sequence) in asked.items():
                if not news.done() and found.get(job_id) != sequence:
                    news.set_result(None)
