"""Threads for work that may wait for the object store, so that no other call does while it does not answer."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Each may hold a database connection, as those of the event loop's pool do (serve.THREADS).
FILE_THREADS = 8


class FileThreads:
    """What asyncio.to_thread does, in threads of its own. One event loop uses it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(FILE_THREADS, "hueshift-files")

    async def run(self, work: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
        """Run `work` in one of the threads, with this task's context, and return its result."""
        bound = partial(contextvars.copy_context().run, partial(work, *arguments, **named))
        return await asyncio.get_running_loop().run_in_executor(self._pool, bound)

    def close(self) -> None:
        """Let the threads end once they have nothing to do."""
        self._pool.shutdown(wait=False)
