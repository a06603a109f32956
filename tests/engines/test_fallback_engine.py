"""Torch takes over from TensorRT while requests run: memory first, every row, a planner, or an honest end."""

import asyncio
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import cast

import grpc
import pytest
import torch
from fake_clock import FakeClock
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs
from tiny_unet import TinyParts
from torch import Tensor

from hueshift.engines.cost_model import CostTable
from hueshift.engines.cost_store import Calibration, write_costs
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import HostLane
from hueshift.engines.cuda_options import CudaOptions
from hueshift.engines.cuda_setup import build_cuda, describe, planner_of
from hueshift.engines.device_errors import Fault, NoEngineError, classify
from hueshift.engines.fallback_engine import FallbackEngine
from hueshift.engines.interface import EngineRow, Plan, RunsAhead, UNetEngine
from hueshift.engines.tensorrt_engine import TensorRtEngine
from hueshift.engines.tensorrt_loader import Fallback, TensorRtError
from hueshift.server.metrics import Metrics
from hueshift.server.rpc.model_service import ModelService, describe_capacity
from hueshift.server.settings import Settings
from hueshift.server.step_runner import StepRunner
from hueshift.v1 import model_pb2

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = CudaOptions(warm_sizes=((8, 8),), max_area=64, weight_slots=1)


class Failing:
    """A TensorRT engine that refuses every call, with rows of its own."""

    name = "tensorrt"
    plans = (Plan.DENSE, Plan.FACTORED)
    slots, max_batch = 3, 2
    buckets, capacity, working = (1, 2), {(8, 8): 2}, True

    def __init__(self, parts: TinyParts) -> None:
        self.rows, self.factors, self.norms = parts.rows, parts.factors, parts.norms
        self.row_of = {1: parts.row((parts.random_adapter(1), 1.0)), 2: EngineRow()}
        # As TensorRT's own objects do.
        self.itself = self

    def row(self, slot: int) -> EngineRow:
        """What a slot holds."""
        return self.row_of[slot]

    def denoise(self, *_: object) -> Tensor:
        """Refuse."""
        memory = self.row_of
        raise TensorRtError(Fallback.RUN, f"enqueue failed with {len(memory)} rows")


def second_of(parts: TinyParts, cache: Path) -> CudaEngine:
    """The engine that takes over, on the host."""
    given = (parts.base, parts.factors, parts.rows, parts.norms)
    return build_cuda(
        *given,
        slots=3,
        max_batch=2,
        options=OPTIONS,
        lane=HostLane(),
        cache_dir=cache,
        progress=lambda stage, done, total: pytest.fail(f"{stage}: requests are waiting"),
        live=True,
    )


def engine_of(parts: TinyParts, make: Callable[[], UNetEngine]) -> tuple[FallbackEngine, "weakref.ref[Failing]"]:
    """An engine that will fail at its first call, and whether it is still in memory."""
    first = Failing(parts)
    return FallbackEngine(cast(TensorRtEngine, first), make, lambda reason: None), weakref.ref(first)


def test_the_second_engine_is_made_when_the_first_ones_memory_is_free(tiny: TinyParts, tmp_path: Path) -> None:
    held: list[bool] = []

    def make() -> UNetEngine:
        held.append(gone() is not None)
        return second_of(tiny, tmp_path)

    engine, gone = engine_of(tiny, make)
    # As a server does once it is warm.
    gc.collect()
    gc.freeze()
    inputs, index = tiny.inputs(1), torch.tensor([1])
    with capture_logs() as logs:
        out = engine.denoise(Plan.FACTORED, *inputs, index)
    row = tiny.row((tiny.random_adapter(1), 1.0))
    assert torch.allclose(out, tiny.merged_output(row, *inputs), atol=1e-3)
    assert held == [False]
    assert [log["event"] for log in logs] == ["engine_fallback", "engine_taken_over"]
    assert (engine.name, engine.slots, engine.max_batch) == ("torch", 3, 2)
    # Nothing was captured, merged or measured while the request waited.
    serving = engine.serving
    assert isinstance(serving, CudaEngine)
    assert (len(serving.graphs), serving.weight_slots, planner_of(engine)) == (0, 0, None)


def test_requests_are_checked_while_one_engine_takes_over_from_the_other(tiny: TinyParts, tmp_path: Path) -> None:
    seen: list[tuple[object, ...]] = []

    def make() -> UNetEngine:
        # As another thread sees it meanwhile.
        seen.append((engine.name, engine.plans, engine.buckets, engine.capacity, engine.working))
        return second_of(tiny, tmp_path)

    engine, _ = engine_of(tiny, make)
    engine.denoise(Plan.DENSE, *tiny.inputs(1), torch.tensor([0]))
    assert seen == [("tensorrt", (Plan.DENSE, Plan.FACTORED), (), {}, False)]


def test_it_tells_what_the_engine_has_that_serves(tiny: TinyParts, tmp_path: Path) -> None:
    engine, _ = engine_of(tiny, lambda: second_of(tiny, tmp_path))
    assert isinstance(engine, RunsAhead)
    working = [engine.working]
    found = describe_capacity(engine, 8)
    assert (found.max_rows, found.adapter_slots, list(found.buckets)) == (2, 2, [1, 2])
    assert [(size.width, size.height, size.rows) for size in found.sizes] == [(64, 64, 2)]
    engine.denoise(Plan.DENSE, *tiny.inputs(1), torch.tensor([0]))
    assert [*working, engine.working] == [True, False]
    assert describe_capacity(engine, 8) == model_pb2.EngineCapacity(max_rows=2, adapter_slots=2, buckets=[1, 2])


def test_limits_and_capacity_are_those_of_the_engine_that_serves(tiny: TinyParts, tmp_path: Path) -> None:
    def make() -> UNetEngine:
        made = second_of(tiny, tmp_path)
        made.capacity = {(8, 8): 1}
        return made

    engine, _ = engine_of(tiny, make)
    service = ModelService(tiny.base, engine, Settings.model_validate({"model": {"path": "tiny"}}))
    runner = StepRunner(engine, Metrics(CollectorRegistry()), FakeClock())
    # What the first engine had no room for says nothing about the second.
    runner.limits.too_many((16, 16), 2)
    told = [answer(service)]
    limits = [(runner.limits[8, 8], runner.limits[16, 16])]
    engine.denoise(Plan.DENSE, *tiny.inputs(1), torch.tensor([0]))
    assert not runner.divides
    told.append(answer(service))
    limits.append((runner.limits[8, 8], runner.limits[16, 16]))
    assert limits == [(2, 1), (1, 2)]
    assert [(model.engine, model.lag) for model in told] == [("tensorrt", False), ("torch", True)]
    assert [[size.rows for size in model.capacity.sizes] for model in told] == [[2], [1]]


def answer(service: ModelService) -> model_pb2.Model:
    """What GetModel returns."""
    context = cast("grpc.aio.ServicerContext[object, object]", None)
    return asyncio.run(service.GetModel(model_pb2.GetModelRequest(), context)).model


# Merged weights may have had no room where it was measured.
@pytest.mark.parametrize("weight_slots", ["1", "0"])
def test_what_was_measured_at_a_former_start_divides_batches_again(
    tiny: TinyParts, tmp_path: Path, weight_slots: str
) -> None:
    warm = second_of(tiny, tmp_path)
    table = CostTable({(Plan.DENSE, 2, (8, 8)): 1.5, (Plan.FACTORED, 2, (8, 8)): 2.0})
    known = Calibration(table, {Plan.DENSE: True, Plan.FACTORED: False}, {(8, 8): 1})
    write_costs(tmp_path, describe(warm) | {"weight_slots": weight_slots}, known)
    engine, _ = engine_of(tiny, lambda: second_of(tiny, tmp_path))
    assert planner_of(engine) is None
    runner = StepRunner(
        engine, Metrics(CollectorRegistry()), FakeClock(), planner_of(engine), lambda: planner_of(engine)
    )
    assert [runner.divides] == [False]
    engine.denoise(Plan.DENSE, *tiny.inputs(1), torch.tensor([0]))
    assert [runner.divides] == [True]
    # And what fits is told, and held to.
    assert describe_capacity(engine, 8).sizes[0].rows == 1
    assert runner.limits[8, 8] == 1
    serving = engine.serving
    assert isinstance(serving, CudaEngine)
    assert serving.networks.of(Plan.DENSE).unet.kernel_layers > 0


def test_a_server_without_any_engine_ends(tiny: TinyParts) -> None:
    def make() -> UNetEngine:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    engine, _ = engine_of(tiny, make)
    inputs, index = tiny.inputs(1), torch.tensor([0])
    with pytest.raises(NoEngineError, match="could not take over") as caught:
        engine.denoise(Plan.DENSE, *inputs, index)
    # Not a batch that was too large: a smaller one would fare no better.
    assert classify(caught.value) is Fault.LOST
    with pytest.raises(NoEngineError, match="start the server again"):
        engine.denoise(Plan.DENSE, *inputs, index)
    assert engine.name == "tensorrt"
