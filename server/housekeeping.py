"""Remove, now and then, what nobody will ask for again: files of crashed uploads, old answers, counts and samples."""

import asyncio
from collections.abc import Callable

import structlog

from hueshift.server.clock import Clock
from hueshift.server.rounds import keep_doing
from hueshift.server.store.idempotency import forget
from hueshift.server.store.job_events import forget_samples
from hueshift.server.store.job_quotas import forget_usage
from hueshift.server.store.stores import Stores

EVERY_SECONDS = 3600.0
# Longer than any upload takes: the temporary files of running ones must stay.
ORPHAN_SECONDS = 3600.0
# A caller that repeats a call after a week has forgotten the first one.
IDEMPOTENCY_SECONDS = 7 * 24 * 3600.0
# Quotas look at today; an operator may want to look a season back.
USAGE_SECONDS = 90 * 24 * 3600.0
# Up to a megabyte each; between two transactions other writers have their turn.
SAMPLES_AT_ONCE = 200


def clean(stores: Stores, clock: Clock, keep_samples: float = 0.0) -> tuple[int, int]:
    """Clean once; return the bytes freed on disk and the answers removed. Raises HueshiftError as the stores do.

    Sample pictures of jobs that ended `keep_samples` seconds ago go too; 0 keeps them.
    """
    freed = stores.adapters.sweep_orphans(ORPHAN_SECONDS)
    with stores.database.write() as connection:
        forgotten = forget(connection, clock.time() - IDEMPOTENCY_SECONDS)
        forget_usage(connection, clock.time() - USAGE_SECONDS)
    more = keep_samples > 0
    while more:
        with stores.database.write() as connection:
            more = forget_samples(connection, clock.time() - keep_samples, SAMPLES_AT_ONCE) == SAMPLES_AT_ONCE
    return freed, forgotten


async def keep_clean(
    stores: Stores,
    clock: Clock,
    *,
    keep_samples: float = 0.0,
    every: float = EVERY_SECONDS,
    failed: Callable[[str], object] = lambda task: None,
) -> None:
    """Clean at once and then every `every` seconds, until cancelled. A failure is logged and the next round tries."""

    async def once() -> None:
        freed, forgotten = await asyncio.to_thread(clean, stores, clock, keep_samples)
        if freed or forgotten:
            structlog.get_logger().info("store cleaned", freed_bytes=freed, idempotency_answers=forgotten)

    await keep_doing("housekeeping", every, once, failed)
