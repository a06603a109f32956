"""Work that comes round again for as long as the server runs, whatever one round met."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog


async def try_once(task: str, work: Callable[[], Awaitable[object]], failed: Callable[[str], object]) -> None:
    """Do `work`; what it raises is logged and told to `failed` with the name of the task."""
    try:
        await work()
    # Whatever it was: an error that nobody thought of must not end what keeps the server going, in silence.
    except Exception:
        structlog.get_logger().warning("background.failed", task=task, exc_info=True)
        failed(task)


async def keep_doing(
    task: str,
    seconds: float,
    work: Callable[[], Awaitable[object]],
    failed: Callable[[str], object] = lambda task: None,
) -> None:
    """Do `work` now and every `seconds` after it has ended, until cancelled, as `try_once`."""
    while True:
        await try_once(task, work, failed)
        await asyncio.sleep(seconds)
