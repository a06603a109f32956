"""What the tiers of adapter residency have in common: their names, who hears of them, and a bounded cache.

store -> HOST (whole adapters) -> ROWS (composed rows, in pinned memory where there is a GPU) -> SLOT (in the engine).
ENCODER, beside them, has the weights of text encoders that adapters change (engines/encoder_weights.py).
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from enum import StrEnum
from typing import Generic, Protocol, TypeVar


class Tier(StrEnum):
    """Where a row can be found."""

    HOST = "host"
    ROWS = "rows"
    SLOT = "slot"
    ENCODER = "encoder"


class ResidencyObserver(Protocol):
    """Hears what the caches do, from any thread."""

    def looked_up(self, tier: Tier, *, hit: bool) -> None:
        """Something was asked for, and was there or not."""

    def loaded(self, tier: Tier, seconds: float) -> None:
        """Something was brought in, in `seconds`."""

    def evicted(self, tier: Tier) -> None:
        """Something was thrown out."""

    def holds(self, tier: Tier, entries: int, nbytes: int) -> None:
        """The tier's contents changed."""


class Sized(Protocol):
    """A value whose memory counts."""

    @property
    def nbytes(self) -> int:
        """Bytes."""
        ...


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Sized)


class FlightCache(Generic[K, V]):
    """Values by key, least recently used out first, at most `max_bytes` of them. Safe to call from any thread.

    Several threads that miss the same key at once cause one `load`; they all get its result, or its error, and an error
    is not remembered. A value larger than `max_bytes` is handed out but not kept.
    """

    def __init__(self, tier: Tier, load: Callable[[K], V], max_bytes: int, observer: ResidencyObserver) -> None:
        self._tier, self._load, self._max_bytes, self._observer = tier, load, max_bytes, observer
        self._lock = threading.Lock()
        self._held: OrderedDict[K, V] = OrderedDict()
        self._nbytes = 0
        self._flights: dict[K, Future[V]] = {}

    def get(self, key: K) -> V:
        """Return the value, loading it if need be. Raises what `load` raises."""
        with self._lock:
            value = self._held.get(key)
            if value is not None:
                self._held.move_to_end(key)
            flight = self._flights.get(key)
            mine: Future[V] = Future()
            if value is None and flight is None:
                self._flights[key] = mine
        self._observer.looked_up(self._tier, hit=value is not None)
        if value is not None:
            return value
        return flight.result() if flight is not None else self._fly(key, mine)

    def drop_where(self, gone: Callable[[K], bool]) -> None:
        """Forget every value whose key is `gone`; one that is being loaded right now is handed out but not kept."""
        with self._lock:
            for key in [key for key in self._flights if gone(key)]:
                del self._flights[key]
            for key in [key for key in self._held if gone(key)]:
                self._forget(key)
            self._tell()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._nbytes

    def __contains__(self, key: K) -> bool:
        """True if the value is held."""
        return key in self._held

    def __len__(self) -> int:
        """Values held."""
        return len(self._held)

    def coming(self, key: K) -> bool:
        """True if the value is held or being loaded."""
        with self._lock:
            return key in self._held or key in self._flights

    def _fly(self, key: K, flight: Future[V]) -> V:
        begin = time.perf_counter()
        try:
            value = self._load(key)
        except BaseException as error:
            with self._lock:
                self._land(key, flight)
            flight.set_exception(error)
            raise
        self._observer.loaded(self._tier, time.perf_counter() - begin)
        with self._lock:
            # A drop in the meantime took the flight away: then the value must not be kept.
            if self._land(key, flight) and value.nbytes <= self._max_bytes:
                self._held[key] = value
                self._nbytes += value.nbytes
                while self._nbytes > self._max_bytes:
                    self._forget(next(iter(self._held)))
                self._tell()
        flight.set_result(value)
        return value

    def _land(self, key: K, flight: Future[V]) -> bool:
        if self._flights.get(key) is not flight:
            return False
        del self._flights[key]
        return True

    def _forget(self, key: K) -> None:
        self._nbytes -= self._held.pop(key).nbytes
        self._observer.evicted(self._tier)

    def _tell(self) -> None:
        self._observer.holds(self._tier, len(self._held), self._nbytes)
