"""When to try again and how long to wait: pure arithmetic, shared by the sync and the async client."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from hueshift.client.errors import HueshiftClientError

# A stream that lived this long was accepted, even if the job had nothing to tell.
_SETTLED_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Jittered exponential back-off, only for errors the server marks as retryable.

    `attempts` counts the first try. Delays are in seconds: the n-th is drawn between half and all of
    `first_delay * 2**(n-1)`, at most `longest_delay`, and never below what the server asked for. `patience` is how long
    a broken watch is taken up again in vain, and the longest wait at the server's request: a quota of the day asks for
    hours, and whoever can wait that long should hear of it.
    """

    attempts: int = 5
    first_delay: float = 0.2
    longest_delay: float = 10.0
    patience: float = 60.0
    draw: Callable[[], float] = field(default=random.random, repr=False)

    def delay(self, failed: int, error: HueshiftClientError, remaining: float | None) -> float | None:
        """Return the wait after the `failed`-th failure, or None to give up.

        `remaining` is what is left of the call's own time; a wait that would not fit is not begun.
        """
        if not error.retryable or failed >= self.attempts:
            return None
        wait = self.backoff(failed)
        if error.retry_after is not None:
            # A little later than asked, so that many callers told the same do not return in the same instant.
            wait = max(wait, error.retry_after * (1 + 0.25 * self.draw()))
        return wait if wait <= self.patience and (remaining is None or wait < remaining) else None

    def backoff(self, failed: int) -> float:
        """Return the jittered wait after the `failed`-th failure in a row, from 1."""
        ceiling = min(self.first_delay * 2.0 ** (failed - 1), self.longest_delay)
        return ceiling * (0.5 + 0.5 * self.draw())


class Deadline:
    """The time of one call over all its attempts; None never ends."""

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = None if seconds is None else now() + seconds

    def remaining(self) -> float | None:
        """Seconds left, never negative; None if there is no end."""
        return None if self._end is None else max(0.0, self._end - self._now())


class Reconnects:
    """When a broken watch is taken up again.

    A watch only reads, and tells the server where it stopped, so a lost connection or a server that stops is no reason
    to end it. It ends when taking it up has failed for `patience` seconds, and at once on an error that will not pass.
    """

    def __init__(self, policy: RetryPolicy, now: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._now = now
        self._failed = 0
        self._trouble_since = 0.0
        self._opened = 0.0

    def opened(self) -> None:
        """Note that a stream begins."""
        self._opened = self._now()

    def heard(self) -> None:
        """Note that an event came: what failed before no longer counts."""
        self._failed = 0

    def delay(self, error: HueshiftClientError | None) -> float | None:
        """Return the wait before the next stream, or None to give up.

        `error` is None when the stream ended without the job's last event.
        """
        lost = error is None or error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        if not lost and not (error is not None and error.retryable):
            return None
        if self._now() - self._opened > _SETTLED_SECONDS:
            self._failed = 0
        if self._failed == 0:
            self._trouble_since = self._now()
        self._failed += 1
        wait = self._policy.backoff(self._failed)
        if error is not None and error.retry_after is not None:
            wait = max(wait, error.retry_after)
        return wait if self._now() - self._trouble_since + wait < self._policy.patience else None
