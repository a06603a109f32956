"""The door of the scheduler: what is refused before it waits, and how much waits behind it."""

import threading
from collections import Counter
from typing import Protocol

from hueshift.adapters.errors import DeadlineExceeded, Reason, ResourceExhausted, Unavailable
from hueshift.server.generation import GenerationRequest
from hueshift.server.pace import Pace, Size

_DRAIN_RETRY_SECONDS = 5.0
_MIN_RETRY_SECONDS, _MAX_RETRY_SECONDS = 0.5, 30.0


class QueueLimits(Protocol):
    """Pictures that may wait."""

    @property
    def queue_size(self) -> int:
        """In all."""
        ...

    @property
    def tenant_queue_size(self) -> int:
        """Of one tenant."""
        ...


class Admission:
    """Counts the waiting pictures. Safe to call from any thread."""

    def __init__(self, limits: QueueLimits, pace: Pace) -> None:
        self._limits, self._pace = limits, pace
        self._lock = threading.Lock()
        self._waiting: Counter[str] = Counter()
        self._work = 0.0
        self._draining = False

    def admit(self, request: GenerationRequest, size: Size, work: float, now: float) -> int:
        """Let a request of `size` latents in; return how many pictures wait before it. `work` is one picture's.

        Raises Unavailable (DRAINING), DeadlineExceeded (DEADLINE_TOO_SHORT), ResourceExhausted (QUEUE_FULL,
        TENANT_QUOTA).
        """
        self._check_deadline(request, size, now)
        count, limits = len(request.seeds), self._limits
        with self._lock:
            if self._draining:
                raise Unavailable(
                    Reason.DRAINING,
                    "the server is shutting down; ask another one, or again later",
                    retry_after=_DRAIN_RETRY_SECONDS,
                )
            ahead = self._waiting.total()
            if ahead + count > limits.queue_size:
                raise self._full(
                    Reason.QUEUE_FULL, f"{ahead} pictures wait, {count} more would pass {limits.queue_size}"
                )
            own = self._waiting[request.tenant]
            if own + count > limits.tenant_queue_size:
                raise self._full(
                    Reason.TENANT_QUOTA,
                    f"{own} of your pictures wait, {count} more would pass your {limits.tenant_queue_size}",
                )
            self._waiting[request.tenant] += count
            self._work += work * count
            return ahead

    def left(self, tenant: str, count: int, work: float) -> None:
        """Count `count` pictures out of the queue, `work` each."""
        with self._lock:
            self._waiting[tenant] -= count
            if self._waiting[tenant] <= 0:
                del self._waiting[tenant]
            self._work = self._work - work * count if self._waiting else 0.0

    def drain(self) -> None:
        """Refuse everything from now on."""
        with self._lock:
            self._draining = True

    @property
    def waiting(self) -> int:
        """Pictures that wait."""
        with self._lock:
            return self._waiting.total()

    def _check_deadline(self, request: GenerationRequest, size: Size, now: float) -> None:
        # The first picture takes the inversion's steps one after the other, then its own.
        steps = request.inversion_steps + request.sampling_steps
        needed, left = self._pace.seconds_at_least(size, steps), request.deadline - now
        if left <= 0 or needed > left:
            raise DeadlineExceeded(
                Reason.DEADLINE_TOO_SHORT,
                f"{max(left, 0):.2f} s are left, but {steps} steps of {request.width}x{request.height} take at "
                f"least {needed:.2f} s here; allow more time or ask for fewer steps",
            )

    def _full(self, reason: Reason, text: str) -> ResourceExhausted:
        seconds = self._pace.seconds_for(self._work)
        wait = 1.0 if seconds is None else min(max(seconds / 2, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)
        return ResourceExhausted(reason, f"the queue is full: {text}; try again in {wait:.1f} s", retry_after=wait)
