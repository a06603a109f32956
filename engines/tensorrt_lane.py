"""The one stream on which all work of a TensorRT engine runs: copies, calls, kernels and refits, in order.

Refitting is undefined while the engine has work on another stream; with a single stream there is none.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch


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

    def wait(self) -> None:
        """Block until the stream is empty."""
        ...


class CudaLane:
    """A CUDA stream of its own: on the default stream TensorRT would synchronise the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def handle(self) -> int:
        """The stream as TensorRT takes it."""
        return int(self._stream.cuda_stream)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Enter the stream; see Lane."""
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` queues; see Lane. Other threads of the server may go on allocating meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    def wait(self) -> None:
        """Block until the stream is empty."""
        self._stream.synchronize()
