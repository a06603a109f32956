"""Hears of every error that could mean that the device is gone, from any thread, and says so once."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

import structlog

from hueshift.adapters.errors import HueshiftError, Reason, Unavailable
from hueshift.engines.device_errors import Fault, classify

_RETRY_SECONDS = 10.0


class DeviceWatch:
    """Tells `on_lost` of the first error after which the device cannot be used. Safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Callable[[], None]] = []
        self.lost: Future[Unavailable] = Future()
        """Resolved once the device is lost, with the error for callers and for the operator."""

    def on_lost(self, call: Callable[[], None]) -> None:
        """Have `call` made by the thread that finds the device lost."""
        with self._lock:
            self._calls.append(call)

    def heard(self, error: BaseException) -> bool:
        """Look at an error; True if it, or one before it, means that the device is lost."""
        if classify(error) is not Fault.LOST:
            return self.lost.done()
        self._tell("device lost", device_lost(), error)
        return True

    def gave_up(self, error: BaseException) -> HueshiftError:
        """Take note that the step loop has ended by a defect; return the error for whoever waits for it."""
        self._tell("step loop ended", loop_ended(), error)
        return loop_ended()

    def _tell(self, event: str, why: Unavailable, error: BaseException) -> None:
        with self._lock:
            if self.lost.done():
                return
            self.lost.set_result(why)
            calls = list(self._calls)
        structlog.get_logger().critical(event, exc_info=error)
        for call in calls:
            call()


def device_lost() -> Unavailable:
    """The error of every request that was running, and of the server's end."""
    return Unavailable(
        Reason.DEVICE_LOST,
        "the device that draws the pictures has failed; this server ends, so that it can be started again",
        retry_after=_RETRY_SECONDS,
    )


def loop_ended() -> Unavailable:
    """The same where not the device failed, but what drives it."""
    return Unavailable(
        Reason.DEVICE_LOST,
        "the loop that draws the pictures has ended by a defect; this server ends, so that it can be started again",
        retry_after=_RETRY_SECONDS,
    )
