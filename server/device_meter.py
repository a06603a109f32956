"""What each of the jobs that share a device uses of it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hueshift.server.clock import Clock
from hueshift.training.spec import TrainingSpec


@dataclass(slots=True)
class _Share:
    rows: int
    seconds: float


class DeviceMeter:
    """Divides the time of one device among the jobs that run on it, in proportion to their rows of a training step.

    Jobs that train together wait for each other at every step, so each is in hand as long as the others are; what
    they cost the device is the step, and of that their rows. A job that is alone is counted its whole time, and the
    counts of all jobs together never exceed the time that passed. For any thread.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._shares: dict[str, _Share] = {}
        self._counted = clock.monotonic()

    @contextmanager
    def running(self, job_id: str, rows: int, seconds: float = 0.0) -> Iterator[None]:
        """Count a job of `rows` UNet rows a step while the block runs; it had used `seconds` before.

        A job may be taken again while an attempt that lost its lease still ends here. The newer one is counted then.
        """
        share = _Share(rows, seconds)
        with self._lock:
            self._count()
            self._shares[job_id] = share
        try:
            yield
        finally:
            with self._lock:
                self._count()
                if self._shares.get(job_id) is share:
                    del self._shares[job_id]

    def used(self, job_id: str) -> float | None:
        """Return the seconds of a job in all, those before included; None if it is not running here."""
        with self._lock:
            self._count()
            share = self._shares.get(job_id)
            return None if share is None else share.seconds

    def _count(self) -> None:
        now = self._clock.monotonic()
        passed, self._counted = now - self._counted, now
        rows = sum(share.rows for share in self._shares.values())
        for share in self._shares.values():
            share.seconds += passed * share.rows / rows


def step_rows(spec: TrainingSpec) -> int:
    """UNet rows of one training step: its pictures, and as many class pictures where prior preservation is on."""
    return spec.batch_size * (2 if spec.prior_weight > 0 else 1)
