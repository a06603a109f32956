"""How fast the engine has been lately, for refusing what clearly cannot be done in time."""

from collections import deque

Size = tuple[int, int]

# Until a size has been seen this often, nothing is said about it.
_WARM = 16
# What counts as lately. The fastest of these is the floor, so one slow spell refuses nobody.
_WINDOW = 64
# A step alone in the batch may be faster than any seen in company: refuse only at twice the speed seen.
_DOUBT = 0.5


class Pace:
    """Seconds per step by latent size, and UNet rows per second. For one writing thread and any readers."""

    def __init__(self) -> None:
        self._steps: dict[Size, deque[float]] = {}
        self._rows: deque[float] = deque(maxlen=_WINDOW)

    def observe(self, size: Size, work: float, seconds: float) -> None:
        """Count one step of a batch of `size` that did `work` (rows times their share of the native area)."""
        self._steps.setdefault(size, deque(maxlen=_WINDOW)).append(seconds)
        if seconds > 0:
            self._rows.append(work / seconds)

    def seconds_at_least(self, size: Size, steps: int) -> float:
        """Seconds that `steps` steps take at the very least; 0 as long as too little is known."""
        seen = tuple(self._steps.get(size, ()))
        return steps * min(seen) * _DOUBT if len(seen) >= _WARM else 0.0

    def seconds_for(self, work: float) -> float | None:
        """Seconds the engine needs for `work` at its mean speed, None as long as too little is known."""
        seen = tuple(self._rows)
        return work * len(seen) / sum(seen) if len(seen) >= _WARM else None
