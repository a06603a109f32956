"""How a worker process learns that it should end: a signal, or the death of the server that started it."""

import os
import signal
import threading
from types import FrameType


class StopFlag:
    """True once the process should end. A plain attribute, because a signal handler must not wait for a lock."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """Ask for the end."""
        self.requested = True

    def on_signals(self) -> None:
        """Let SIGTERM and SIGINT ask for the end. Call it from the main thread."""

        def handle(_number: int, _frame: FrameType | None) -> None:
            self.requested = True

        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, handle)

    def on_closed(self, descriptor: int) -> None:
        """Ask for the end once the other side of a pipe is gone.

        A killed server cannot send a signal, but the kernel closes its pipes. PR_SET_PDEATHSIG would fire too early:
        when the server's *thread* that started us ends.
        """

        def wait() -> None:
            while os.read(descriptor, 4096):
                continue
            self.requested = True

        threading.Thread(target=wait, name="parent", daemon=True).start()
