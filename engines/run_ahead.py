"""How far the host may run ahead of a device whose calls return before they are done."""

from collections import deque

from hueshift.engines.cuda_lane import Mark

# Calls that may be queued behind the one that runs: one hides the host's work, more would only delay who joins or
# cancels.
_BEHIND = 1


class RunAhead:
    """The calls that are queued. For the thread that runs the engine."""

    def __init__(self) -> None:
        self._queued: deque[Mark] = deque()

    @property
    def working(self) -> bool:
        """True while calls are queued that the device has not done."""
        return bool(self._queued) and not self._queued[-1].done()

    def make_room(self) -> None:
        """Block until another call may be queued."""
        while len(self._queued) > _BEHIND:
            self._queued.popleft().wait()

    def add(self, mark: Mark) -> None:
        """Count a call that was just queued; `mark` lies behind it."""
        self._queued.append(mark)
