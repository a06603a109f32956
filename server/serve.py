"""Run a server until it is told to stop: open the port, warm up, serve, drain.

Several servers of one machine may share a store folder, each on ports of its own: the database orders their writes, and
the workers of all of them take jobs from one leased table. An adapter deleted through one server is gone for the other
at its next look-up, which every request makes; requests that already run there finish.
"""

import asyncio
import contextlib
import gc
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, runtime_checkable

import structlog

from hueshift.adapters.errors import HueshiftError
from hueshift.server.addresses import Addresses
from hueshift.server.app import build_services
from hueshift.server.clock import Clock, SystemClock
from hueshift.server.cluster.announcing import advertised, keep_announced
from hueshift.server.cluster.build import build_front_end
from hueshift.server.frame import Frame, Services
from hueshift.server.housekeeping import Keeping, keep_clean, keep_measured
from hueshift.server.metrics import Metrics
from hueshift.server.settings import Settings
from hueshift.server.store.replicas import ReplicaStore
from hueshift.server.store.stores import Stores, open_stores

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Hears of the warm-up, from its thread: what is being done, steps done, steps in all."""
Build = Callable[[Settings, Stores, Metrics, Clock, Progress], Services]
# Calls that wait for the database, at a time. Database connections are enough for all of them, and for `file_threads`.
THREADS = 24
WARM_UP_THREAD = "hueshift-warm-up"


class StopRequest:
    """What the operator wants: a first signal drains, a second one ends the draining."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.hurry = asyncio.Event()

    def ask(self) -> None:
        """Take one signal."""
        (self.hurry if self.drain.is_set() else self.drain).set()

    def on_closed(self, descriptor: int) -> None:
        """Take the end of a pipe for a signal; call it in the event loop. See `hueshift.server.stop`."""
        loop = asyncio.get_running_loop()

        def wait() -> None:
            while os.read(descriptor, 4096):
                continue
            # The loop is closed when the server has ended by itself.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self.ask)

        threading.Thread(target=wait, name="parent", daemon=True).start()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT while the block runs; the main thread's loop only."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.ask)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


async def serve(
    settings: Settings,
    *,
    ready: Callable[[Addresses], None] | None = None,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
    parent: int | None = None,
    build: Build | None = None,
) -> None:
    """Serve until `stop` asks for the end (without one: until SIGTERM or SIGINT).

    `parent` is a file descriptor whose end, when its other side is closed, asks for the end too.

    `ready` is called once, when health turns to SERVING. Returns after the drain: accepted calls have finished, or were
    cut off after `server.drain_seconds`. Raises HueshiftError when the server cannot start, and Unavailable
    (DEVICE_LOST), after the same drain, when the device that draws has failed.
    """
    # Python's own is as many threads as there are cores, and a few: a slow database would hold up every call.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "hueshift-call"))
    clock = SystemClock()
    make = build or (build_front_end if settings.cluster.role == "frontend" else build_services)
    own_stop = stop or StopRequest()
    if parent is not None:
        own_stop.on_closed(parent)
    with contextlib.nullcontext() if stop else own_stop.on_signals():
        stores = await asyncio.to_thread(open_stores, settings, clock)
        frame = Frame(settings, stores, clock)
        log = structlog.get_logger()
        failure: HueshiftError | None = None
        try:
            addresses = await frame.start()
            log.info("port open", address=addresses.grpc, metrics=addresses.metrics)
            begin = clock.monotonic()
            warming = in_own_thread(
                WARM_UP_THREAD, lambda: make(settings, stores, frame.metrics, clock, progress or _silent)
            )
            services = await _unless(own_stop.drain, warming)
            if services is not None:
                await asyncio.to_thread(_settle_heap)
                await frame.open(services)
                log.info("serving", address=addresses.grpc, warm_up_seconds=round(clock.monotonic() - begin, 2))
                if ready is not None:
                    ready(addresses)
                beside = _beside(settings, stores, clock, frame)
                failure = await _failure_before(own_stop.drain, services)
                for task in beside:
                    task.cancel()
                # A replica withdraws before it drains, so that front ends send it nothing more.
                await asyncio.gather(*beside, return_exceptions=True)
        finally:
            await _close(frame, settings.server.drain_seconds, own_stop.hurry)
            await asyncio.to_thread(stores.close)
            gc.unfreeze()
    if failure is not None:
        raise failure


def _settle_heap() -> None:
    """Let the garbage collector pass by what the warm-up made, which stays until the end.

    A full collection goes through 506,000 objects then and stops every thread, the step loop's too, for 0.5 s (2-core
    x86 CPU, 2026-11-20); requests bring one about time and again. After this it takes what they leave.
    """
    gc.collect()
    gc.freeze()


def _beside(settings: Settings, stores: Stores, clock: Clock, frame: Frame) -> list[asyncio.Task[None]]:
    """Start what runs beside the calls until the drain."""
    metrics = frame.metrics
    cleaning = keep_clean(stores, clock, Keeping.of(settings), observer=metrics, swept=metrics.swept)
    tasks = [asyncio.create_task(cleaning), asyncio.create_task(keep_measured(stores, metrics, clock))]
    if settings.cluster.role == "replica":
        replicas, address = ReplicaStore(stores.database), advertised(settings, frame.addresses.grpc)
        heartbeat = settings.cluster.heartbeat_seconds
        tasks.append(asyncio.create_task(keep_announced(replicas, address, heartbeat, metrics, clock)))
    return tasks


@runtime_checkable
class Fallible(Protocol):
    """Services that may find that they can never answer again."""

    async def failure(self) -> HueshiftError:
        """Wait for that, and return what to say of it."""
        ...


async def _failure_before(event: asyncio.Event, services: Services) -> HueshiftError | None:
    """Wait until `event` comes or the services fail; return the failure if that is what came."""
    if isinstance(services, Fallible):
        return await _unless(event, services.failure())
    await event.wait()
    return None


async def in_own_thread(name: str, function: Callable[[], T]) -> T:
    """Run `function` in a daemon thread and return its result.

    Unlike asyncio.to_thread it does not hold up the end of the process: an export of a large model cannot be stopped.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]  # there is a value where there is no error

    def run() -> None:
        value, failure = None, None
        try:
            value = function()
        except BaseException as error:
            failure = error
        # The loop is closed when the server was told to stop in the meantime.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await result


async def _unless(event: asyncio.Event, work: Awaitable[T]) -> T | None:
    """Return what `work` gives, or None if `event` comes first."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for each in (task, waiting):
            each.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)


async def _close(frame: Frame, grace: float, hurry: asyncio.Event) -> None:
    closing = asyncio.create_task(frame.close(grace))
    waiting = asyncio.create_task(hurry.wait())
    await asyncio.wait({closing, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if waiting.done():
        frame.hurry()
    waiting.cancel()
    cut = await closing
    structlog.get_logger().info("server stopped", calls_cut_off=cut)


def _silent(_what: str, _done: int, _of: int) -> None:
    return None
