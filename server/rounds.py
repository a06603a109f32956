"""Work that comes round again for as long as the server runs, whatever one round met."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from hueshift.server.clock import Clock
from hueshift.server.outages import LONGEST_SECONDS, Observer, Outage


async def try_once(task: str, work: Callable[[], Awaitable[object]], observer: Observer | None = None) -> None:
    """Do `work`; what it raises is logged and told to `observer` with the name of the task."""
    try:
        await work()
    # Whatever it was: an error that nobody thought of must not end what keeps the server going, in silence.
    except Exception:
        structlog.get_logger().warning("background.failed", task=task, exc_info=True)
        if observer is not None:
            observer.failed(task)


async def keep_doing(
    task: str,
    seconds: float,
    work: Callable[[], Awaitable[object]],
    observer: Observer | None = None,
    *,
    clock: Clock | None = None,
    longest: float = LONGEST_SECONDS,
) -> None:
    """Do `work` now and every `seconds` after it has ended, until cancelled.

    After failures it is tried more seldom, up to `longest` seconds apart, and the log hears of them as `Outage` says.
    """
    outage = Outage(task, observer=observer, clock=clock, longest=longest)
    while True:
        try:
            await work()
        # As above.
        except Exception as error:
            outage.failed(error)
        else:
            outage.worked()
        await asyncio.sleep(outage.pause(seconds))
