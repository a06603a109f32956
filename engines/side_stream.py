"""A stream for a thread that works beside the step loop, so that neither waits for the other's queue."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """For one thread, and for results that it brings to the host before it lets go of what it read.

    On the default stream, which all threads share, a picture's decoding (tens of milliseconds) would stand between two
    denoising steps. On a CPU it does nothing.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Run the block's work on the stream, after what the default stream of `device` has queued by now."""
        if device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.stream(self._stream):
            yield
