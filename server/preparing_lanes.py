"""Which threads prepare a request: one whose rows are at hand never waits behind those that are being loaded.

A load takes milliseconds from a disk, seconds from an object store, and a minute while that does not answer. If both
kinds shared threads, a few requests with cold adapters would keep everybody's next pictures waiting.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from hueshift.engines.mixes import Mix

T = TypeVar("T")

# Requests handed to threads at a time: enough to keep them busy, few enough that a newcomer is not stuck behind one
# tenant's burst.
_READY, _READY_THREADS = 4, 2
_LOADING, _LOADING_THREADS = 8, 4


@dataclass(slots=True, eq=False)
class Lane:
    """Threads for one kind of requests, and how many they have in hand, of at most so many."""

    executor: Executor
    most: int
    busy: int = 0

    @property
    def full(self) -> bool:
        """True if it takes no more."""
        return self.busy >= self.most


class PreparingLanes:
    """The two lanes. For the step loop's thread; `at_hand` says of a mix that nothing must be loaded for it."""

    def __init__(self, at_hand: Callable[[Mix], bool], executor: Executor | None = None) -> None:
        """Make the threads, or let `executor` do it all."""
        self._at_hand = at_hand
        self._ready = Lane(executor or ThreadPoolExecutor(_READY_THREADS, "hueshift-prepare"), _READY)
        self._loading = Lane(executor or ThreadPoolExecutor(_LOADING_THREADS, "hueshift-load"), _LOADING)

    @property
    def busy(self) -> int:
        """Requests in hand."""
        return self._ready.busy + self._loading.busy

    @property
    def full(self) -> bool:
        """True if neither lane takes more."""
        return self._ready.full and self._loading.full

    def submit(self, mixes: Sequence[Mix], work: Callable[[], T]) -> tuple[Lane, Future[T]] | None:
        """Hand over the preparation of a request with these mixes; None while its lane is full.

        Whoever gets the result counts it off the lane's `busy`.
        """
        lane = self._ready if all(map(self._at_hand, mixes)) else self._loading
        if lane.full:
            return None
        lane.busy += 1
        return lane, lane.executor.submit(work)

    def close(self) -> None:
        """Drop what was not begun and wait for the rest. Blocks."""
        for lane in (self._ready, self._loading):
            lane.executor.shutdown(wait=True, cancel_futures=True)
