"""Plan.FULL on the CUDA engine: captured like the others, whatever its guides ask for, and equal to the eager form."""

from pathlib import Path

import pytest
import torch
from host_cuda import built_engine, cuda_engine
from recording_lane import RecordingLane
from tiny_unet import TOKENS, TinyParts
from torch import Tensor

from hueshift.adapters.adapter import AdapterKind
from hueshift.engines.cuda_buffers import CallShape
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_graphs import GraphKey
from hueshift.engines.cuda_lane import HostLane
from hueshift.engines.cuda_options import CompileKind, KernelUse
from hueshift.engines.interface import Guides, Plan, no_guides
from hueshift.engines.torch_engine import TorchEngine

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = GraphKey("full", CallShape(6, 8, 8))


@pytest.fixture(scope="module")
def reference(tiny: TinyParts) -> TorchEngine:
    """torch's own engine."""
    given = (tiny.base, tiny.factors, tiny.rows, tiny.norms)
    engine = TorchEngine(*given, slots=5, max_batch=8, device=torch.device("cpu"))
    load_adapters(tiny, engine)
    return engine


def load_adapters(parts: TinyParts, engine: CudaEngine | TorchEngine) -> None:
    """Spectral, low-rank, and another low-rank one, in slots 1 to 3."""
    for slot, kind in enumerate((AdapterKind.SPECTRAL, AdapterKind.LOWRANK, AdapterKind.LOWRANK), 1):
        engine.load_row(slot, parts.row((parts.random_adapter(slot, kind), 1.0)))


def some_guides(rows: int, seed: int) -> Guides:
    """Half of the rows confined to one token or two, some by another row, and some that share attention."""
    generator = torch.Generator().manual_seed(seed)
    confined = torch.rand(rows, 1, generator=generator) < 0.5
    lag = (torch.rand(rows, TOKENS, generator=generator) < 0.3).float() * confined
    source, reference = (torch.randint(rows, (rows,), generator=generator) for _ in range(2))
    own = torch.arange(rows)
    return Guides(lag, torch.where(confined[:, 0], own, source), torch.where(own % 2 == 0, own, reference))


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Equal but for the order of sums, and masks exactly."""
    assert torch.allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kernels", [KernelUse.OFF, KernelUse.ON])
def test_captured_calls_equal_the_eager_form_with_whatever_guides(
    tiny: TinyParts, reference: TorchEngine, kernels: KernelUse
) -> None:
    engine = cuda_engine(tiny, RecordingLane(), max_batch=8, weight_slots=0, kernels=kernels)
    unet = engine.networks.full.unet
    assert (unet.kernel_layers > 0, unet.fused_blocks > 0) == ((kernels is KernelUse.ON,) * 2)
    load_adapters(tiny, engine)
    # Eight rows leave guides behind that name rows which the smaller calls after them have not.
    for seed, rows in enumerate((8, 5, 5, 5, 8, 8, 5, 6, 5)):
        inputs = tiny.inputs(rows, seed)
        index = torch.tensor([0, 1, 2, 3, 2, 1, 0, 3][:rows])
        guides = no_guides(inputs[2]) if seed == 3 else some_guides(rows, seed)
        assert_same(engine.denoise_guided(*inputs, index, guides), reference.denoise_guided(*inputs, index, guides))
    assert KEY in engine.graphs
    assert engine.graphs.captures == 2


def test_swaps_and_guides_cost_no_capture_once_it_is_warm(tiny: TinyParts, reference: TorchEngine) -> None:
    lane = RecordingLane()
    engine = cuda_engine(tiny, lane, max_batch=8, weight_slots=0)
    engine.warm()
    captures, addresses = engine.graphs.captures, engine.buffers.addresses
    assert captures == len(engine.buckets) * 3
    load_adapters(tiny, engine)
    lane.log.clear()
    for seed in range(4):
        inputs, index, guides = tiny.inputs(5, seed), torch.tensor([3, seed, 2, 0, 1]), some_guides(5, seed)
        assert_same(engine.denoise_guided(*inputs, index, guides), reference.denoise_guided(*inputs, index, guides))
    assert sum(entry.startswith("replay") for entry in lane.log) == 4
    assert engine.graphs.captures == captures
    assert engine.buffers.addresses == addresses


def test_what_a_large_call_left_is_not_read_by_the_warming_of_a_small_one(tiny: TinyParts) -> None:
    engine = cuda_engine(tiny, HostLane(), max_batch=8, weight_slots=0)
    inputs = tiny.inputs(8)
    last = torch.full((8,), 7)
    engine.denoise_guided(*inputs, torch.zeros(8, dtype=torch.int64), Guides(torch.ones(8, TOKENS), last, last))
    # On a GPU an index without a row would end the process.
    engine.warm_one("full", CallShape(2, 8, 8))()


def test_without_graphs_the_full_plan_runs_eagerly(tiny: TinyParts, reference: TorchEngine) -> None:
    lane = RecordingLane()
    engine = cuda_engine(tiny, lane, max_batch=8, weight_slots=0, compile=CompileKind.NONE)
    load_adapters(tiny, engine)
    inputs, index, guides = tiny.inputs(5), torch.tensor([3, 1, 2, 0, 1]), some_guides(5, 1)
    for _ in range(3):
        assert_same(engine.denoise_guided(*inputs, index, guides), reference.denoise_guided(*inputs, index, guides))
    assert lane.captures == 0


def test_every_bucket_of_the_full_plan_has_its_cost(tiny: TinyParts, tmp_path: Path) -> None:
    engine = built_engine(tiny, HostLane(), tmp_path, max_batch=3, weight_slots=0, kernels=KernelUse.OFF)
    assert engine.costs is not None
    found = {rows for plan, rows, _ in engine.costs.step_ms if plan is Plan.FULL}
    assert found == set(engine.buckets)
