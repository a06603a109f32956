"""What the CUDA engine queues, on a GPU that is not there: one device, its own dtype, nothing that stops a capture."""

import gc
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch
from fake_gpu import GPU, LAUNCHERS, CaptureError, FakeGpu, FakeLane, fake_gpu
from tiny_unet import SD1_LIKE, SD2_LIKE, SDXL_LIKE, TOKENS, TinyParts, tiny_parts
from torch import Tensor

from hueshift.adapters.adapter import AdapterKind
from hueshift.engines import merged_weights
from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.cuda_buffers import CallShape
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_options import CompileKind, CudaOptions, KernelUse
from hueshift.engines.denoise import Region, Sample, advance, start_sample
from hueshift.engines.interface import SLAB_PLANS, EngineRow, Guides, Plan
from hueshift.engines.samplers import SamplerKind, make_table
from hueshift.kernels.launch import Launch
from hueshift.kernels.spectral_plan import SpectralLayer, SpectralPlan, plan_spectral

pytestmark = pytest.mark.usefixtures("one_thread")

# Widths that the kernels' tiles and 16-byte rows take.
WIDE = {"block_out_channels": [64, 128], "norm_num_groups": 8}
KINDS: dict[str, dict[str, object]] = {"sd1": {**SD1_LIKE, **WIDE}, "sd2": {**SD2_LIKE, **WIDE}, "sdxl": SDXL_LIKE}


@pytest.fixture(scope="module")
def parts(request: pytest.FixtureRequest) -> TinyParts:
    """A base of the kind that the test names."""
    return tiny_parts(KINDS[request.param])


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    """A GPU without memory."""
    with fake_gpu() as made:
        yield made


def make_engine(parts: TinyParts, gpu: FakeGpu, **options: object) -> CudaEngine:
    """An engine of five slots and one weight slot."""
    given: dict[str, object] = {"warm_sizes": ((8, 8),), "max_area": 256, "weight_slots": 1, **options}
    return CudaEngine(
        parts.base,
        parts.factors,
        parts.rows,
        parts.norms,
        slots=5,
        max_batch=4,
        lane=FakeLane(gpu),
        options=CudaOptions(**given),  # type: ignore[arg-type]  # a test's options by name
    )


ALL_ROLES = ("dense", "factored", "merged base", "merged 0")
CASES = [
    ("sd1", KernelUse.OFF, ALL_ROLES),
    ("sd1", KernelUse.ON, ALL_ROLES),
    ("sd2", KernelUse.ON, ("dense", "factored")),
    ("sdxl", KernelUse.ON, ("factored",)),
]


@pytest.mark.parametrize(("parts", "kernels", "roles"), CASES, indirect=["parts"])
def test_every_network_can_be_captured(
    parts: TinyParts, gpu: FakeGpu, kernels: KernelUse, roles: tuple[str, ...]
) -> None:
    engine = make_engine(parts, gpu, kernels=kernels, weight_slots=1 if roles == ALL_ROLES else 0)
    views = engine.buffers.at(CallShape(3, 8, 8))
    for role in roles:
        engine.networks.named(role)
    gpu.waits.clear()
    gpu.products.clear()
    for role in roles:
        network = engine.networks.named(role)
        with torch.no_grad(), gpu.capture():
            out = network.compute(views.sample, views.timestep, views.cross, views.slots, views.branches, views.added)
            views.out.copy_(out)
        assert (out.device, out.dtype, out.shape) == (GPU, torch.float16, views.out.shape)
        assert all(parameter.device == GPU for parameter in network.unet.parameters())
    assert gpu.waits == []
    # A product in fp32 would take twice the time or more, and nobody would see it in the picture.
    assert set(gpu.products) == {torch.float16}
    expected = set(LAUNCHERS) - {"slot_linear"} if kernels is KernelUse.ON else set()
    assert set(gpu.launched) == expected - (set() if "dense" in roles else {"lowrank_linear"})


@pytest.mark.parametrize("parts", ["sd1", "sd2"], indirect=True)
def test_slots_with_weights_of_their_own_can_be_captured_and_are_written_beside_the_steps(
    parts: TinyParts, gpu: FakeGpu
) -> None:
    engine = make_engine(parts, gpu, kernels=KernelUse.ON, weight_slots=0, slot_weight_bytes=1 << 24)
    assert {part.device for part in engine.networks.slot_weights.weights.values()} == {GPU}
    views = engine.buffers.at(CallShape(3, 8, 8))
    gpu.waits.clear()
    gpu.launched.clear()
    for plan in (Plan.DENSE, Plan.FACTORED):
        with torch.no_grad(), gpu.capture():
            engine.networks.of(plan).call(views)
    assert gpu.launched["slot_linear"] > 0
    row = parts.row((parts.random_adapter(1), 1.0))
    assert row.spectral is not None
    for slot in (1, 2, 1):
        engine.load_row(slot, EngineRow(row.spectral.pin_memory()))
    assert gpu.waits == []


@pytest.mark.parametrize("parts", ["sd1"], indirect=True)
def test_merged_weights_keep_their_packed_factors_alone(
    parts: TinyParts, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[weakref.ref[Tensor]] = []

    def plan(layers: Sequence[SpectralLayer]) -> SpectralPlan:
        given.extend(weakref.ref(factor) for layer in layers for factor in (layer.u, layer.vh))
        return plan_spectral(layers)

    monkeypatch.setattr(merged_weights, "plan_spectral", plan)
    engine = make_engine(parts, gpu, weight_slots=2)
    gc.collect()
    assert engine.weight_slots == 2
    assert given
    assert [ref for ref in given if ref() is not None] == []


@pytest.mark.parametrize("parts", ["sd1", "sdxl"], indirect=True)
def test_networks_after_the_first_take_no_memory(parts: TinyParts, gpu: FakeGpu) -> None:
    networks = make_engine(parts, gpu, kernels=KernelUse.OFF, weight_slots=0).networks
    factors = sum(tensor.numel() for tensor in (*parts.factors.u.values(), *parts.factors.vh.values()))
    assert gpu.allocated > 2 * factors
    gpu.allocated = 0
    assert networks.base.unet.plan is Plan.DENSE
    for kernels in (False, True, False):
        for plan in SLAB_PLANS:
            networks.choose(plan, kernels=kernels)
        pointers = {
            name: parameter.data_ptr() for name, parameter in networks.of(Plan.FACTORED).unet.named_parameters()
        }
        assert {name: part.data_ptr() for name, part in networks.full.unet.named_parameters()} == pointers
        assert all(part.device == GPU for part in networks.of(Plan.DENSE).unet.parameters())
    networks.settle()
    assert gpu.allocated == 0


@pytest.mark.parametrize("parts", ["sd1"], indirect=True)
def test_steps_of_every_plan_never_make_the_host_wait(parts: TinyParts, gpu: FakeGpu) -> None:
    engine = make_engine(parts, gpu, compile=CompileKind.NONE, kernels=KernelUse.OFF)
    engine.load_row(1, parts.row((parts.random_adapter(1), 1.0)))
    engine.load_row(2, parts.row((parts.random_adapter(2, AdapterKind.LOWRANK), 1.0)))
    engine.load_row(3, EngineRow())
    inputs = [part.to(GPU) for part in parts.inputs(3)]
    gpu.waits.clear()
    engine.merge(1)
    for plan in (Plan.DENSE, Plan.FACTORED, Plan.MERGED):
        index = torch.full((3,), 1) if plan is Plan.MERGED else torch.tensor([0, 2, 3])
        out = engine.denoise(plan, inputs[0], inputs[1], inputs[2], index)
        assert (out.device, out.dtype, out.shape) == (GPU, torch.float32, inputs[0].shape)
    assert gpu.waits == []


@pytest.mark.parametrize("parts", ["sd1"], indirect=True)
def test_whole_steps_of_mixed_samples_never_make_the_host_wait(parts: TinyParts, gpu: FakeGpu) -> None:
    engine = make_engine(parts, gpu, compile=CompileKind.NONE, kernels=KernelUse.OFF, weight_slots=0)
    width = engine.networks.cross_width

    def sample(sampler: SamplerKind, guidance: float) -> Sample:
        cross = CrossInputs((torch.zeros(2 if guidance > 1 else 1, TOKENS, width, device=GPU, dtype=engine.dtype),))
        return start_sample(1, (4, 8, 8), cross=cross, guidance=guidance, table=make_table(schedule, sampler, 4))

    schedule = parts.base.schedule
    samples = [sample(SamplerKind.DPMPP_2M, 4.0), sample(SamplerKind.LCM, 1.0)]
    confined = [sample(SamplerKind.DDIM, 1.0), sample(SamplerKind.DDIM, 4.0)]
    confined[0].lag = torch.zeros(TOKENS, device=GPU)
    region = Region(torch.zeros(8, 8, device=GPU), confined[0].cross)
    divided = [sample(SamplerKind.LCM, 1.0)]
    divided[0].regions = (region,)
    assert engine.networks.full.unet.plan is Plan.FULL
    gpu.waits.clear()
    for batch in (samples, confined, divided):
        advance(engine, batch)
        for one in batch:
            assert {(part.device, part.dtype) for part in (one.latents, one.prev)} == {(GPU, torch.float32)}
    assert gpu.waits == []


@pytest.mark.parametrize(
    ("parts", "kernels"),
    [("sd1", KernelUse.OFF), ("sd1", KernelUse.ON), ("sd2", KernelUse.OFF), ("sdxl", KernelUse.ON)],
    indirect=["parts"],
)
def test_guided_calls_can_be_captured(parts: TinyParts, gpu: FakeGpu, kernels: KernelUse) -> None:
    engine = make_engine(parts, gpu, weight_slots=0, kernels=kernels)
    engine.load_row(1, parts.row((parts.random_adapter(1, AdapterKind.LOWRANK), 1.0)))
    latents, timesteps, cross = (part.to(GPU) for part in parts.inputs(3))
    added = parts.added(3)
    added = None if added is None else added.to(GPU)
    index, lag = torch.tensor([0, 1, 1]), torch.ones(3, TOKENS, device=GPU)
    guides = Guides(lag, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2]))
    assert engine.networks.full.unet.plan is Plan.FULL
    gpu.waits.clear()
    gpu.products.clear()
    for _ in range(3):
        # Two eager calls, of which the second is captured, strictly, and one replay.
        out, mask = engine.denoise_guided(latents, timesteps, cross, index, guides, added)
    assert (out.device, out.dtype, out.shape) == (GPU, torch.float32, latents.shape)
    assert (mask.device, mask.dtype, tuple(mask.shape)) == (GPU, torch.float32, (3, 8, 8))
    assert engine.graphs.captures == 1
    assert gpu.waits == []
    # Without kernels the masks' probabilities are torch's, in fp32.
    masks = {torch.float32} if kernels is KernelUse.OFF else set()
    assert set(gpu.products) == {torch.float16} | masks
    if kernels is KernelUse.ON:
        assert set(gpu.launched) == set(LAUNCHERS) - {"lowrank_linear", "slot_linear"}
        # to_q of a first block comes before its transformer's mask, proj_out after it.
        assert 0 < gpu.masked["lowrank_residual"] < gpu.launched["lowrank_residual"]
    else:
        assert not gpu.launched


@pytest.mark.parametrize("parts", ["sdxl"], indirect=True)
def test_guided_calls_stay_on_the_device(parts: TinyParts, gpu: FakeGpu) -> None:
    engine = make_engine(parts, gpu, weight_slots=0)
    latents, timesteps, cross = (part.to(GPU) for part in parts.inputs(4))
    added = parts.added(4)
    added = None if added is None else added.to(GPU)
    lag = torch.zeros(4, cross.shape[1])
    lag[:, 1] = 1
    guides = Guides(lag, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 2, 2]))
    assert engine.networks.full.unet.plan is Plan.FULL
    gpu.waits.clear()
    out, mask = engine.denoise_guided(latents, timesteps, cross, torch.tensor([0, 1, 0, 1]), guides, added)
    assert (out.device, out.dtype, out.shape) == (GPU, torch.float32, latents.shape)
    assert (mask.device, mask.dtype, tuple(mask.shape)) == (GPU, torch.float32, (4, 8, 8))
    assert gpu.waits == []


@pytest.mark.parametrize("parts", ["sd1"], indirect=True)
def test_no_plan_needs_a_kernel_where_kernels_are_off(
    parts: TinyParts, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(launch: Launch) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(Launch, "run", refuse)
    engine = make_engine(parts, gpu, kernels=KernelUse.OFF, weight_slots=0)
    latents, timesteps, cross = (part.to(GPU) for part in parts.inputs(2))
    lag = torch.zeros(2, cross.shape[1])
    lag[:, 1] = 1
    guides = Guides(lag, torch.tensor([0, 1]), torch.tensor([0, 0]))
    gpu.waits.clear()
    # The first call is eager, the second is captured, the third a replay.
    for _ in range(3):
        out, mask = engine.denoise_guided(latents, timesteps, cross, torch.tensor([0, 1]), guides)
        engine.denoise(Plan.FACTORED, latents, timesteps, cross, torch.tensor([0, 1]))
    assert (out.shape, tuple(mask.shape)) == (latents.shape, (2, 8, 8))
    assert gpu.waits == []
    assert engine.graphs.captures == 2


def test_the_fake_gpu_refuses_what_a_capture_would(gpu: FakeGpu) -> None:
    x = torch.zeros(3, 4, device=GPU)
    with gpu.capture():
        with pytest.raises(CaptureError, match="_local_scalar_dense"):
            x.sum().item()
        with pytest.raises(CaptureError, match="waits"):
            x.cpu()
        with pytest.raises(CaptureError, match="of the host"):
            x.copy_(torch.zeros(3, 4))
        with pytest.raises(CaptureError, match="of the host"):
            torch.tensor([1.0, 2.0], device=GPU)
        with pytest.raises(CaptureError, match="index"):
            x[x > 0]
    with pytest.raises(RuntimeError, match="device"):
        x + torch.zeros(3, 4)
