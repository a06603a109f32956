"""Whole weights of every slot: which layers have them, what is in them, and that pictures stay what they were."""

import gc
import weakref

import pytest
import torch
from tiny_unet import TinyParts

from hueshift.adapters.adapter import AdapterKind
from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import HostLane
from hueshift.engines.cuda_layers import SlotLinear
from hueshift.engines.cuda_options import CudaOptions, KernelUse
from hueshift.engines.interface import BASE_SLOT, EngineRow, Plan
from hueshift.engines.slot_weights import choose_layers
from hueshift.engines.torch_engine import TorchEngine

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = (
    MatrixLayer("conv_in", (8, 4, 3, 3)),
    MatrixLayer("time_embedding.linear_1", (32, 8)),
    MatrixLayer("down_blocks.0.attentions.0.proj_in", (8, 8, 1, 1)),
    MatrixLayer("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", (8, 8)),
    MatrixLayer("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", (8, 24)),
    MatrixLayer("down_blocks.0.resnets.0.conv1", (8, 8, 3, 3)),
    MatrixLayer("down_blocks.0.resnets.0.time_emb_proj", (8, 32)),
    MatrixLayer("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", (32, 32)),
    MatrixLayer("mid_block.attentions.0.proj_in", (32, 32)),
    MatrixLayer("up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", (32, 32)),
    MatrixLayer("up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v", (8, 8)),
    MatrixLayer("up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", (7, 7)),
)


def chosen(side: int, most: int = 1 << 30) -> list[str]:
    """Names of the chosen layers, of a UNet of two sizes with ten slots in fp16."""
    layout = BaseLayout("0" * 64, LAYERS, (), 24, (), (), ())
    return [layer.name for layer in choose_layers(layout, 2, side, 10, 2, most)]


def test_products_on_pictures_with_more_positions_than_singular_values_are_chosen() -> None:
    large = [
        "down_blocks.0.attentions.0.proj_in",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v",
    ]
    # 8 x 8 and 4 x 4 positions: the second have 16, fewer than 32.
    assert chosen(8) == large
    small = [LAYERS[7].name, LAYERS[8].name, LAYERS[9].name]
    assert chosen(12) == [*large, *small]
    # Level by level as far as memory goes: 3 x 64 and 3 x 1024 numbers a slot.
    assert chosen(12, most=20 * (3 * 64 + 3 * 1024) - 1) == large
    assert chosen(12, most=20 * 3 * 64 - 1) == []


def make_engine(parts: TinyParts, most: int | None = 1 << 24, kernels: KernelUse = KernelUse.ON) -> CudaEngine:
    """An engine on the host whose factored and dense plans have slots' weights."""
    options = CudaOptions(warm_sizes=((8, 8),), max_area=64, weight_slots=1, kernels=kernels, slot_weight_bytes=most)
    return CudaEngine(
        parts.base, parts.factors, parts.rows, parts.norms, slots=5, max_batch=4, lane=HostLane(), options=options
    )


def load(parts: TinyParts, *engines: CudaEngine | TorchEngine) -> None:
    """Spectral adapters in slots 1 and 2, a low-rank one in 3, both at once in 4."""
    spectral, lowrank = parts.random_adapter(1), parts.random_adapter(3, AdapterKind.LOWRANK)
    for engine in engines:
        engine.load_row(1, parts.row((spectral, 1.0)))
        engine.load_row(2, parts.row((parts.random_adapter(2), 1.0)))
        engine.load_row(3, parts.row((lowrank, 1.0)))
        engine.load_row(4, parts.row((spectral, 0.5), (lowrank, 1.0)))


@pytest.fixture(scope="module")
def reference(tiny: TinyParts) -> TorchEngine:
    """torch's own engine with the same adapters."""
    given = (tiny.base, tiny.factors, tiny.rows, tiny.norms)
    engine = TorchEngine(*given, slots=5, max_batch=4, device=torch.device("cpu"))
    load(tiny, engine)
    return engine


@pytest.mark.parametrize(
    ("plan", "slots"), [(Plan.FACTORED, [1, 2, 3]), (Plan.FACTORED, [4, 0, 1]), (Plan.DENSE, [0, 3, 3])]
)
def test_mixed_batches_equal_torchs(tiny: TinyParts, reference: TorchEngine, plan: Plan, slots: list[int]) -> None:
    engine = make_engine(tiny)
    load(tiny, engine)
    modules = list(engine.networks.of(plan).unet.modules())
    assert any(isinstance(module, SlotLinear) for module in modules)
    inputs, index = tiny.inputs(3), torch.tensor(slots)
    expected = reference.denoise(plan, *inputs, index)
    torch.testing.assert_close(engine.denoise(plan, *inputs, index), expected, rtol=1e-4, atol=1e-5)


def test_a_slot_holds_what_was_loaded_last_and_the_base_its_own_bits(tiny: TinyParts) -> None:
    engine = make_engine(tiny)
    weights = engine.networks.slot_weights.weights
    base = {name: part[BASE_SLOT].clone() for name, part in weights.items()}
    for name, weight in base.items():
        assert torch.equal(weight, tiny.base.unet.get_parameter(f"{name}.weight").flatten(1))
    load(tiny, engine)
    before = {name: part[2].clone() for name, part in weights.items()}
    assert any(not torch.equal(before[name], base[name]) for name in base)
    engine.load_row(1, EngineRow())
    engine.load_row(2, tiny.row((tiny.random_adapter(3, AdapterKind.LOWRANK), 1.0)))
    for name, part in weights.items():
        # Nothing remains of the adapter before, and neighbours were not touched.
        assert torch.equal(part[1], base[name])
        assert torch.equal(part[BASE_SLOT], base[name])
    engine.load_row(2, tiny.row((tiny.random_adapter(2), 1.0)))
    assert all(torch.equal(part[2], before[name]) for name, part in weights.items())


def test_other_plans_and_forms_share_parameters_with_layers_that_do_not_read_them(tiny: TinyParts) -> None:
    engine = make_engine(tiny)
    load(tiny, engine)
    inputs, index = tiny.inputs(2), torch.tensor([1, 4])
    expected = engine.denoise(Plan.FACTORED, *inputs, index)
    full = engine.denoise(Plan.FULL, *inputs, index)
    torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, SlotLinear) for module in engine.networks.full.unet.modules())
    engine.merge(1)
    merged = engine.denoise(Plan.MERGED, *inputs, torch.tensor([1, 1]))
    engine.networks.choose(Plan.FACTORED, kernels=False)
    again = engine.denoise(Plan.FACTORED, *inputs, index)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged[:1], expected[:1], rtol=1e-4, atol=1e-5)


def test_what_no_plan_reads_is_let_go(tiny: TinyParts) -> None:
    engine = make_engine(tiny)
    held = weakref.ref(next(iter(engine.networks.slot_weights.weights.values())))
    engine.networks.settle()
    assert held() is not None
    for plan in (Plan.DENSE, Plan.FACTORED):
        engine.networks.choose(plan, kernels=False)
    engine.networks.settle()
    gc.collect()
    assert held() is None
    load(tiny, engine)
    inputs, index = tiny.inputs(2), torch.tensor([1, 3])
    assert engine.denoise(Plan.FACTORED, *inputs, index).isfinite().all()


@pytest.mark.parametrize(("most", "kernels"), [(0, KernelUse.ON), (1 << 24, KernelUse.OFF)])
def test_without_memory_for_them_or_kernels_there_are_none(tiny: TinyParts, most: int, kernels: KernelUse) -> None:
    engine = make_engine(tiny, most, kernels)
    assert engine.networks.slot_weights.weights == {}
    load(tiny, engine)
    inputs, index = tiny.inputs(2), torch.tensor([1, 3])
    assert engine.denoise(Plan.FACTORED, *inputs, index).isfinite().all()
