"""Both engines behind the one interface: equal to merged weights, to themselves in any batch, and free of traces."""

from pathlib import Path

import pytest
import torch
from tiny_unet import SD1_LIKE, SD2_LIKE, TinyParts, run, tiny_parts
from torch import Tensor

from hueshift.adapters.adapter import AdapterKind
from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.engines.build import AdapterEngine, EngineKind, EngineOptions, build_engine
from hueshift.engines.cross_attention import CrossLayout
from hueshift.engines.interface import BASE_SLOT, SLAB_PLANS, EngineRow, Plan
from hueshift.engines.onnx_engine import OnnxEngine
from hueshift.engines.torch_engine import TorchEngine

# fp32 rounding through some eighty layers; outputs are of order 1. Seen on a 2-core x86 CPU (2026-11-20): 2e-6.
TOLERANCE = 2e-5
SPECTRAL, LOWRANK, BOTH = 1, 2, 3
SLOTS = 6

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def kind(request: pytest.FixtureRequest) -> EngineKind:
    """Each engine in turn."""
    value: EngineKind = request.param
    return value


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def parts(request: pytest.FixtureRequest) -> TinyParts:
    """Each kind of base in turn."""
    return tiny_parts(SD1_LIKE if request.param == "sd1" else SD2_LIKE)


@pytest.fixture(scope="module")
def engine(kind: EngineKind, parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> AdapterEngine:
    """An engine with one spectral row, one low-rank row, and one row of both."""
    options = EngineOptions(
        cache_dir=tmp_path_factory.mktemp("cache"),
        kind=kind,
        threads=1,
        slots=SLOTS,
        max_batch=8,
        lowrank_rank=4,
        lowrank_targets=("proj_out", "to_q", "to_out.0"),
    )
    engine = build_engine(parts.base, options)
    for slot, row in rows_of(parts).items():
        engine.load_row(slot, row)
    return engine


def rows_of(parts: TinyParts) -> dict[int, EngineRow]:
    spectral, lowrank = parts.random_adapter(1), parts.random_adapter(2, AdapterKind.LOWRANK)
    return {
        SPECTRAL: parts.row((spectral, 0.8)),
        LOWRANK: parts.row((lowrank, 1.0)),
        BOTH: parts.row((parts.random_adapter(3), 0.4), (lowrank, -0.5)),
    }


def test_kind_gives_the_engine(engine: AdapterEngine, kind: EngineKind) -> None:
    assert isinstance(engine, TorchEngine if kind == "torch" else OnnxEngine)
    assert engine.name == kind
    assert engine.plans == SLAB_PLANS
    assert (engine.slots, engine.max_batch) == (SLOTS, 8)
    engine.warm()


@pytest.mark.parametrize(
    ("plan", "slot"),
    [
        (Plan.DENSE, BASE_SLOT),
        (Plan.DENSE, LOWRANK),
        (Plan.FACTORED, BASE_SLOT),
        (Plan.FACTORED, SPECTRAL),
        (Plan.FACTORED, LOWRANK),
        (Plan.FACTORED, BOTH),
        (Plan.FULL, BASE_SLOT),
        (Plan.FULL, BOTH),
    ],
)
def test_row_equals_merged_weights(engine: AdapterEngine, parts: TinyParts, plan: Plan, slot: int) -> None:
    inputs = parts.inputs(2)
    row = rows_of(parts).get(slot, EngineRow())
    out = engine.denoise(plan, *inputs, torch.full((2,), slot))
    assert torch.allclose(out, parts.merged_output(row, *inputs), atol=TOLERANCE)
    if slot != BASE_SLOT:
        assert float((out - run(parts.base.unet, *inputs)).abs().max()) > 0.02, "the row must matter"


@pytest.mark.parametrize(
    ("plan", "slots"),
    [(Plan.DENSE, (0, LOWRANK, 0, LOWRANK, 4)), (Plan.FACTORED, (0, SPECTRAL, LOWRANK, BOTH, SPECTRAL, 0, 4))],
)
def test_mixed_batch_equals_each_alone(
    engine: AdapterEngine, parts: TinyParts, plan: Plan, slots: tuple[int, ...]
) -> None:
    inputs, index = parts.inputs(len(slots), seed=3), torch.tensor(slots)
    together = engine.denoise(plan, *inputs, index)
    for i in range(len(slots)):
        latents, timesteps, context = (value[i : i + 1] for value in inputs)
        alone = engine.denoise(plan, latents, timesteps, context, index[i : i + 1])
        assert torch.allclose(together[i : i + 1], alone, atol=TOLERANCE)


@pytest.mark.parametrize("plan", SLAB_PLANS)
def test_other_sizes_need_no_other_graph(engine: AdapterEngine, parts: TinyParts, plan: Plan) -> None:
    for side in ((4, 4), (12, 6), (16, 24)):
        inputs = parts.inputs(2, side=side)
        out = engine.denoise(plan, *inputs, torch.tensor([0, LOWRANK]))
        assert torch.allclose(out[:1], run(parts.base.unet, *(v[:1] for v in inputs)), atol=TOLERANCE)


def test_inputs_need_not_be_contiguous(engine: AdapterEngine, parts: TinyParts) -> None:
    latents, timesteps, context = parts.inputs(2)
    index = torch.tensor([0, LOWRANK])
    expected = engine.denoise(Plan.DENSE, latents, timesteps, context, index)
    strided = engine.denoise(
        Plan.DENSE,
        latents.contiguous(memory_format=torch.channels_last),
        timesteps.repeat_interleave(2)[::2],
        context.transpose(1, 2).contiguous().transpose(1, 2),
        index.repeat_interleave(2)[::2],
    )
    assert torch.allclose(strided, expected, atol=TOLERANCE)


def test_results_outlive_the_next_call(engine: AdapterEngine, parts: TinyParts) -> None:
    inputs = parts.inputs(1)
    first = engine.denoise(Plan.FACTORED, *inputs, torch.tensor([0]))
    kept = first.clone()
    engine.denoise(Plan.FACTORED, *parts.inputs(1, seed=9), torch.tensor([SPECTRAL]))
    assert torch.equal(first, kept)


def test_base_is_bit_identical_after_a_hundred_rows(engine: AdapterEngine, parts: TinyParts) -> None:
    inputs, index = parts.inputs(2), torch.tensor([BASE_SLOT, SPECTRAL])
    before = {plan: engine.denoise(plan, *inputs, index) for plan in SLAB_PLANS}
    generator = torch.Generator().manual_seed(7)
    for number in range(100):
        spectral = torch.randn(engine.rows.spectral_size, generator=generator) if number % 3 else None
        lowrank = torch.randn(engine.rows.lowrank_size, generator=generator) if number % 2 else None
        engine.load_row(4 + number % 2, EngineRow(spectral, lowrank))
    for plan in SLAB_PLANS:
        assert torch.equal(engine.denoise(plan, *inputs, index), before[plan])


@pytest.mark.parametrize("plan", SLAB_PLANS)
def test_slot_reuse_leaves_no_trace(engine: AdapterEngine, parts: TinyParts, plan: Plan) -> None:
    inputs, index = parts.inputs(2), torch.tensor([5, 5])
    both, lowrank = rows_of(parts)[BOTH], rows_of(parts)[LOWRANK]
    engine.load_row(5, lowrank)
    fresh = engine.denoise(plan, *inputs, index)
    base = engine.denoise(plan, *inputs, torch.zeros_like(index))
    engine.load_row(5, both)
    engine.load_row(5, lowrank)
    assert torch.equal(engine.denoise(plan, *inputs, index), fresh)
    engine.load_row(5, EngineRow())
    assert torch.equal(engine.denoise(plan, *inputs, index), base)


def test_a_loaded_row_is_a_copy(engine: AdapterEngine, parts: TinyParts) -> None:
    row = parts.row((parts.random_adapter(1), 0.8))
    assert row.spectral is not None
    engine.load_row(5, row)
    inputs, index = parts.inputs(1), torch.tensor([5])
    before = engine.denoise(Plan.FACTORED, *inputs, index)
    row.spectral.zero_()
    assert torch.equal(engine.denoise(Plan.FACTORED, *inputs, index), before)


def _row(engine: AdapterEngine, spectral: Tensor | None = None, lowrank: Tensor | None = None) -> EngineRow:
    return EngineRow(torch.zeros(engine.rows.spectral_size) if spectral is None else spectral, lowrank)


def test_wrong_rows_and_slots_are_refused(engine: AdapterEngine, parts: TinyParts) -> None:
    inputs, index = parts.inputs(2), torch.tensor([BASE_SLOT, SPECTRAL])
    before = engine.denoise(Plan.FACTORED, *inputs, index)
    size = engine.rows.spectral_size
    wrong = [
        (BASE_SLOT, _row(engine)),
        (-1, _row(engine)),
        (SLOTS, _row(engine)),
        (SPECTRAL, _row(engine, torch.zeros(size - 1))),
        (SPECTRAL, _row(engine, torch.zeros(size).double())),
        (SPECTRAL, _row(engine, torch.zeros(1, size))),
        (SPECTRAL, _row(engine, lowrank=torch.zeros(3))),
    ]
    for slot, row in wrong:
        with pytest.raises(InvalidArgument):
            engine.load_row(slot, row)
    assert torch.equal(engine.denoise(Plan.FACTORED, *inputs, index), before), "a refused row changes nothing"


@pytest.mark.parametrize(("count", "slot"), [(9, 0), (0, 0), (1, SLOTS), (1, -1)])
def test_wrong_calls_are_refused(engine: AdapterEngine, parts: TinyParts, count: int, slot: int) -> None:
    with pytest.raises(InvalidArgument):
        engine.denoise(Plan.FACTORED, *parts.inputs(count), torch.full((count,), slot))


def test_engines_agree_on_the_embedded_model(base_model: BaseModel, cache_dir: Path) -> None:
    """The graph that serves by default, at its native size, with random rows on every layer."""
    engines = [
        build_engine(base_model, EngineOptions(cache_dir=cache_dir, kind=k, threads=1, slots=4))
        for k in ("torch", "auto")
    ]
    generator = torch.Generator().manual_seed(1)
    base = engines[0].rows.base_spectral(engines[0].factors, engines[0].norms)
    row = EngineRow(
        base * (1 + 0.05 * torch.randn(base.shape, generator=generator)),
        0.02 * torch.randn(engines[0].rows.lowrank_size, generator=generator),
    )
    inputs = (
        torch.randn(3, 4, 32, 32, generator=generator),
        torch.tensor([999.0, 500.0, 1.0]),
        torch.randn(3, base_model.max_tokens, CrossLayout(base_model.layout).width, generator=generator),
    )
    for engine in engines:
        engine.load_row(2, row)
    assert [engine.name for engine in engines] == ["torch", "onnxruntime"]
    for plan in SLAB_PLANS:
        one, two = (engine.denoise(plan, *inputs, torch.tensor([0, 2, 0])) for engine in engines)
        assert torch.allclose(one, two, atol=5e-5)
        base_alone = engines[0].denoise(plan, *inputs, torch.zeros(3, dtype=torch.int64))
        assert not torch.allclose(one[1:2], base_alone[1:2], atol=1e-2)
