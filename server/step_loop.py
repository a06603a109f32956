"""The step loop: what happens between two denoising steps, and the step itself.

A picture joins the batch at a step when rows and a slot are free, and leaves it when it is done, cancelled, past its
deadline or without its adapter; all of that is looked at before every step. Pictures that share attention join and
leave together. Everything here belongs to one thread.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import structlog

from hueshift.adapters.errors import DeadlineExceeded, HueshiftError, NotFound, Reason, ResourceExhausted
from hueshift.engines.base_model import BaseModel
from hueshift.engines.device_errors import Fault, classify
from hueshift.engines.interface import UNetEngine
from hueshift.engines.residency import SlotCache
from hueshift.server.active_batch import ActiveBatch
from hueshift.server.admission import Admission
from hueshift.server.clock import Clock
from hueshift.server.decode_stage import DecodeStage
from hueshift.server.device_watch import DeviceWatch, device_lost
from hueshift.server.fair_queue import FairQueue
from hueshift.server.metrics import Metrics
from hueshift.server.pace import Pace, Size
from hueshift.server.phases import begin_picture, end_phase, row_steps_left, steps_ahead, waits_for_inversion
from hueshift.server.preparation import Preparation, Prepared
from hueshift.server.preparing_lanes import Lane, PreparingLanes
from hueshift.server.step_runner import Stepped, StepRunner
from hueshift.server.step_times import StepTimes
from hueshift.server.ticket import Phase, Running, Ticket, as_ours, our_fault, outcome_of

# Longest sleep while something waits; deadlines wake it earlier.
_NAP_SECONDS = 1.0


class StepLoop:
    """The state of all accepted requests. `post` hands a call to the loop's thread, to be made before the next step."""

    def __init__(
        self,
        engine: UNetEngine,
        base: BaseModel,
        slots: SlotCache,
        preparation: Preparation,
        lanes: PreparingLanes,
        decoder: DecodeStage,
        admission: Admission,
        pace: Pace,
        metrics: Metrics,
        clock: Clock,
        weights: Mapping[str, float],
        post: Callable[[Callable[[], None]], None],
        runner: StepRunner,
        watch: DeviceWatch,
    ) -> None:
        self._engine, self._base, self._slots = engine, base, slots
        self._runner, self._watch = runner, watch
        self._times = StepTimes(engine, metrics, clock)
        self._preparation, self._lanes, self._decoder = preparation, lanes, decoder
        self._admission, self._pace = admission, pace
        self._metrics, self._clock, self._post = metrics, clock, post
        self._log = structlog.get_logger()
        self._live: dict[Ticket, None] = {}
        self._queue: FairQueue[Ticket] = FairQueue(weights)
        self._batch = ActiveBatch(engine.max_batch, weights)
        self._when_idle: list[Future[None]] = []

    def tick(self) -> None:
        """Do what is due between two steps, then one step of one batch."""
        self._times.begin()
        self._sweep()
        self._hand_out()
        self._join()
        seconds = self._step()
        self._report()
        self._times.end(seconds, pictures=bool(self._batch))
        if not self._live:
            while self._when_idle:
                self._when_idle.pop().set_result(None)

    def accept(self, ticket: Ticket) -> None:
        """Queue a request that admission let in."""
        if self._watch.lost.done():
            ticket.end(device_lost())
            self._admission.left(ticket.request.tenant, len(ticket.waiting), ticket.work)
            return
        self._live[ticket] = None
        self._queue.push(ticket.request.tenant, ticket, ticket.request.priority)

    def drop(self, name: str, hashes: Sequence[str]) -> None:
        """End the requests that use an adapter, and evict the rows made of its files."""
        for ticket in self._live:
            if any(adapter.name == name and adapter.weight != 0 for adapter in ticket.request.every_adapter):
                ticket.end(NotFound(Reason.ADAPTER_DELETED, f"the adapter {name} has been deleted"))
        self._sweep()
        self._slots.drop(hashes)

    def end_all(self, error: HueshiftError) -> None:
        """End every request with `error`."""
        for ticket in list(self._live):
            ticket.end(error)
            self._retire(ticket)

    def abandon(self, error: HueshiftError, calls: Iterable[Callable[[], None]]) -> None:
        """Tell every request that it has ended, those too that come with `calls`, as nothing steps any more."""
        for call in calls:
            try:
                call()
            except Exception as broken:  # What it was to change may be broken already.
                self._log.error("call not made", exc_info=broken)
        for ticket in tuple(self._live):
            ticket.end(error)

    def tell_when_idle(self, idle: Future[None]) -> None:
        """Resolve `idle` once no request is left."""
        self._when_idle.append(idle)

    def nap(self) -> float | None:
        """Seconds to sleep when there is nothing to step and nobody posts; None: for ever."""
        if self._batch:
            return 0.0
        if not self._live:
            return None
        soonest = min(ticket.request.deadline for ticket in self._live)
        return min(_NAP_SECONDS, max(0.0, soonest - self._clock.monotonic()))

    def work_of(self, rows: float, size: Size) -> float:
        """UNet work of rows in a step: each counts by its latents' share of the native area."""
        return rows * size[0] * size[1] / self._base.sample_size**2

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Requests alive, pictures in the batch, their UNet rows, requests being prepared."""
        return len(self._live), len(self._batch), self._batch.rows, self._lanes.busy

    def _sweep(self) -> None:
        """Let go of what has ended or whose time is over."""
        now = self._clock.monotonic()
        for ticket in list(self._live):
            if now >= ticket.request.deadline and not ticket.ended:
                ticket.end(
                    DeadlineExceeded(Reason.DEADLINE_PASSED, "the deadline passed before the pictures were done")
                )
            if ticket.ended:
                self._retire(ticket)

    def _hand_out(self) -> None:
        """Give the next requests in fair order to the preparing threads."""
        if not len(self._queue):
            return
        # Prepared rows are memory: few per tenant when many wait.
        depth = max(2, self._engine.max_batch // self._queue.tenants)
        for ticket in self._queue.heads(depth):
            if self._lanes.full:
                return
            if ticket.prepared is None and not ticket.preparing:
                prepare = partial(self._preparation.prepare, ticket.request, ticket.mixes)
                handed = self._lanes.submit(ticket.mixes, prepare)
                if handed is not None:
                    ticket.preparing = True
                    lane, future = handed
                    future.add_done_callback(partial(self._hand_back, ticket, lane))

    def _hand_back(self, ticket: Ticket, lane: Lane, done: Future[Prepared]) -> None:
        """Called by the thread that prepared it."""
        self._post(partial(self._ready, ticket, lane, done))

    def _ready(self, ticket: Ticket, lane: Lane, done: Future[Prepared]) -> None:
        lane.busy -= 1
        ticket.preparing = False
        if done.cancelled():
            return
        error = done.exception()
        if error is not None:
            if not isinstance(error, HueshiftError):
                self._watch.heard(error)
                self._log.error("preparation failed", request_id=ticket.request.request_id, exc_info=error)
            ticket.end(as_ours(error, "preparing the request"))
            return
        ticket.take(done.result())

    def _join(self) -> None:
        """Let prepared pictures into the batch in fair order, as long as rows and slots are free."""
        # Who is next but does not fit holds up those behind it that want the same, or it would wait for ever.
        closed = self._decoder.backlog >= 2 * self._engine.max_batch
        full: set[Size] = set()
        slots_out = weights_out = False

        def fits(ticket: Ticket) -> bool:
            nonlocal closed
            if closed or ticket.prepared is None or ticket.size in full or (slots_out and any(ticket.mixes)):
                return False
            if waits_for_inversion(ticket) or (weights_out and any(mix.needs_weights for mix in ticket.prepared.mixes)):
                return False
            rows = ticket.request.rows * ticket.request.together
            closed = not self._batch.fits(rows)
            if not closed and not self._batch.fits(rows, ticket.size):
                full.add(ticket.size)
            return not closed and ticket.size not in full

        while (ticket := self._queue.first(fits)) is not None:
            try:
                if not self._place(ticket):
                    # Weights of their own hold up those that need some; all others go on.
                    lacking = ticket.prepared is not None and self._slots.lacks_weights(ticket.prepared.mixes)
                    weights_out, slots_out = weights_out or lacking, slots_out or not lacking
            except Exception as error:  # The engine refused the row: it belongs to this request alone.
                self._watch.heard(error)
                self._log.error("row refused", request_id=ticket.request.request_id, exc_info=error)
                memory = classify(error) is Fault.MEMORY
                self._end(ticket, _no_memory(error) if memory else as_ours(error, "loading the adapters"))

    def _place(self, ticket: Ticket) -> bool:
        """Start one picture, or all that must be in the batch together; return False if slots are lacking."""
        prepared, request = ticket.prepared, ticket.request
        if prepared is None or not all(self._slots.fits(mix) for mix in prepared.mixes):
            ticket.prepared = None
            return True
        now = self._clock.monotonic()
        if now + self._pace.seconds_at_least(ticket.size, steps_ahead(ticket, prepared)) > request.deadline:
            waited = f"too little time was left after {now - ticket.accepted:.1f} s in the queue"
            self._end(ticket, DeadlineExceeded(Reason.DEADLINE_PASSED, waited))
            return True
        if not self._slots.can_hold(ticket.mixes):
            self._end(ticket, _too_many_pinned(len(set(ticket.mixes))))
            return True
        joining = self._start(ticket, prepared, now)
        if joining is None:
            return False
        for running in joining:
            ticket.waiting.popleft()
            self._batch.add(running)
            self._queue.charge(request.tenant, self._work_left(running))
        self._admission.left(request.tenant, len(joining), ticket.work)
        if not ticket.waiting:
            self._queue.remove(request.tenant, ticket)
        stages = self._metrics.stage_seconds
        for _ in joining:
            stages.labels("queue").observe(now - ticket.accepted)
            stages.labels("adapter_load").observe(prepared.adapter_seconds)
            stages.labels("text").observe(prepared.text_seconds)
            if prepared.start is not None:
                stages.labels("picture").observe(prepared.picture_seconds)
        return True

    def _start(self, ticket: Ticket, prepared: Prepared, now: float) -> list[Running] | None:
        """Make the pictures that join now, each with its slots in use; None if slots are lacking."""
        started: list[Running] = []
        held = 0
        try:
            for index in list(ticket.waiting)[: ticket.request.together]:
                slots = self._slots.acquire_all(prepared.mixes)
                if slots is None:
                    return None
                held += 1
                reference = started[0].sample if started else None
                started.append(begin_picture(self._base, ticket, prepared, index, slots, reference, now))
        finally:
            if len(started) < ticket.request.together:
                for _ in range(held):
                    self._release(ticket)
        return started

    def _step(self) -> float:
        """Take one step of the batch whose turn it is, and return the seconds of its calls."""
        chosen = self._batch.choose()
        if not chosen:
            return 0.0
        size = chosen[0].size
        self._times.calling()
        results = self._runner.step(chosen, self._waiting_steps() if self._runner.divides else {})
        now = self._clock.monotonic()
        ran = [running for result in results if result.error is None for running in result.running]
        seconds = sum(result.seconds for result in results)
        if ran:
            work = self.work_of(sum(running.sample.rows for running in ran), size)
            self._batch.charge(size, work)
            self._pace.observe(size, work, seconds)
            self._metrics.batch_adapters.observe(len({part.slot for running in ran for part in running.sample.parts}))
        # Progress first: once the decoder has a request's last picture, it may end the request at any time.
        steps: dict[Ticket, int] = {}
        for running in ran:
            steps[running.ticket] = steps.get(running.ticket, 0) + 1
        for ticket, count in steps.items():
            ticket.progress(count)
        for result in results:
            self._account(result, now)
        return seconds

    def _waiting_steps(self) -> dict[int, int]:
        """Steps of queued pictures by the slot that holds their mix."""
        steps: dict[int, int] = {}
        for ticket in self._live:
            slot = self._slots.slot_of(ticket.mixes[0]) if ticket.waiting else None
            if slot is not None:
                steps[slot] = steps.get(slot, 0) + len(ticket.waiting) * ticket.request.sampling_steps
        return steps

    def _account(self, result: Stepped, now: float) -> None:
        """Do what follows from one call: pictures that are done leave, those that failed end."""
        if result.error is not None:
            self._fail(result, result.error)
            return
        self._metrics.step_seconds.labels(result.plan).observe(result.seconds)
        self._metrics.batch_rows.labels(result.plan).observe(sum(running.sample.rows for running in result.running))
        for running in result.running:
            # Another picture of its request may have failed in another call, and ended it.
            if running.ticket in self._live:
                if result.plan not in running.plans:
                    running.plans.append(result.plan)
                self._after_step(running, now)

    def _fail(self, result: Stepped, error: Exception) -> None:
        self._log.error("engine failed", pictures=len(result.running), exc_info=error)
        lost = self._watch.heard(error)
        for ticket in {running.ticket: None for running in result.running}:
            if lost:
                self._end(ticket, device_lost())
            elif classify(error) is Fault.MEMORY:
                self._end(ticket, _no_memory(error))
            else:
                # Whatever it was, it belongs to these requests, and the loop goes on.
                self._end(ticket, our_fault(error, "the engine"))

    def _after_step(self, running: Running, now: float) -> None:
        sample, request = running.sample, running.ticket.request
        if sample.done:
            if not end_phase(running, now):
                return
            running.finished = now
            self._leave(running, "done")
            stages = self._metrics.stage_seconds
            stages.labels("denoise").observe(now - running.sampling)
            if running.sampling > running.started:
                stages.labels("inversion").observe(running.sampling - running.started)
            self._decoder.put(running)
        # While it inverts, an early look would show the caller's own picture.
        elif (
            request.preview_interval and sample.step % request.preview_interval == 0 and running.phase is Phase.SAMPLING
        ):
            self._decoder.put_preview(running)

    def _report(self) -> None:
        now = self._clock.monotonic()
        oldest = min((ticket.accepted for ticket in self._live if ticket.waiting), default=now)
        self._metrics.queue_depth.set(self._admission.waiting)
        self._metrics.queue_tenants.set(self._queue.tenants)
        self._metrics.queue_oldest_seconds.set(now - oldest)
        self._metrics.active_samples.set(len(self._batch))

    def _end(self, ticket: Ticket, error: HueshiftError) -> None:
        ticket.end(error)
        self._retire(ticket)

    def _retire(self, ticket: Ticket) -> None:
        """Take an ended request out of everything."""
        if ticket not in self._live:
            return
        del self._live[ticket]
        tenant = ticket.request.tenant
        outcome = outcome_of(ticket.stream.error)
        for running in self._batch.of(ticket):
            self._queue.charge(tenant, -self._work_left(running))
            self._leave(running, outcome)
        self._admission.left(tenant, len(ticket.waiting), ticket.work)
        ticket.waiting.clear()
        self._queue.remove(tenant, ticket)

    def _work_left(self, running: Running) -> float:
        return self.work_of(row_steps_left(running), running.size)

    def _leave(self, running: Running, outcome: str) -> None:
        self._batch.remove(running)
        self._release(running.ticket)
        self._metrics.samples_ended.labels(outcome).inc()

    def _release(self, ticket: Ticket) -> None:
        """Give back the slots of one picture."""
        for mix in ticket.mixes:
            self._slots.release(mix)


def _too_many_pinned(mixes: int) -> ResourceExhausted:
    return ResourceExhausted(
        Reason.SLOTS_EXHAUSTED,
        f"the picture and its regions need {mixes} adapter slots of the engine at once, and pinned adapters leave "
        "fewer; unpin an adapter, use fewer different mixes, or raise the setting engine.slots",
    )


def _no_memory(error: Exception) -> ResourceExhausted:
    refused = ResourceExhausted(
        Reason.DEVICE_MEMORY,
        "the picture does not fit in the device's memory, even alone; ask for a smaller one, or try again later",
        retry_after=5.0,
    )
    refused.__cause__ = error
    return refused
