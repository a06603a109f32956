"""Captured calls: when they are made, how long they stay, and that what cannot be captured still runs."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from recording_lane import RecordingLane
from structlog.testing import capture_logs

from hueshift.engines.cuda_buffers import NO_BRANCH, CallBuffers, CallShape, bucket_for, buckets_up_to
from hueshift.engines.cuda_graphs import GraphKey, GraphStore
from hueshift.engines.cuda_lane import CudaLane, Work


def key(rows: int, role: str = "dense", side: int = 8) -> GraphKey:
    """A key of this many rows."""
    return GraphKey(role, CallShape(rows, side, side))


def test_a_shape_is_captured_at_its_second_call_and_then_replayed() -> None:
    lane, calls, roles = RecordingLane(), [], list[str]()
    store = GraphStore(lane, limit=4, on_capture=roles.append)
    for _ in range(4):
        store.run(key(2), lambda: calls.append(2))
    # Two eager calls, the capture runs nothing, two replays.
    assert lane.log == ["capture 0", "replay 0", "replay 0"]
    assert (len(calls), store.captures, roles) == (4, 1, ["dense"])


def test_shapes_and_roles_have_graphs_of_their_own() -> None:
    lane = RecordingLane()
    store = GraphStore(lane, limit=8)
    keys = [key(2), key(4), key(2, "factored"), key(2, side=16)]
    for _ in range(3):
        for one in keys:
            store.run(one, lambda: None)
    assert store.captures == len(keys) == len(store)
    store.forget("dense")
    assert [one in store for one in keys] == [False, False, True, False]


def test_the_least_recently_used_goes_first_and_warmed_ones_stay() -> None:
    lane = RecordingLane()
    store = GraphStore(lane, limit=2)
    store.warm(key(1), lambda: None)
    for rows in (2, 4):
        for _ in range(2):
            store.run(key(rows), lambda: None)
    store.run(key(2), lambda: None)
    waits = len(lane.marks)
    for _ in range(2):
        store.run(key(8), lambda: None)
    assert [key(rows) in store for rows in (1, 2, 4, 8)] == [True, True, False, True]
    # The memory of the one that went must not go while its last replay runs.
    assert [mark.waits for mark in lane.marks[waits:]] == [1]
    store.run(key(4), lambda: None)
    assert key(4) not in store


@pytest.mark.parametrize("ended", [False, True])
def test_a_capture_that_fails_is_over_for_the_allocator(monkeypatch: pytest.MonkeyPatch, ended: bool) -> None:
    closed: list[tuple[int, tuple[int, int]]] = []

    def close(device: int, pool: tuple[int, int]) -> None:
        closed.append((device, pool))
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    stream = SimpleNamespace()
    for name in ("graph", "device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", close, raising=False)
    lane = CudaLane(torch.device("cuda", 1))

    def refuse() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        lane.capture(refuse)
    assert closed == [(1, (0, 7))]
    lane.capture(lambda: None)()
    assert len(closed) == 1


def test_warming_runs_twice_before_it_captures_and_only_once() -> None:
    lane, calls = RecordingLane(), []
    store = GraphStore(lane, limit=2)
    replay = store.warm(key(2), lambda: calls.append(1))
    assert len(calls) == 2
    assert store.warm(key(2), lambda: calls.append(1)) is replay
    store.run(key(2), lambda: calls.append(1))
    assert (len(calls), lane.captures) == (3, 1)


def test_what_cannot_be_captured_runs_eagerly_for_good() -> None:
    lane, calls = RecordingLane(), []
    lane.refuse = True
    store = GraphStore(lane, limit=2)
    for _ in range(3):
        store.run(key(2), lambda: calls.append(1))
    lane.refuse = False
    store.run(key(2), lambda: calls.append(1))
    assert (len(calls), lane.captures) == (4, 0)


def test_a_capture_without_memory_is_tried_again_but_not_soon() -> None:
    lane = RecordingLane()
    lane.out_of_memory = True
    store = GraphStore(lane, limit=2)
    with capture_logs() as logs:
        for _ in range(100):
            store.run(key(2), lambda: None)
    # Each try stops the whole device.
    assert [log["event"] for log in logs] == ["cuda_graph_without_memory"]
    lane.out_of_memory = False
    for _ in range(512):
        store.run(key(2), lambda: None)
    assert lane.captures == 1


def test_warming_says_what_does_not_fit() -> None:
    lane = RecordingLane()
    lane.out_of_memory = True
    store = GraphStore(lane, limit=2)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        store.warm(key(2), lambda: None)
    lane.out_of_memory, lane.refuse = False, True
    calls = []
    # What cannot be captured at all fits.
    store.warm(key(2), lambda: calls.append(1))()
    assert len(calls) == 3


def test_a_network_in_the_place_of_another_is_captured_though_that_one_could_not_be() -> None:
    lane = RecordingLane()
    lane.refuse = True
    store = GraphStore(lane, limit=2)
    for _ in range(2):
        store.run(key(2), lambda: None)
    lane.refuse = False
    store.forget("dense")
    for _ in range(2):
        store.run(key(2), lambda: None)
    assert lane.captures == 1


def test_a_device_that_is_lost_in_a_capture_is_told_at_once() -> None:
    class Lost(RecordingLane):
        """A lane of a device that fails while it is captured."""

        def capture(self, work: Work) -> Work:
            raise RuntimeError("CUDA error: unspecified launch failure")

    store = GraphStore(Lost(), limit=2)
    store.run(key(2), lambda: None)
    with pytest.raises(RuntimeError, match="launch failure"):
        store.run(key(2), lambda: None)


def test_a_graph_that_the_driver_has_no_memory_for_is_tried_again_later() -> None:
    class Full(RecordingLane):
        """A lane whose driver has no memory left for one graph."""

        def capture(self, work: Work) -> Work:
            if not self.log:
                self.log.append("full")
                raise RuntimeError("CUDA error: out of memory")
            return super().capture(work)

    lane = Full()
    store = GraphStore(lane, limit=2)
    for _ in range(600):
        store.run(key(2), lambda: None)
    assert key(2) in store


def test_without_graphs_every_call_is_eager() -> None:
    lane, calls = RecordingLane(), []
    store = GraphStore(lane, limit=2, enabled=False)
    call = store.warm(key(2), lambda: calls.append(1))
    call()
    for _ in range(3):
        store.run(key(2), lambda: calls.append(1))
    assert (len(calls), lane.captures) == (6, 0)


def test_buckets_waste_at_most_a_third() -> None:
    assert buckets_up_to(16) == (1, 2, 3, 4, 6, 8, 12, 16)
    assert buckets_up_to(10) == (1, 2, 3, 4, 6, 8, 10)
    assert buckets_up_to(1) == (1,)
    for largest in range(1, 100):
        buckets = buckets_up_to(largest)
        for rows in range(1, largest + 1):
            bucket = bucket_for(rows, buckets)
            assert rows <= bucket <= max(rows, rows * 1.5)


def test_buffers_keep_their_addresses_and_fill_up_with_the_base() -> None:
    host = torch.device("cpu")
    buffers = CallBuffers(rows=4, area=64, channels=4, cross=(3, 5), added=0, device=host, dtype=torch.float32)
    before = buffers.addresses
    large, small = buffers.at(CallShape(4, 8, 8)), buffers.at(CallShape(2, 4, 8))
    assert large.sample.is_contiguous(memory_format=torch.channels_last)
    assert large.sample.data_ptr() == small.sample.data_ptr()
    assert buffers.at(CallShape(4, 8, 8)) is large
    sample = torch.randn(2, 4, 8, 8)
    ones = torch.tensor([3, 1])
    large.slots.fill_(9)
    large.fill(sample, torch.tensor([5.0, 6.0]), torch.randn(2, 3, 5), None, ones, torch.tensor([NO_BRANCH, 1]))
    assert torch.equal(large.sample[:2], sample)
    assert large.slots.tolist() == [3, 1, 0, 0]
    assert large.branches.tolist() == [NO_BRANCH, 1, NO_BRANCH, NO_BRANCH]
    assert buffers.addresses == before
