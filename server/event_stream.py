"""Events from worker threads to one asyncio consumer: bounded, and neither side ever waits for the other."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Cell(Generic[T]):
    __slots__ = ("event", "slot")

    def __init__(self, event: T, slot: Hashable) -> None:
        self.event, self.slot = event, slot


class EventStream(Generic[T]):
    """A queue from any thread into the event loop that made it.

    An event sent with a `slot` replaces the unread one of the same slot, in its place: a slow reader of a
    hundred-step request finds one Progress, not a hundred. Made inside the event loop that will read it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._unread: deque[_Cell[T]] = deque()
        self._replaceable: dict[Hashable, _Cell[T]] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._signalled = False

    def send(self, event: T, slot: Hashable = None) -> None:
        """Add an event, or replace the unread one of `slot`. After `close` it is dropped."""
        with self._lock:
            if self._closed:
                return
            waiting = self._replaceable.get(slot)
            if waiting is not None:
                waiting.event = event
                return
            cell = _Cell(event, slot)
            self._unread.append(cell)
            if slot is not None:
                self._replaceable[slot] = cell
        self._signal()

    def close(self, error: BaseException | None = None, *, last: T | None = None) -> bool:
        """End the stream, after the unread events and `last`, with `error` if given.

        Returns False if it had ended before, and then does nothing.
        """
        with self._lock:
            if self._closed:
                return False
            if last is not None:
                self._unread.append(_Cell(last, None))
            self._closed, self._error = True, error
        self._signal()
        return True

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._closed

    @property
    def error(self) -> BaseException | None:
        """What it was closed with."""
        return self._error

    def __aiter__(self) -> AsyncIterator[T]:
        """Iterate the events; to be done once."""
        return self

    async def __anext__(self) -> T:
        """Return the next event; raise the error the stream was closed with."""
        while True:
            with self._lock:
                if self._unread:
                    cell = self._unread.popleft()
                    self._replaceable.pop(cell.slot, None)
                    return cell.event
                if self._closed:
                    if self._error is not None:
                        raise self._error
                    raise StopAsyncIteration
                self._signalled = False
                self._ready.clear()
            await self._ready.wait()

    def _signal(self) -> None:
        with self._lock:
            if self._signalled:
                return
            self._signalled = True
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:
            # The loop is closed: nobody can read any more. The request itself ends by cancellation or deadline.
            self._closed = True
