"""Named points at which a test makes the process kill itself, to prove that jobs survive it.

Nothing is armed unless the worker's entry is told to; an unarmed point costs one comparison.
"""

import os
import signal
from dataclasses import dataclass

from hueshift.adapters.errors import InvalidArgument, Reason

NAMES = ("claimed", "mid-step", "checkpoint-written", "before-publish", "after-publish")


@dataclass(slots=True)
class Failpoint:
    """Kills the process with SIGKILL at the `hits`-th passage of the point called `name`; "" never does."""

    name: str = ""
    hits: int = 1

    @classmethod
    def parse(cls, text: str) -> "Failpoint":
        """Read `name` or `name:n`; empty means unarmed. Raises InvalidArgument (SETTINGS_INVALID)."""
        if not text:
            return cls()
        name, _, count = text.partition(":")
        if name not in NAMES or not (count or "1").isdecimal() or int(count or 1) < 1:
            raise InvalidArgument.for_field(
                "failpoint",
                f"{text!r} given; allowed: one of {', '.join(NAMES)}, with ':n' for its n-th passage",
                Reason.SETTINGS_INVALID,
            )
        return cls(name, int(count or 1))

    def at(self, name: str) -> None:
        """Pass the point called `name`."""
        if name != self.name:
            return
        self.hits -= 1
        if self.hits <= 0:
            # SIGKILL, not an exception: no handler, no `finally`, no flush may run, as when the machine kills it.
            os.kill(os.getpid(), signal.SIGKILL)
