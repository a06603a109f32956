"""Remove, now and then, what nobody will ask for again: old answers, counts, samples, events, jobs and revisions, and
files of crashed uploads.

Of the servers that share a database, one does so at a time. It works in short transactions with pauses between them,
so that other writers have their turn, and may be killed at any point: rows go before their files, and files that no
row names are found by the next sweep.
"""

import asyncio
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self, TypeVar

import structlog
from sqlalchemy import Connection

from hueshift.server.clock import Clock
from hueshift.server.metrics import Metrics
from hueshift.server.outages import Observer
from hueshift.server.rounds import keep_doing
from hueshift.server.settings import Settings
from hueshift.server.store.idempotency import forget
from hueshift.server.store.job_events import forget_samples
from hueshift.server.store.job_quotas import forget_usage
from hueshift.server.store.retention import (
    AdapterKey,
    RevisionRule,
    crowded_adapters,
    forget_events,
    forget_jobs,
    forget_revisions,
)
from hueshift.server.store.stores import Stores
from hueshift.server.store.turns import end_turn, take_turn

T = TypeVar("T")
EVERY_SECONDS = 3600.0
# Reads every revision, which takes a second where there are a million.
MEASURE_SECONDS = 300.0
# Longer than any upload takes: the temporary files of running ones must stay.
ORPHAN_SECONDS = 3600.0
# A caller that repeats a call after a week has forgotten the first one.
IDEMPOTENCY_SECONDS = 7 * 24 * 3600.0
# Quotas look at today; an operator may want to look a season back.
USAGE_SECONDS = 90 * 24 * 3600.0
# A revision that somebody uses stays for an hour at least, and for twice the longest call.
UNUSED_SECONDS = 3600.0
# Rows of one transaction, which holds up the other writers of SQLite. Samples have up to a megabyte each, an adapter's
# revisions a file each.
AT_ONCE: Mapping[str, int] = {"samples": 200, "events": 500, "jobs": 50, "adapters": 100, "revisions": 50}
# Longer than a transaction and the files that follow it take, even in an object store that is slow.
_TURN_SECONDS = 300.0
_TURN = "housekeeping"
# Between two transactions, at least; as long as the last one took, if that was more.
_PAUSE_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Keeping:
    """How long things stay, in seconds, 0 meaning for ever; failed jobs stay as long as they can be retried."""

    samples: float = 0.0
    events: float = 0.0
    jobs: float = 0.0
    failed: float = 0.0
    revisions: RevisionRule = field(default_factory=RevisionRule)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Read the settings."""
        chosen, unused = settings.retention, max(UNUSED_SECONDS, 2 * settings.server.max_deadline_seconds)
        return cls(
            samples=settings.training.keep_samples_seconds,
            events=chosen.events_seconds,
            jobs=chosen.jobs_seconds,
            failed=settings.training.keep_failed_seconds,
            revisions=RevisionRule(chosen.revisions, chosen.revisions_seconds, unused),
        )


def clean(
    stores: Stores,
    clock: Clock,
    keeping: Keeping,
    *,
    rest: float = 0.0,
    stop: threading.Event | None = None,
    swept: Callable[[str, int], object] = lambda kind, count: None,
) -> Counter[str]:
    """Clean once; return the rows removed by kind, and the `bytes` of files. Raises HueshiftError as the stores do.

    Rows are left alone while another server cleans, or if one has done so less than `rest` seconds ago. `stop` ends it
    early. `swept` hears of each step as it is done.
    """
    sweep = _Sweep(stores, clock, keeping, stop or threading.Event(), swept)
    sweep.run(rest)
    return sweep.removed


class _Over(Exception):
    """The round ends before it is done: the server stops, or another has taken the turn."""


class _Sweep:
    """One round of cleaning."""

    def __init__(
        self,
        stores: Stores,
        clock: Clock,
        keeping: Keeping,
        stop: threading.Event,
        swept: Callable[[str, int], object],
    ) -> None:
        self._stores, self._clock, self._keeping = stores, clock, keeping
        self._stop, self._swept = stop, swept
        # The one that the rows' times are of.
        self._time = stores.database.clock.time
        self._owner = secrets.token_hex(16)
        self.removed: Counter[str] = Counter()

    def run(self, rest: float) -> None:
        """Clean rows if it is our turn, then files, which every host does for itself."""
        try:
            with self._stores.database.write() as connection:
                ours = take_turn(connection, _TURN, self._owner, _TURN_SECONDS, rest)
            if ours:
                self._clean_rows()
            if not self._stop.is_set():
                self._count("bytes", self._stores.adapters.sweep_orphans(ORPHAN_SECONDS))
        except _Over:
            structlog.get_logger().info("store cleaning left to the next round")

    def _clean_rows(self) -> None:
        now, keeping = self._time(), self._keeping
        self._count("answers", self._transact(lambda connection: forget(connection, now - IDEMPOTENCY_SECONDS)))
        self._count("days", self._transact(lambda connection: forget_usage(connection, now - USAGE_SECONDS)))
        # What goes with its job, or as an event, loses its picture first: that is the most of it.
        self._in_batches("samples", forget_samples, _shortest(keeping.samples, keeping.events, keeping.jobs))
        self._in_batches("events", forget_events, _shortest(keeping.events, keeping.jobs))
        self._forget_jobs(_shortest(keeping.jobs))
        self._forget_revisions(keeping.revisions)
        self._transact(lambda connection: end_turn(connection, _TURN, self._owner))

    def _in_batches(self, kind: str, forget_some: Callable[[Connection, float, int], int], seconds: float) -> None:
        most, before = AT_ONCE[kind], self._time() - seconds
        removed = most
        while seconds and removed == most:
            removed = self._transact(lambda connection: forget_some(connection, before, most))
            self._count(kind, removed)

    def _forget_jobs(self, seconds: float) -> None:
        most, before = AT_ONCE["jobs"], self._time() - seconds
        removed = most
        while seconds and removed == most:
            gone = self._transact(lambda connection: forget_jobs(connection, before, self._keeping.failed, most))
            for job_id in gone:
                self._stores.folders.remove(job_id)
            removed = len(gone)
            self._count("jobs", removed)

    def _forget_revisions(self, rule: RevisionRule) -> None:
        after: AdapterKey | None = None
        while True:
            with self._stores.database.read() as connection:
                found = crowded_adapters(connection, rule, after, AT_ONCE["adapters"])
            for key in found:
                self._forget_revisions_of(key, rule)
            if len(found) < AT_ONCE["adapters"]:
                return
            after = found[-1]

    def _forget_revisions_of(self, key: AdapterKey, rule: RevisionRule) -> None:
        most = AT_ONCE["revisions"]
        removed = most
        while removed == most:
            gone = self._transact(lambda connection: forget_revisions(connection, key, rule, most))
            self._count("bytes", self._stores.adapters.discard_unused(gone))
            removed = len(gone)
            self._count("revisions", removed)

    def _transact(self, work: Callable[[Connection], T]) -> T:
        """Do a step in a transaction of its own, in which the turn is renewed, and let others have theirs.

        Raises _Over when the server stops or the turn is lost.
        """
        if self._stop.is_set():
            raise _Over
        begun = self._clock.monotonic()
        with self._stores.database.write() as connection:
            if not take_turn(connection, _TURN, self._owner, _TURN_SECONDS):
                raise _Over
            done = work(connection)
        self._stop.wait(max(_PAUSE_SECONDS, self._clock.monotonic() - begun))
        return done

    def _count(self, kind: str, removed: int) -> None:
        if removed:
            self.removed[kind] += removed
            self._swept(kind, removed)


def _shortest(*seconds: float) -> float:
    """Return the shortest of some times of which 0 means for ever."""
    return min((each for each in seconds if each), default=0.0)


async def keep_clean(
    stores: Stores,
    clock: Clock,
    keeping: Keeping,
    *,
    every: float = EVERY_SECONDS,
    observer: Observer | None = None,
    swept: Callable[[str, int], object] = lambda kind, count: None,
) -> None:
    """Clean at once and then every `every` seconds, until cancelled. A failure is logged and the next round tries."""
    stop = threading.Event()

    async def once() -> None:
        # Another server's round, half an hour ago or later, will do for this one.
        removed = await asyncio.to_thread(clean, stores, clock, keeping, rest=every / 2, stop=stop, swept=swept)
        if removed:
            structlog.get_logger().info("store cleaned", **removed)

    try:
        await keep_doing("housekeeping", every, once, observer, clock=clock)
    finally:
        # A thread cannot be cancelled: it stops after the transaction that it is in.
        stop.set()


async def keep_measured(stores: Stores, metrics: Metrics, clock: Clock, every: float = MEASURE_SECONDS) -> None:
    """Tell the metrics now and then what all tenants store, until cancelled."""

    async def once() -> None:
        found = await asyncio.to_thread(stores.adapters.storage.totals)
        metrics.stored_bytes.labels("adapters").set(found.adapters)
        metrics.stored_bytes.labels("pictures").set(found.pictures)

    await keep_doing("stored_bytes", every, once, metrics, clock=clock)
