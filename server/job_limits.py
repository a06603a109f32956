"""How long and how large one job may be."""

import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hueshift.adapters.errors import Reason, ResourceExhausted

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Return what this process holds in memory now; where the system does not tell, the most it ever held."""
    if _STATM.exists():
        pages = int(_STATM.read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others kilobytes.
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True, slots=True)
class JobLimits:
    """0 means no limit. `seconds`: device time of all attempts together; `memory`: resident bytes of the worker."""

    seconds: float = 0.0
    memory: int = 0
    measure: Callable[[], int] = field(default=resident_bytes)

    def passed(self, seconds: float) -> ResourceExhausted | None:
        """Return the error of the limit that a job of so many device seconds has passed, None if it has not."""
        if self.seconds and seconds > self.seconds:
            return ResourceExhausted(
                Reason.JOB_TIME_LIMIT,
                f"the job has used {seconds:.0f} device seconds; allowed: {self.seconds:.0f}. Ask for fewer steps, a "
                "smaller batch or fewer validation pictures.",
            )
        held = self.measure() if self.memory else 0
        if held > self.memory:
            return ResourceExhausted(
                Reason.JOB_MEMORY_LIMIT,
                f"the job's worker holds {held} bytes; allowed: {self.memory}. Ask for a smaller batch.",
            )
        return None
