"""What is done about work that fails again and again: it is tried ever more seldom, and little is said of it.

A database that is away for an hour would otherwise fill the log with a traceback a second from every task of every
server, and meet all of them at once when it comes back.
"""

import random
from collections.abc import Callable
from typing import Protocol

import structlog

from hueshift.server.clock import Clock, SystemClock

# Of a task that comes round every second or two: a minute after the end of an outage all is as before.
LONGEST_SECONDS = 30.0
# Between two lines of the log about one outage.
SAY_SECONDS = 60.0
# Doublings of a pause: more would only pass what a float holds.
_MOST_DOUBLINGS = 16


class Observer(Protocol):
    """Hears how work in the background goes, by the name of its task."""

    def failed(self, task: str) -> None:
        """A round failed."""
        ...

    def outage(self, task: str, lasts: bool) -> None:
        """A round failed after one that did not, or went well after one that did."""
        ...


class Nobody:
    """An observer that does nothing."""

    def failed(self, task: str) -> None:
        """Do nothing."""

    def outage(self, task: str, lasts: bool) -> None:
        """Do nothing."""


class Outage:
    """Follows one task's failures in a row. One thread, or one event loop, uses it.

    The first is logged with its traceback, then one short line a minute with their number, and one when it works again.
    """

    def __init__(
        self,
        task: str,
        *,
        observer: Observer | None = None,
        clock: Clock | None = None,
        longest: float = LONGEST_SECONDS,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`longest` is the longest pause in seconds; `draw` gives numbers from 0 to 1 that set servers apart."""
        self._task = task
        self._observer: Observer = observer or Nobody()
        self._clock: Clock = clock or SystemClock()
        self._longest, self._draw = longest, draw
        self._log = structlog.get_logger()
        self.failures = 0
        self._began = self._said = 0.0

    def failed(self, error: BaseException) -> None:
        """Take note of a failure."""
        self.failures += 1
        now = self._clock.monotonic()
        self._observer.failed(self._task)
        if self.failures == 1:
            self._began = self._said = now
            self._observer.outage(self._task, True)
            self._log.warning("background.failed", task=self._task, exc_info=error)
        elif now - self._said >= SAY_SECONDS:
            self._said = now
            # Not the error's text, in which a database may quote what it was given.
            self._say("background.still_failing", error=type(error).__name__)

    def worked(self) -> None:
        """Take note of a success."""
        if self.failures:
            self._say("background.recovered")
            self._observer.outage(self._task, False)
            self.failures = 0

    def pause(self, seconds: float) -> float:
        """Return how long to wait before the next round of a task that comes round every `seconds`.

        After failures in a row twice as long each time, up to the longest pause; half of it by chance.
        """
        if not self.failures:
            return seconds
        grown = min(max(seconds, self._longest), seconds * 2.0 ** min(self.failures, _MOST_DOUBLINGS))
        return grown * (0.5 + 0.5 * self._draw())

    def _say(self, event: str, **more: str) -> None:
        seconds = round(self._clock.monotonic() - self._began, 1)
        self._log.warning(event, task=self._task, failures=self.failures, seconds=seconds, **more)
