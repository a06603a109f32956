"""Streams as the CUDA engine uses them: work in order, captured in graphs, marked, timed. And a stand-in on the host.

The engine's steps run on one lane and the writing of merged weights on another. `HostLane` does the same at once on the
CPU, so that everything but the timing can be tested, and profiled for its Python, without a GPU.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Work = Callable[[], None]
Made = TypeVar("Made")


class Mark(Protocol):
    """A point in a lane's work."""

    def done(self) -> bool:
        """True once the lane has passed it; does not block."""
        ...

    def wait(self) -> None:
        """Block until the lane has passed it."""
        ...


class GraphLane(Protocol):
    """One stream of work in order."""

    @property
    def device(self) -> torch.device:
        """Where its memory lies."""
        ...

    def running(self) -> AbstractContextManager[None]:
        """Enter it: it waits for what the caller's stream has queued, and that waits for it afterwards."""
        ...

    def apart(self) -> AbstractContextManager[None]:
        """Enter it without waiting, either way."""
        ...

    def capture(self, work: Work) -> Work:
        """Record what `work` queues, without running it, and return what replays it.

        `work` must have run before, so that nothing is set up inside; all captures of a lane share their memory, so
        what a replay leaves there lasts until the next one. Raises RuntimeError where something cannot be captured.
        """
        ...

    def mark(self) -> Mark:
        """Mark what is queued so far."""
        ...

    def after(self, mark: Mark) -> None:
        """Let what is queued from now on wait for a mark of another lane."""
        ...

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """Let the device's default stream read tensors that were made here, for as long as somebody holds them.

        Without it their memory could be written again by this lane while calls that read them are still queued.
        """
        ...

    def beside(self) -> "GraphLane":
        """A lane of the same device whose work runs at the same time."""
        ...

    def times_ms(self, work: Work, repeats: int) -> list[float]:
        """Milliseconds of each run of `work`, sorted."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes of the device that nothing holds, caches of the allocator included; None if that is not known."""
        ...

    def total_bytes(self) -> int | None:
        """Bytes of the device's memory; None if that is not known."""
        ...

    def peak_bytes(self, work: Work) -> int:
        """Run `work`, wait for it, and return the most memory that it took at a time; 0 if that is not known."""
        ...

    def holding(self, nbytes: int) -> AbstractContextManager[None]:
        """Take memory from all others for as long as the block runs. Raises torch.cuda.OutOfMemoryError."""
        ...


class CudaLane:
    """A CUDA stream with a memory pool for its graphs.

    The kernels of an `urgent` one begin as soon as a multiprocessor has room, before what others have waiting there.
    """

    def __init__(self, device: torch.device, *, urgent: bool = False) -> None:
        # With its number, as tensors have it: `cuda` and `cuda:0` are not equal.
        number = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", number)
        # Lower is sooner. Kernels of a graph have the priority of the stream that they were captured on.
        self._stream = torch.cuda.Stream(self.device, priority=-1 if urgent else 0)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Enter the stream; see GraphLane."""
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Enter the stream alone; see GraphLane."""
        with torch.cuda.stream(self._stream):
            yield

    def capture(self, work: Work) -> Work:
        """Record what `work` queues; see GraphLane. Other threads of the server may go on allocating meanwhile.

        It waits for all of the device and gives cached memory back, as torch.cuda.graph does: the pool of a lane whose
        graphs were all dropped may only be used again after that.
        """
        graph = torch.cuda.CUDAGraph()
        # The current device, which torch.cuda.graph waits for, belongs to the thread: 0 in a new one. And it leaves its
        # stream current where a capture fails at the end, so that all later work of the thread would run there.
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                work()
        except BaseException:
            self._close_pool()
            raise
        replay: Work = graph.replay
        return replay

    def _close_pool(self) -> None:
        """End the capture for torch's allocator too, which torch 2.11 leaves out where CUDA refuses to end it.

        For the allocator it would go on for ever: memory that was lent to another stream would never come back, and
        emptying the cache, which every capture begins with, would be an internal error.
        """
        # An error where the capture was ended as it should be.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)

    def mark(self) -> Mark:
        """Mark what is queued so far."""
        # Waiting for it sleeps: a thread that spins would take a core from decoding and the services.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return _CudaMark(event)

    def after(self, mark: Mark) -> None:
        """Wait, on the stream, for a mark."""
        if isinstance(mark, _CudaMark):
            self._stream.wait_event(mark.event)

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """Let the caching allocator ask the default stream before it gives the memory out again."""
        default = torch.cuda.default_stream(self.device)
        for tensor in tensors:
            tensor.record_stream(default)

    def beside(self) -> "CudaLane":
        """Another stream."""
        return CudaLane(self.device)

    def times_ms(self, work: Work, repeats: int) -> list[float]:
        """Times between events around each run."""
        pairs = []
        with self.apart():
            for _ in range(repeats):
                begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                begin.record(self._stream)
                work()
                end.record(self._stream)
                pairs.append((begin, end))
        self._stream.synchronize()
        return sorted(float(begin.elapsed_time(end)) for begin, end in pairs)

    def free_bytes(self) -> int:
        """What the driver has left, and what torch holds but does not use."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def total_bytes(self) -> int:
        """All that the device has."""
        return int(torch.cuda.mem_get_info(self.device)[1])

    def peak_bytes(self, work: Work) -> int:
        """What torch had to ask the driver for beside what it had: blocks of other streams are not lent to this one."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        with self.running():
            work()
        self._stream.synchronize()
        peak = torch.cuda.max_memory_reserved(self.device)
        torch.cuda.empty_cache()
        return max(0, peak - before)

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Hold one block, and give it back to the driver: the pools of graphs find nothing in torch's cache."""
        held = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        try:
            yield
        finally:
            del held
            torch.cuda.empty_cache()


class _CudaMark:
    """An event."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def done(self) -> bool:
        """True once the stream has passed it."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Block until then."""
        self.event.synchronize()


class HostLane:
    """Work is done when it is queued; a capture calls `work` again at every replay."""

    device = torch.device("cpu")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Nothing to enter."""
        yield

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Nothing to enter."""
        yield

    def capture(self, work: Work) -> Work:
        """Keep the work itself."""
        return work

    def mark(self) -> Mark:
        """Everything queued is done."""
        return _HostMark()

    def after(self, mark: Mark) -> None:
        """Nothing to wait for."""

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """Nothing to do: work is done when it is queued."""

    def beside(self) -> "HostLane":
        """Another one like it."""
        return HostLane()

    def times_ms(self, work: Work, repeats: int) -> list[float]:
        """Times on the wall clock."""
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            work()
            times.append((time.perf_counter() - begin) * 1000)
        return sorted(times)

    def free_bytes(self) -> int | None:
        """Not known: the host's memory belongs to all processes."""
        return None

    def total_bytes(self) -> int | None:
        """Not known, as what is free."""
        return None

    def peak_bytes(self, work: Work) -> int:
        """Not known."""
        work()
        return 0

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Nothing to hold: others may take the host's memory at any time."""
        yield


def lane_of(device: torch.device, *, urgent: bool = False) -> GraphLane:
    """A new lane of a device: a stream of a GPU, or the host at once. `urgent` is for little work that others wait for:
    what is large would stand in the way of the steps.
    """
    return CudaLane(device, urgent=urgent) if device.type == "cuda" else HostLane()


def make_beside(lane: GraphLane, make: Callable[[], Made], tensors: Callable[[Made], tuple[Tensor, ...]]) -> Made:
    """Run `make` on a lane of its own and return what it made, finished, so that any stream may read it.

    The caller's thread sleeps until then; steps that are queued elsewhere go on meanwhile. `tensors` names those of the
    result that the default stream will read, later and for as long as they are held.
    """
    with lane.apart():
        made = make()
        lane.lend(tensors(made))
        done = lane.mark()
    done.wait()
    return made


class _HostMark:
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None
