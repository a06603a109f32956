"""A lane of the host with a device's memory: so many bytes in all, of which graphs and whoever asks take theirs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hueshift.engines.cuda_lane import HostLane, Work


class MemoryLane(HostLane):
    """`pool` bytes belong to its graphs, which share them: as many as the largest of them has results in all. `held`
    bytes are held by others. More than `total` is an error, as on a device.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.pool = 0
        self.held = 0

    def capture(self, work: Work) -> Work:
        """Let the graphs' pool grow if it must."""
        wanted = max(self.pool, result_bytes(work))
        if wanted + self.held > self.total:
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory: {wanted} bytes")
        self.pool = wanted
        return work

    def free_bytes(self) -> int | None:
        """What is left."""
        return self.total - self.held - self.pool

    def total_bytes(self) -> int | None:
        """All of it."""
        return self.total

    def peak_bytes(self, work: Work) -> int:
        """All results of it."""
        return result_bytes(work)

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Take it, if it is there."""
        if nbytes + self.held + self.pool > self.total:
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory: {nbytes} bytes")
        self.held += nbytes
        try:
            yield
        finally:
            self.held -= nbytes

    def beside(self) -> "MemoryLane":
        """Itself: the memory is one."""
        return self


def result_bytes(work: Callable[[], object]) -> int:
    """Bytes of the results of all operations in `work`."""
    counting = _Counting()
    with counting:
        work()
    return counting.nbytes


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        self.nbytes += sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out
