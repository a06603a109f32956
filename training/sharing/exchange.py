"""Where threads bring work that is cheaper done together: each waits for the others, one does it for all.

There is no thread of its own. Whoever finds that all are there does the work of all, in its own thread.
"""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

W = TypeVar("W")
R = TypeVar("R")

_log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Entry(Generic[W, R]):
    work: W
    result: R | Exception | None = None
    done: bool = False


class Exchange(Generic[W, R]):
    """A meeting place of members, who come and go.

    A round begins when every present member has handed in its work, or `patience` seconds after the first one did (or
    after the round before ended, if that is later). A member is present from when it comes, or from its `hand_in`,
    until it leaves; who keeps the others waiting for longer is not waited for until it comes again. `run` gets the
    works of a round and returns, in their order, a result or the exception of each.
    """

    def __init__(
        self,
        run: Callable[[Sequence[W]], Sequence[R | Exception]],
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._patience = patience
        self._clock = clock
        self._changed = threading.Condition()
        self._present: set[Hashable] = set()
        self._waiting: dict[Hashable, _Entry[W, R]] = {}
        self._since = 0.0
        self._running = False

    @property
    def waiting(self) -> int:
        """Works of the round that has not begun."""
        with self._changed:
            return len(self._waiting)

    def hand_in(self, member: Hashable, work: W) -> R:
        """Return the result of `work`, done in a round with what the others bring. Raises its exception if it failed.

        Blocks for at most the patience and two rounds.
        """
        entry: _Entry[W, R] = _Entry(work)
        with self._changed:
            if not self._waiting:
                self._since = self._clock()
            self._present.add(member)
            self._waiting[member] = entry
            self._changed.notify_all()
        while not entry.done:
            with self._changed:
                if not entry.done and not self._ready():
                    self._changed.wait(self._remaining())
                    continue
                round_ = {} if entry.done else self._begin()
            if round_:
                self._work_off(member, round_)
        if isinstance(entry.result, Exception):
            raise entry.result
        return entry.result  # type: ignore[return-value]  # a finished entry has a result, and None may be one

    def come(self, member: Hashable) -> None:
        """Let the others wait for `member`, whose first work is on its way."""
        with self._changed:
            self._present.add(member)

    def leave(self, member: Hashable) -> None:
        """Let nobody wait for `member` until it hands something in."""
        with self._changed:
            self._present.discard(member)
            self._changed.notify_all()

    def _ready(self) -> bool:
        if self._running or not self._waiting:
            return False
        return self._present <= self._waiting.keys() or self._clock() - self._since >= self._patience

    def _remaining(self) -> float | None:
        """Seconds to wait before looking again; None while a round runs, whose end is told."""
        return None if self._running else max(0.0, self._patience - (self._clock() - self._since))

    def _begin(self) -> dict[Hashable, _Entry[W, R]]:
        late = self._present - self._waiting.keys()
        if late:
            _log.info("sharing.not_waited_for", members=len(late), seconds=self._patience)
            self._present -= late
        taken, self._waiting, self._running = self._waiting, {}, True
        return taken

    def _work_off(self, leader: Hashable, taken: dict[Hashable, _Entry[W, R]]) -> None:
        finished = False
        try:
            results = self._run([entry.work for entry in taken.values()])
            for entry, result in zip(taken.values(), results, strict=True):
                entry.result = result
            finished = True
        finally:
            with self._changed:
                for entry in taken.values():
                    entry.done = finished
                if not finished:
                    # This thread goes down with what was raised; one of the others does their works.
                    self._present.discard(leader)
                    self._waiting = {member: e for member, e in taken.items() if member != leader} | self._waiting
                self._running, self._since = False, self._clock()
                self._changed.notify_all()
