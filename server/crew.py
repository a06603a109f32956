"""The jobs that a worker has in hand: one, or several of a family that take their training steps together."""

import threading
from collections.abc import Callable

from hueshift.server.job_limits import resident_bytes
from hueshift.server.store.job_records import ClaimedJob
from hueshift.training.sharing.family import Family, family_of
from hueshift.training.spec import TrainingSpec


class Crew:
    """At most `places` jobs at a time. `work` runs one attempt and says whether the store answered.

    With one place it runs in the caller's thread, else each job gets a thread of its own. Jobs share only with others
    of their family (`training/sharing/family.py`); one without a family is alone. Used by one thread.
    """

    def __init__(self, places: int, work: Callable[[ClaimedJob], bool]) -> None:
        self._places = places
        self._work = work
        self._threads: list[threading.Thread] = []
        self._family: Family | None = None

    @property
    def full(self) -> bool:
        """True if no other job can be taken now, whatever it is."""
        working = self._working()
        return len(working) >= self._places or (bool(working) and self._family is None)

    def fits(self, spec: TrainingSpec) -> bool:
        """True if a job can be taken beside those in hand."""
        return not self._working() or (self._family is not None and family_of(spec) == self._family)

    def take(self, claimed: ClaimedJob) -> bool:
        """Begin with a job that fits. With one place, return when it has ended, and what `work` said; else True."""
        if self._places == 1:
            return self._work(claimed)
        self._family = family_of(claimed.job.spec)
        # Daemons, so that a second signal ends the process; `wait` lets them end otherwise.
        thread = threading.Thread(target=self._work, args=(claimed,), name=f"job-{claimed.job.job_id}", daemon=True)
        self._threads = [*self._working(), thread]
        thread.start()
        return True

    def wait(self) -> None:
        """Wait for all jobs in hand to end."""
        for thread in self._threads:
            thread.join()

    def share_of_memory(self) -> int:
        """Resident bytes of this process for each job in hand: what one job holds cannot be told from another's."""
        return resident_bytes() // max(1, len(self._working()))

    def _working(self) -> list[threading.Thread]:
        return [thread for thread in self._threads if thread.is_alive()]
