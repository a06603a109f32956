"""An accepted request on its way through the scheduler, and its pictures that are being denoised."""

import threading
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from hueshift.adapters.errors import Cancelled, DeadlineExceeded, HueshiftError, Internal, Reason
from hueshift.engines.denoise import Sample
from hueshift.engines.interface import Plan
from hueshift.engines.mixes import Mix, make_mix
from hueshift.server.event_stream import EventStream
from hueshift.server.generation import FinishedEvent, GenerationEvent, GenerationRequest, ImageEvent, ProgressEvent
from hueshift.server.pace import Size
from hueshift.server.preparation import Prepared


class Ticket:
    """One request. `size` is that of its latents (h, w); `work` the UNet work of one picture.

    `mixes` are what every picture of it needs a slot for: its own mix first, then one for each region. `steps` are
    those of all its pictures. `inverted` are the latents of the picture it starts from, once its first picture has
    inverted it; until then, and while it is `inverting`, no other one joins. `inversion_error` is one number on the
    device, which is read with the last picture: the step loop would wait for every queued step.

    The step loop owns it; only `ended`, `end` and `send_image` may be used by other threads.
    """

    def __init__(
        self,
        request: GenerationRequest,
        stream: EventStream[GenerationEvent],
        *,
        size: Size,
        work: float,
        accepted: float,
    ) -> None:
        self.request = request
        self.stream = stream
        self.size = size
        self.work = work
        self.accepted = accepted
        self.mixes: tuple[Mix, ...] = tuple(make_mix(mix) for mix in request.mixes)
        self.waiting = deque(range(len(request.seeds)))
        self.preparing = False
        self.prepared: Prepared | None = None
        self.truncated = 0
        self.steps = request.inversion_steps + request.sampling_steps * len(request.seeds)
        self.inverting = False
        self.inverted: Tensor | None = None
        self.inversion_error: Tensor | None = None
        self._steps_done = 0
        self._images = 0
        self._lock = threading.Lock()

    @property
    def ended(self) -> bool:
        """True once the caller has got everything, or the error that ended it."""
        return self.stream.closed

    def end(self, error: BaseException | None = None) -> bool:
        """End it; return False if it had ended before."""
        return self.stream.close(error)

    def take(self, prepared: Prepared) -> None:
        """Keep what was prepared; now its steps are known exactly."""
        self.prepared, self.truncated = prepared, prepared.truncated
        self.steps = prepared.inversion_steps + prepared.table.steps * len(self.request.seeds)

    def progress(self, steps: int) -> None:
        """Count and report steps of its pictures."""
        self._steps_done += steps
        self.stream.send(ProgressEvent(self._steps_done, self.steps), slot="progress")

    def send_image(self, event: ImageEvent, now: float) -> None:
        """Send a finished picture; after the last one the request has ended."""
        with self._lock:
            self._images += 1
            last = self._images == len(self.request.seeds)
        self.stream.send(event)
        if last:
            count, seconds = len(self.request.seeds), now - self.accepted
            error = None if self.inversion_error is None else float(self.inversion_error)
            self.stream.close(last=FinishedEvent(count, seconds, self.truncated, error))


class Phase(StrEnum):
    """What a picture in the batch is doing: see server/phases.py."""

    INVERSION = "inversion"
    RETURN = "return"
    SAMPLING = "sampling"


@dataclass(slots=True, eq=False)
class Running:
    """One picture in the batch. Times are the clock's monotonic seconds; `sampling` is when sampling began."""

    ticket: Ticket
    index: int
    sample: Sample
    prepared: Prepared
    started: float
    phase: Phase = Phase.SAMPLING
    sampling: float = 0.0
    finished: float = 0.0
    plans: list[Plan] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """UNet rows kept for it, which are those of its largest phase."""
        return self.ticket.request.rows

    @property
    def size(self) -> Size:
        """Height and width of the latents."""
        return self.ticket.size


def outcome_of(error: BaseException | None) -> str:
    """Return the metric label of how an unfinished picture left the batch."""
    if error is None or isinstance(error, Cancelled):
        return "cancelled"
    return "deadline" if isinstance(error, DeadlineExceeded) else "failed"


def as_ours(error: BaseException, what: str) -> HueshiftError:
    """Return `error` if it is meant for the caller, else an Internal that keeps it as its cause."""
    return error if isinstance(error, HueshiftError) else our_fault(error, what)


def our_fault(error: BaseException, what: str) -> Internal:
    """Return an Internal with `error` as its cause, for the log."""
    internal = Internal(Reason.INTERNAL, f"{what} failed; the cause is in the server's log")
    internal.__cause__ = error
    return internal
