"""The one stream on which all work of a TensorRT engine runs: copies, calls, kernels and refits, in order.

Refitting is undefined while the engine has work on another stream; with a single stream there is none.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from hueshift.engines import cuda_lane
from hueshift.engines.cuda_lane import Mark


class Lane(Protocol):
    """A stream. A test's double runs at once, on the CPU."""

    @property
    def device(self) -> torch.device:
        """Where the engine's memory lies."""
        ...

    @property
    def handle(self) -> int:
        """The stream as TensorRT takes it."""
        ...

    def running(self) -> AbstractContextManager[None]:
        """Enter the stream: it waits for what the caller's stream has queued, and that waits for it afterwards."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` queues, without running it, and return what replays it. Raises RuntimeError."""
        ...

    def mark(self) -> Mark:
        """Mark what is queued so far."""
        ...

    def wait(self) -> None:
        """Block until the stream is empty."""
        ...


class CudaLane(cuda_lane.CudaLane):
    """A CUDA stream of its own: on the default stream TensorRT would synchronise the device."""

    @property
    def handle(self) -> int:
        """The stream as TensorRT takes it."""
        return int(self._stream.cuda_stream)

    def wait(self) -> None:
        """Block until the stream is empty."""
        self._stream.synchronize()
