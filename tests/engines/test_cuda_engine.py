"""The CUDA engine on a lane of the host: the same pictures as torch's, and no capture for whatever comes and goes."""

from pathlib import Path

import pytest
import torch
from recording_lane import RecordingLane
from tiny_unet import TinyParts
from torch import Tensor

from hueshift.adapters.adapter import AdapterKind
from hueshift.adapters.errors import FailedPrecondition, InvalidArgument
from hueshift.engines.cost_model import CostTable
from hueshift.engines.cost_store import Calibration, costs_file, read_costs, write_costs
from hueshift.engines.cuda_attention import AttentionKind, AttentionTable, parse_attention
from hueshift.engines.cuda_buffers import CallShape
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import HostLane
from hueshift.engines.cuda_options import CompileKind, CudaOptions, KernelUse
from hueshift.engines.cuda_setup import build_cuda, planner_of
from hueshift.engines.interface import BASE_SLOT, SLAB_PLANS, EngineRow, MergingEngine, Plan
from hueshift.engines.merged_weights import WeightWriter
from hueshift.engines.torch_engine import TorchEngine

pytestmark = pytest.mark.usefixtures("one_thread")


def make_engine(parts: TinyParts, lane: HostLane, **options: object) -> CudaEngine:
    """An engine of five slots and two weight slots on `lane`."""
    given: dict[str, object] = {"warm_sizes": ((8, 8),), "max_area": 256, "weight_slots": 2, **options}
    return CudaEngine(
        parts.base,
        parts.factors,
        parts.rows,
        parts.norms,
        slots=5,
        max_batch=4,
        lane=lane,
        options=CudaOptions(**given),  # type: ignore[arg-type]  # a test's options by name
    )


def load_adapters(parts: TinyParts, *engines: CudaEngine | TorchEngine) -> None:
    """Two spectral adapters and a low-rank one, in slots 1 to 3."""
    for engine in engines:
        for slot in (1, 2):
            engine.load_row(slot, parts.row((parts.random_adapter(slot), 1.0)))
        engine.load_row(3, parts.row((parts.random_adapter(3, AdapterKind.LOWRANK), 1.0)))


@pytest.fixture(scope="module")
def reference(tiny: TinyParts) -> TorchEngine:
    """torch's own engine with the same adapters."""
    given = (tiny.base, tiny.factors, tiny.rows, tiny.norms)
    engine = TorchEngine(*given, slots=5, max_batch=4, device=torch.device("cpu"))
    load_adapters(tiny, engine)
    return engine


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of sums."""
    return bool(torch.allclose(found, expected, rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("kernels", [KernelUse.OFF, KernelUse.ON])
@pytest.mark.parametrize("plan", SLAB_PLANS)
def test_mixed_batches_equal_torchs(tiny: TinyParts, reference: TorchEngine, plan: Plan, kernels: KernelUse) -> None:
    engine = make_engine(tiny, HostLane(), kernels=kernels, weight_slots=0)
    load_adapters(tiny, engine)
    index = torch.tensor([0, 3, 3]) if plan is Plan.DENSE else torch.tensor([1, 2, 3])
    inputs = tiny.inputs(3)
    expected = reference.denoise(plan, *inputs, index)
    for _ in range(3):
        assert close(engine.denoise(plan, *inputs, index), expected)
    one = [part[:1] for part in inputs]
    assert close(engine.denoise(plan, one[0], one[1], one[2], index[:1]), expected[:1])


def test_merged_weights_equal_the_factored_plan(tiny: TinyParts, reference: TorchEngine) -> None:
    engine = make_engine(tiny, HostLane())
    assert isinstance(engine, MergingEngine)
    load_adapters(tiny, engine)
    inputs = tiny.inputs(2)
    for slot in (1, 3, BASE_SLOT, 2, 1):
        engine.merge(slot)
        index = torch.full((2,), slot)
        found = engine.denoise(Plan.MERGED, *inputs, index)
        assert close(found, reference.denoise(Plan.FACTORED, *inputs, index))
    # Two weight slots: the first of the three mixes had to make room, and came back.
    assert engine.merged == {BASE_SLOT, 1, 2}


@pytest.mark.parametrize("kernels", [KernelUse.OFF, KernelUse.ON])
def test_half_precision_stays_within_its_rounding(tiny: TinyParts, kernels: KernelUse) -> None:
    engine = make_engine(tiny, HostLane(), kernels=kernels, dtype=torch.float16)
    given = (tiny.base, tiny.factors, tiny.rows, tiny.norms)
    expected = TorchEngine(*given, slots=5, max_batch=4, device=torch.device("cpu"))
    for slot in (1, 2, 3):
        kind = AdapterKind.LOWRANK if slot == 3 else AdapterKind.SPECTRAL
        row = tiny.row((tiny.random_adapter(slot, kind), 0.3))
        engine.load_row(slot, row)
        expected.load_row(slot, row)
    inputs, mixed = tiny.inputs(3), torch.tensor([1, 2, 3])
    for plan in SLAB_PLANS:
        index = torch.tensor([0, 3, 3]) if plan is Plan.DENSE else mixed
        assert torch.allclose(
            engine.denoise(plan, *inputs, index), expected.denoise(plan, *inputs, index), rtol=0.02, atol=0.02
        )
    engine.merge(1)
    index = torch.full((3,), 1)
    found = engine.denoise(Plan.MERGED, *inputs, index)
    assert torch.allclose(found, expected.denoise(Plan.FACTORED, *inputs, index), rtol=0.02, atol=0.02)


def test_a_thousand_swaps_cost_no_capture_and_leave_the_base_bit_for_bit(tiny: TinyParts) -> None:
    lane = RecordingLane()
    engine = make_engine(tiny, lane)
    engine.warm()
    captures, addresses = engine.graphs.captures, engine.buffers.addresses
    inputs, base = tiny.inputs(2), torch.full((2,), BASE_SLOT)
    before = [engine.denoise(plan, *inputs, base) for plan in (Plan.DENSE, Plan.FACTORED, Plan.MERGED)]
    rows = [tiny.row((tiny.random_adapter(seed), 1.0)) for seed in range(3)]
    rows += [tiny.row((tiny.random_adapter(9, AdapterKind.LOWRANK), 1.0)), EngineRow()]
    generator = torch.Generator().manual_seed(5)
    for _ in range(1000):
        slot = 1 + int(torch.randint(4, (), generator=generator))
        engine.load_row(slot, rows[int(torch.randint(len(rows), (), generator=generator))])
        if int(torch.randint(20, (), generator=generator)) == 0:
            engine.merge(slot)
            engine.denoise(Plan.MERGED, *inputs, torch.full((2,), slot))
    after = [engine.denoise(plan, *inputs, base) for plan in (Plan.DENSE, Plan.FACTORED, Plan.MERGED)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert engine.graphs.captures == captures
    assert engine.buffers.addresses == addresses
    # The base's row, merged like any other, gives the base's own bits too.
    engine.load_row(1, EngineRow())
    engine.merge(1)
    assert torch.equal(engine.denoise(Plan.MERGED, *inputs, torch.full((2,), 1)), after[2])


def test_a_row_that_changes_is_not_served_from_old_weights(tiny: TinyParts) -> None:
    engine = make_engine(tiny, HostLane())
    load_adapters(tiny, engine)
    engine.merge(1)
    engine.load_row(1, tiny.row((tiny.random_adapter(7), 1.0)))
    assert 1 not in engine.merged
    inputs, index = tiny.inputs(2), torch.full((2,), 1)
    assert torch.equal(engine.denoise(Plan.MERGED, *inputs, index), engine.denoise(Plan.FACTORED, *inputs, index))


def test_a_merge_runs_beside_the_steps_and_waits_for_what_it_needs(tiny: TinyParts) -> None:
    lane = RecordingLane(passing=False)
    engine = make_engine(tiny, lane, weight_slots=1)
    load_adapters(tiny, engine)
    copies, aside = lane.besides
    loaded = copies.marks[0]
    engine.merge(1)
    # The merge waits for the copy of its row; the steps' lane waits for nothing.
    assert loaded in aside.waited
    assert lane.waited == []
    assert (set(engine.merging), set(engine.merged)) == ({1}, {BASE_SLOT})
    inputs, index = tiny.inputs(1), torch.full((1,), 1)
    # Until it is written the factored plan answers, from the row.
    engine.denoise(Plan.MERGED, *inputs, index)
    assert lane.waited == [loaded]
    written = aside.marks[-1]
    written.passed = True
    assert (set(engine.merging), set(engine.merged)) == (set(), {BASE_SLOT, 1})
    engine.denoise(Plan.MERGED, *inputs, index)
    assert lane.waited == [loaded, written]
    used = lane.marks[-1]
    engine.merge(2)
    # The weights are overwritten only after the last step that read them.
    assert used in aside.waited


def test_a_merge_that_fails_takes_no_place_away(tiny: TinyParts, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny, HostLane(), weight_slots=1)
    load_adapters(tiny, engine)
    engine.merge(1)

    def fail(writer: WeightWriter, row: EngineRow) -> None:
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(WeightWriter, "take", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                engine.merge(2)
    assert (set(engine.merging), set(engine.merged)) == (set(), {BASE_SLOT})
    engine.merge(3)
    assert engine.merged == {BASE_SLOT, 3}
    inputs, index = tiny.inputs(2), torch.full((2,), 3)
    assert close(engine.denoise(Plan.MERGED, *inputs, index), engine.denoise(Plan.FACTORED, *inputs, index))


def test_nothing_is_read_before_it_was_made(tiny: TinyParts) -> None:
    lane = RecordingLane(passing=False)
    engine = make_engine(tiny, lane, weight_slots=1)
    # The lane came after the caller's stream, on which slabs and weights were made, and the merges after the lane.
    assert lane.log[0] == "enter"
    _, aside = lane.besides
    assert aside.waited == [lane.marks[0]]
    lane.log.clear()
    # So does whatever is warmed, with weights that may be a moment old.
    engine.warm_one("dense", CallShape(1, 8, 8))
    assert lane.log[:2] == ["enter", "enter"]


def test_a_copy_of_a_row_holds_up_only_those_who_read_it(tiny: TinyParts) -> None:
    lane = RecordingLane(passing=False)
    engine = make_engine(tiny, lane, weight_slots=0)
    load_adapters(tiny, engine)
    first, second, third = lane.besides[0].marks
    engine.denoise(Plan.FACTORED, *tiny.inputs(2), torch.tensor([0, 2]))
    assert lane.waited == [second]
    engine.denoise(Plan.FACTORED, *tiny.inputs(3), torch.tensor([1, 2, 3]))
    assert lane.waited == [second, first, third]
    # And the copy itself waits for the steps that may still read the slot's former row.
    before = len(lane.marks)
    engine.load_row(2, EngineRow())
    assert lane.besides[0].waited[-1] is lane.marks[before]


def test_the_host_is_at_most_a_step_ahead(tiny: TinyParts) -> None:
    lane = RecordingLane(passing=False)
    engine = make_engine(tiny, lane, weight_slots=0)
    for _ in range(4):
        engine.denoise(Plan.DENSE, *tiny.inputs(1), torch.tensor([0]))
    assert [mark.waits for mark in lane.marks] == [1, 1, 0, 0]


def test_captures_begin_with_the_largest_and_share_one_list(tiny: TinyParts) -> None:
    engine = make_engine(tiny, RecordingLane(), warm_sizes=((8, 8), (16, 8)))
    work = [shape.work for _, shape, _ in engine.captures_to_warm()]
    assert work == sorted(work, reverse=True)
    engine.warm()
    assert engine.graphs.captures == len(work) == 2 * len(engine.buckets) * 6


def test_what_cannot_be_run_is_refused(tiny: TinyParts) -> None:
    engine = make_engine(tiny, HostLane(), weight_slots=0)
    inputs = tiny.inputs(2)
    with pytest.raises(InvalidArgument, match="positions"):
        engine.denoise(Plan.DENSE, *tiny.inputs(1, side=(32, 16)), torch.tensor([0]))
    with pytest.raises(InvalidArgument, match="names a slot"):
        engine.denoise(Plan.DENSE, *inputs, torch.tensor([0, 5]))
    with pytest.raises(InvalidArgument, match="cannot be merged"):
        engine.merge(1)
    assert Plan.MERGED not in engine.plans
    merging = make_engine(tiny, HostLane(), weight_slots=1)
    with pytest.raises(InvalidArgument, match="share one slot"):
        merging.denoise(Plan.MERGED, *inputs, torch.tensor([0, 1]))


def test_an_engine_is_measured_once_and_remembers(tiny: TinyParts, tmp_path: Path) -> None:
    stages: list[str] = []

    def build(*, live: bool = False) -> CudaEngine:
        return build_cuda(
            tiny.base,
            tiny.factors,
            tiny.rows,
            tiny.norms,
            slots=3,
            max_batch=2,
            options=CudaOptions(warm_sizes=((8, 8),), max_area=64, weight_slots=1),
            lane=HostLane(),
            cache_dir=tmp_path,
            progress=lambda stage, done, total: stages.append(stage),
            live=live,
        )

    assert build(live=True).capacity == {}
    first = build()
    assert first.costs is not None
    assert {plan for plan, _, _ in first.costs.step_ms} == set(Plan)
    assert 0 < first.costs.merge_ms < 60_000
    assert first.capacity == {(8, 8): 2}
    assert "calibrate" in stages
    stages.clear()
    second = build()
    assert "calibrate" not in stages
    assert second.costs is not None
    assert second.costs.step_ms.keys() == first.costs.step_ms.keys()
    planner = planner_of(second)
    assert planner is not None
    assert planner.capacity == {(8, 8): 2}
    # One that takes over has captured nothing that would say it.
    third = build(live=True)
    assert (third.capacity, third.costs) == (second.capacity, second.costs)


def test_costs_of_another_identity_or_damaged_are_not_read(tmp_path: Path) -> None:
    identity = {"gpu": "a", "torch": "2"}
    calibration = Calibration(CostTable({(Plan.DENSE, 2, (8, 8)): 1.5}), {Plan.DENSE: True}, {(8, 8): 2, (8, 16): 0})
    assert read_costs(tmp_path, identity) is None
    write_costs(tmp_path, identity, calibration)
    found = read_costs(tmp_path, identity)
    assert found is not None
    assert found == calibration
    assert read_costs(tmp_path, {**identity, "torch": "3"}) is None
    for damage in ("", "{}", "[]", '{"format": "hueshift.costs/1"}'):
        costs_file(tmp_path, identity).write_text(damage, encoding="utf-8")
        assert read_costs(tmp_path, identity) is None


def test_the_attention_setting_names_backends_by_head_size() -> None:
    table = parse_attention("sdpa, 80:cudnn,160:xformers")
    assert table == AttentionTable(AttentionKind.SDPA, {80: AttentionKind.CUDNN, 160: AttentionKind.XFORMERS})
    assert [table.kind(width) for width in (40, 80)] == [AttentionKind.SDPA, AttentionKind.CUDNN]
    for wrong in ("flash", "sdpa,cudnn", "x:sdpa", "sdpa,80", ""):
        with pytest.raises(InvalidArgument, match="not understood"):
            parse_attention(wrong)


@pytest.mark.parametrize("kind", [AttentionKind.SDPA, AttentionKind.CUDNN])
def test_attention_backends_agree(tiny: TinyParts, reference: TorchEngine, kind: AttentionKind) -> None:
    engine = make_engine(tiny, HostLane(), attention=AttentionTable(kind), weight_slots=0)
    inputs, index = tiny.inputs(2), torch.tensor([0, 0])
    assert close(engine.denoise(Plan.DENSE, *inputs, index), reference.denoise(Plan.DENSE, *inputs, index))


def test_xformers_is_asked_for_by_name_where_it_is_missing(tiny: TinyParts) -> None:
    with pytest.raises(FailedPrecondition, match="xformers, which is not installed"):
        make_engine(tiny, HostLane(), attention=AttentionTable(AttentionKind.XFORMERS))


def test_eager_calls_need_no_capture(tiny: TinyParts) -> None:
    lane = RecordingLane()
    engine = make_engine(tiny, lane, compile=CompileKind.NONE)
    engine.warm()
    engine.denoise(Plan.DENSE, *tiny.inputs(1), torch.tensor([0]))
    assert lane.captures == 0
