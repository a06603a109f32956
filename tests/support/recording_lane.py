"""A lane that remembers what was done on it, and can hold work of the lane beside it back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hueshift.engines.cuda_lane import HostLane, Mark, Work


class ManualMark:
    """A mark that is passed when told so, or when somebody waits for it."""

    def __init__(self, *, passed: bool) -> None:
        self.passed = passed
        self.waits = 0

    def done(self) -> bool:
        """True once it is passed."""
        return self.passed

    def wait(self) -> None:
        """Pass it."""
        self.waits += 1
        self.passed = True


class RecordingLane(HostLane):
    """Counts captures and replays by order; `refuse` and `out_of_memory` make captures fail. Marks are passed at once,
    if `passing` says so.
    """

    def __init__(self, *, passing: bool = True) -> None:
        self.log: list[str] = []
        self.refuse = False
        self.out_of_memory = False
        self.passing = passing
        self.marks: list[ManualMark] = []
        self.waited: list[Mark] = []
        self.besides: list[RecordingLane] = []

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Remember the entry and the exit."""
        self.log.append("apart")
        yield
        self.log.append("left")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Remember the entry."""
        self.log.append("enter")
        yield

    def capture(self, work: Work) -> Work:
        """Remember the capture, and every replay of it."""
        if self.out_of_memory:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if self.refuse:
            raise RuntimeError("operation not permitted when stream is capturing")
        number = sum(entry.startswith("capture") for entry in self.log)
        self.log.append(f"capture {number}")

        def replay() -> None:
            self.log.append(f"replay {number}")
            work()

        return replay

    def mark(self) -> Mark:
        """A mark, kept."""
        self.marks.append(ManualMark(passed=self.passing))
        return self.marks[-1]

    def after(self, mark: Mark) -> None:
        """Remember what is waited for."""
        self.waited.append(mark)

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """Remember that something was lent, and that it was inside of the lane or not."""
        self.log.append(f"lent {len(list(tensors))}")

    def beside(self) -> "RecordingLane":
        """Another one, kept: the engine makes one for copies, then one for merges."""
        self.besides.append(RecordingLane(passing=self.passing))
        return self.besides[-1]

    @property
    def captures(self) -> int:
        """Captures so far."""
        return sum(entry.startswith("capture") for entry in self.log)
