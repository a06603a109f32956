"""What the step loop costs beside the calls of the engine."""

from hueshift.engines.interface import RunsAhead
from hueshift.server.clock import Clock
from hueshift.server.metrics import Metrics


class StepTimes:
    """Counts two times: that of the loop while it has pictures, and that of it in which the engine worked for them.

    The overhead over the bare loop of calls is the first over the second, less 1. What the loop does while the device
    still works on an earlier call costs nothing, and is counted as the engine's. For the loop's thread.
    """

    def __init__(self, engine: object, metrics: Metrics, clock: Clock) -> None:
        self._engine, self._metrics, self._clock = engine, metrics, clock
        # Up to when the loop's time is counted, and when the engine was called and had answered last.
        self._since: float | None = None
        self._called = 0.0
        self._answered: float | None = None
        self._hidden = 0.0

    def begin(self) -> None:
        """A round begins. While there are pictures it does so where the last one ended."""
        if self._since is None:
            self._since = self._clock.monotonic()

    def calling(self) -> None:
        """The engine is about to be called."""
        self._called = self._clock.monotonic()
        working = isinstance(self._engine, RunsAhead) and self._engine.working
        self._hidden = self._called - self._answered if working and self._answered is not None else 0.0

    def end(self, seconds: float, *, pictures: bool) -> None:
        """The round ends; its calls took `seconds`, 0 without a call. `pictures`: some are left in the batch."""
        if seconds > 0 and self._since is not None:
            now = self._clock.monotonic()
            self._metrics.step_loop_seconds.inc(max(0.0, now - self._since))
            self._metrics.step_call_seconds.inc(seconds + self._hidden)
            self._since, self._answered = now, self._called + seconds
        if not pictures:
            self._since = self._answered = None
