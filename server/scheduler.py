"""The scheduler: the step loop on a thread of its own, and the calls that services make to it.

One thread owns the engine and the state of all requests. Others reach it through an inbox of calls that it makes
between steps, so a cancellation, a deletion or a new request counts before the next step. Preparation and decoding run
on threads of their own, and the event loop of the services never waits for any of them.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog

from hueshift.adapters.errors import Cancelled, HueshiftError, Reason, Unavailable
from hueshift.engines.base_model import BaseModel
from hueshift.engines.conditioning import Conditioner
from hueshift.engines.interface import UNetEngine
from hueshift.engines.mixes import make_mix
from hueshift.engines.planner import Planner
from hueshift.engines.residency import PreparedMix, SlotCache
from hueshift.engines.vae import VaeStage
from hueshift.server.admission import Admission, QueueLimits
from hueshift.server.clock import Clock
from hueshift.server.decode_stage import DecodeStage
from hueshift.server.device_watch import DeviceWatch, device_lost
from hueshift.server.event_stream import EventStream
from hueshift.server.generation import GenerationEvent, GenerationHandle, GenerationRequest, QueuedEvent
from hueshift.server.metrics import Metrics
from hueshift.server.pace import Pace
from hueshift.server.preparation import Preparation
from hueshift.server.preparing_lanes import PreparingLanes
from hueshift.server.step_loop import StepLoop
from hueshift.server.step_runner import StepRunner
from hueshift.server.ticket import Ticket, as_ours

T = TypeVar("T")

_WARMERS = 2


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """Counts of one moment: requests alive and being prepared, pictures waiting, in the batch (with their UNet rows)
    and at the decoder, slots that hold a mix, and uses of slots by pictures in the batch.
    """

    live: int
    preparing: int
    waiting: int
    active: int
    rows: int
    decoding: int
    slots_held: int
    slot_uses: int


class Scheduler:
    """Runs requests; see the module. `start` it before, and `close` it after use.

    `weights` are the tenants' shares relative to one another, 1 where not named. `preparers` prepares, prefetches and
    warms; by default threads for each. `planner` divides batches into calls; without one a batch is one call;
    `find_planner` finds that of an engine which takes over. `watch` knows when the device is lost.
    """

    def __init__(
        self,
        engine: UNetEngine,
        base: BaseModel,
        conditioner: Conditioner,
        vae: VaeStage,
        slots: SlotCache,
        metrics: Metrics,
        clock: Clock,
        limits: QueueLimits,
        *,
        weights: Mapping[str, float] | None = None,
        preparers: Executor | None = None,
        planner: Planner | None = None,
        find_planner: Callable[[], Planner | None] | None = None,
    ) -> None:
        self._base, self._slots, self._clock = base, slots, clock
        self._log = structlog.get_logger()
        pace = Pace()
        self._admission = Admission(limits, pace)
        self._lanes = PreparingLanes(slots.at_hand, preparers)
        # Threads of their own: whoever warms many adapters must not hold up pictures.
        self._warmers = preparers or ThreadPoolExecutor(_WARMERS, "hueshift-warm")
        self.watch = DeviceWatch()
        self.watch.on_lost(self._lose)
        self._decoder = DecodeStage(
            vae,
            engine=engine,
            base_hash=base.base_hash,
            metrics=metrics,
            clock=clock,
            on_batch=self._nudge,
            on_error=self.watch.heard,
        )
        # One thread: it only runs ahead of the preparing ones, and what is wrong with an adapter they find out again.
        self._prefetcher = preparers or ThreadPoolExecutor(1, "hueshift-prefetch")
        self._loop = StepLoop(
            engine,
            base,
            slots,
            Preparation(conditioner, vae, slots, base.schedule, clock, base.latent_factor),
            self._lanes,
            self._decoder,
            self._admission,
            pace,
            metrics,
            clock,
            weights or {},
            self._post,
            StepRunner(engine, metrics, clock, planner, find_planner),
            self.watch,
        )
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._closing = False
        self._closed = False
        self._ended: HueshiftError | None = None
        self._thread = threading.Thread(target=self._run, name="hueshift-steps", daemon=True)

    def start(self) -> None:
        """Start the threads."""
        self._decoder.start()
        self._thread.start()

    def submit(self, request: GenerationRequest) -> GenerationHandle:
        """Accept a request. Called in the event loop that will read the events; does not block.

        Raises Unavailable (DRAINING), ResourceExhausted (QUEUE_FULL, TENANT_QUOTA), DeadlineExceeded
        (DEADLINE_TOO_SHORT).
        """
        factor = self._base.latent_factor
        size = (request.height // factor, request.width // factor)
        work = self._loop.work_of(request.row_steps, size)
        now = self._clock.monotonic()
        position = self._admission.admit(request, size, work, now)
        stream: EventStream[GenerationEvent] = EventStream()
        ticket = Ticket(request, stream, size=size, work=work, accepted=now)
        stream.send(QueuedEvent(position))
        for mix in dict.fromkeys(ticket.mixes):
            # Refused while the scheduler closes; the request is then ended by the loop.
            with contextlib.suppress(RuntimeError):
                self._prefetcher.submit(self._slots.prefetch, mix)
        self._post(lambda: self._loop.accept(ticket))
        return GenerationHandle(request.request_id, stream, lambda: self._give_up(ticket))

    async def warm(self, mix: Sequence[tuple[str, float]], pin: bool | None = None) -> bool:
        """Bring a mix into a slot; True pins it there, False unpins it, None leaves the pin. True if it was not there.

        Raises what loading it raises, ResourceExhausted (SLOTS_EXHAUSTED), Unavailable (DRAINING).
        """
        wanted = make_mix(mix)
        while True:
            try:
                preparing = self._warmers.submit(self._slots.prepare, wanted)
            except RuntimeError as error:
                raise _stopped() from error
            prepared = await asyncio.wrap_future(preparing)
            if await asyncio.wrap_future(self._call(partial(self._pin, prepared, pin))):
                return prepared.row is not None

    def drop_adapter(self, name: str, hashes: Sequence[str]) -> None:
        """Stop serving an adapter: requests that use it end with ADAPTER_DELETED before the next step, its rows go."""
        self._post(lambda: self._loop.drop(name, hashes))

    def resident(self, content_hash: str) -> bool:
        """True if a slot holds a mix with the adapter."""
        return self._slots.resident(content_hash)

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and finish the accepted ones. After `seconds` the rest end with Unavailable (DRAINING).

        Returns True if every accepted request was finished.
        """
        self._admission.drain()
        idle: Future[None] = Future()
        self._post(lambda: self._loop.tell_when_idle(idle))
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(idle)), seconds)
        except TimeoutError:
            self._post(lambda: self._loop.end_all(_stopped()))
            await asyncio.wrap_future(idle)
            return False
        return True

    def close(self) -> None:
        """End what is left with Unavailable (DRAINING) and stop the threads; blocks until they have stopped."""
        self._admission.drain()
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self._prefetcher.shutdown(wait=True, cancel_futures=True)
        self._warmers.shutdown(wait=True, cancel_futures=True)
        self._lanes.close()
        self._decoder.close()

    def snapshot(self) -> SchedulerSnapshot:
        """Count what is there; callable from any thread, so counts may be a step apart."""
        live, active, rows, preparing = self._loop.counts
        slots = self._slots.snapshot()
        return SchedulerSnapshot(
            live=live,
            preparing=preparing,
            waiting=self._admission.waiting,
            active=active,
            rows=rows,
            decoding=self._decoder.backlog,
            slots_held=slots["held"],
            slot_uses=slots["uses"],
        )

    def turn(self) -> None:
        """Make the calls in the inbox, then one round of the loop. The thread does it; tests may do it instead."""
        while self._inbox:
            self._inbox.popleft()()
        self._loop.tick()

    def _run(self) -> None:
        try:
            self._step_on()
        except BaseException as error:  # Nothing steps any more: whoever waits must hear of it, and the process end.
            why = self.watch.gave_up(error)
            with self._wake:
                self._closed, self._ended = True, why
                calls = tuple(self._inbox)
            self._loop.abandon(why, calls)

    def _step_on(self) -> None:
        while not self._closed:
            nap = self._loop.nap()
            with self._wake:
                if nap is None or nap > 0:
                    self._wake.wait_for(lambda: self._closing or self._inbox, nap)
                closing = self._closing
            try:
                self.turn()
            except Exception as error:  # A defect in here must end requests, not the serving of others to come.
                self._log.error("step loop failed", exc_info=error)
                self._loop.end_all(as_ours(error, "the step loop"))
            if closing:
                self._stop()

    def _stop(self) -> None:
        with self._wake:
            self._closed = True
        while self._inbox:
            self._inbox.popleft()()
        self._loop.end_all(_stopped())
        self._loop.tick()

    def _pin(self, prepared: PreparedMix, pin: bool | None) -> bool:
        if not self._slots.fits(prepared):
            return False
        self._slots.pin(prepared, pin)
        return True

    def _give_up(self, ticket: Ticket) -> None:
        if ticket.end(Cancelled(Reason.CANCELLED, "the caller gave the request up")):
            self._nudge()

    def _lose(self) -> None:
        """The device is gone: refuse what comes, end what is there."""
        self._admission.drain()
        self._post(lambda: self._loop.end_all(device_lost()))

    def _post(self, call: Callable[[], None]) -> None:
        with self._wake:
            if self._ended is None:
                self._inbox.append(call)
                self._wake.notify()
                return
        # No thread makes it any more: a request that came at the last moment must not wait for one.
        self._loop.abandon(self._ended, (call,))

    def _call(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        with self._wake:
            if self._closed:
                future.set_exception(_stopped())
            else:
                self._post(run)
        return future

    def _nudge(self) -> None:
        self._post(_nothing)


def _nothing() -> None:
    """Wake the loop, no more."""


def _stopped() -> Unavailable:
    return Unavailable(Reason.DRAINING, "the server is shutting down; ask another one, or again later", retry_after=5.0)
