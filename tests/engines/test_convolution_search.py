"""cuDNN tries its algorithms while a start warms up, in the thread that captures, and never inside of a capture."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from host_cuda import built_engine, cuda_options
from tiny_unet import TinyParts
from torch import Tensor

from hueshift.engines import cuda_setup
from hueshift.engines.convolution_search import convolution_search
from hueshift.engines.cuda_lane import HostLane, Work
from hueshift.engines.cuda_options import CompileKind, KernelUse
from hueshift.engines.cuda_unet import CudaUNet
from hueshift.engines.interface import Plan

pytestmark = pytest.mark.usefixtures("one_thread")


class SearchLane(HostLane):
    """Notes in which thread, and with or without a search, calls ran and captures were made."""

    def __init__(self) -> None:
        self.calls: list[bool] = []
        self.captures: list[bool] = []
        self.threads: set[int] = set()
        self.capturing = False

    def note_call(self) -> None:
        """A network runs, for itself or to be captured."""
        (self.captures if self.capturing else self.calls).append(torch.backends.cudnn.benchmark)
        self.threads.add(threading.get_ident())

    def capture(self, work: Work) -> Work:
        """Run it once, as a GPU's lane would."""
        self.capturing = True
        try:
            work()
        finally:
            self.capturing = False
        return work


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> SearchLane:
    """A lane that hears of every call of a network."""
    made, right = SearchLane(), CudaUNet.forward

    def forward(unet: CudaUNet, *given: Tensor) -> Tensor:
        made.note_call()
        return right(unet, *given)

    monkeypatch.setattr(CudaUNet, "forward", forward)
    return made


def test_a_start_searches_from_the_first_call_of_a_shape_but_in_no_capture(
    tiny: TinyParts, lane: SearchLane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[tuple[bool, set[bool]]] = []

    def release() -> None:
        released.append((torch.backends.cudnn.benchmark, set(lane.calls)))
        lane.calls.clear()

    monkeypatch.setattr(cuda_setup, "release_memory", release)
    engine = built_engine(tiny, lane, tmp_path)
    # Memory is given back once, after the search. Trials of forms come before the warm-up: a shape that they called
    # without a search would keep what it was given.
    assert released == [(False, {True})]
    assert set(lane.captures) == {False}
    assert lane.threads == {threading.get_ident()}
    inputs, index = tiny.inputs(1, side=(4, 4)), torch.zeros(1, dtype=torch.int64)
    for _ in range(3):
        engine.denoise(Plan.DENSE, *inputs, index)
    assert set(lane.calls) == {False}
    assert cuda_setup.describe(engine)["convolutions"] == "searched"


@pytest.mark.parametrize(
    ("live", "options"),
    [(True, {}), (False, {"compile": CompileKind.NONE}), (False, {"search_convolutions": False})],
)
def test_nothing_is_tried_where_requests_wait_or_nobody_asked(
    tiny: TinyParts, lane: SearchLane, tmp_path: Path, live: bool, options: dict[str, Any]
) -> None:
    engine = built_engine(tiny, lane, tmp_path, live=live, kernels=KernelUse.OFF, **options)
    engine.warm()
    assert set(lane.calls) == {False}
    if not live:
        assert cuda_setup.describe(engine)["convolutions"] == "by rule"


def test_a_start_that_fails_leaves_no_search_behind() -> None:
    def start() -> None:
        with convolution_search(cuda_options().searches):
            assert torch.backends.cudnn.benchmark
            raise ValueError("full")

    with pytest.raises(ValueError, match="full"):
        start()
    assert not torch.backends.cudnn.benchmark
