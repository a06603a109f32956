"""Whole networks as torch.compile takes them: one graph without Python in between, and the result they had.

Traced and made functional as for inductor, but run by torch: compiling for a CPU would say no more and takes minutes.
"""

import pytest
import torch
from tiny_unet import TinyParts

from hueshift.adapters.adapter import AdapterKind
from hueshift.engines.cuda_buffers import CallShape
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import HostLane
from hueshift.engines.cuda_options import CompileKind, CudaOptions, KernelUse
from hueshift.engines.interface import Plan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kernels", [KernelUse.OFF, KernelUse.ON])
@pytest.mark.parametrize("plan", [Plan.DENSE, Plan.FACTORED])
@torch.no_grad()
def test_a_network_is_one_graph_with_the_same_result(tiny: TinyParts, plan: Plan, kernels: KernelUse) -> None:
    # Inductor's networks keep diffusers' blocks, with the kernels' operators between them.
    options = CudaOptions(warm_sizes=((8, 8),), max_area=64, compile=CompileKind.INDUCTOR, kernels=kernels)
    engine = CudaEngine(
        tiny.base, tiny.factors, tiny.rows, tiny.norms, slots=4, max_batch=2, lane=HostLane(), options=options
    )
    engine.load_row(1, tiny.row((tiny.random_adapter(1, AdapterKind.LOWRANK), 1.0)))
    network = engine.networks.of(plan)
    views = engine.buffers.at(CallShape(2, 8, 8))
    latents, timesteps, cross = tiny.inputs(2)
    views.fill(latents, timesteps, cross, None, torch.tensor([0, 1]), torch.tensor([-1, 1]))
    given = (views.sample, views.timestep, views.cross, views.slots, views.branches, None)
    expected = network.compute(*given)
    compiled = torch.compile(network.compute, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*given), expected, rtol=1e-5, atol=1e-6)
    # What it reads stays where it is, so new values are seen without another trace.
    engine.load_row(1, tiny.row((tiny.random_adapter(2, AdapterKind.LOWRANK), 1.0)))
    again = compiled(*given)
    torch.testing.assert_close(again, network.compute(*given), rtol=1e-5, atol=1e-6)
    assert float((again[1] - expected[1]).abs().max()) > 1e-3
