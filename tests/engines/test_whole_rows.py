"""Dense deltas: composed, served from weights of their own on every engine that can, and in calls of their own."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from fake_gpu import GPU, FakeLane, fake_gpu
from tiny_unet import TinyParts, merge_row, run, tiny_unet, whole_adapter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.errors import FailedPrecondition, InvalidArgument, Reason
from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.cost_model import CostTable
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import HostLane
from hueshift.engines.cuda_options import CudaOptions
from hueshift.engines.denoise import Sample, choose_plan, start_sample
from hueshift.engines.interface import EngineRow, Plan, UNetEngine, WholeWeightEngine, dense_in, dense_slots
from hueshift.engines.merged_weights import WeightWriter
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.planner import Planner
from hueshift.engines.samplers import SamplerKind, make_table
from hueshift.engines.text_side import is_text_side
from hueshift.engines.torch_engine import TorchEngine
from hueshift.engines.whole_rows import divide

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[[TinyParts], CudaEngine | TorchEngine]


def cuda(parts: TinyParts, weight_slots: int = 2) -> CudaEngine:
    """The CUDA engine on the host, with five slots."""
    options = CudaOptions(warm_sizes=((8, 8),), max_area=256, weight_slots=weight_slots)
    given = (parts.base, parts.factors, parts.rows, parts.norms)
    return CudaEngine(*given, slots=5, max_batch=4, lane=HostLane(), options=options)


def plain(parts: TinyParts) -> TorchEngine:
    """torch's own."""
    given = (parts.base, parts.factors, parts.rows, parts.norms)
    return TorchEngine(*given, slots=5, max_batch=4, device=torch.device("cpu"))


ENGINES = [pytest.param(cuda, id="cuda"), pytest.param(plain, id="torch")]


def truth(parts: TinyParts, row: EngineRow, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """diffusers' UNet with all of the row in its weights, in fp64."""
    unet = tiny_unet(parts.base.unet.config)
    unet.load_state_dict(parts.base.unet.state_dict())
    merge_row(unet, parts, EngineRow(row.spectral, row.lowrank))
    for name, delta in (row.dense or {}).items():
        weight = unet.get_parameter(f"{name}.weight")
        weight.data.copy_((weight.double() + delta.double().reshape(weight.shape)).float())
    return run(unet, *inputs)


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of sums."""
    return bool(torch.allclose(found, expected, rtol=1e-3, atol=1e-4))


def test_deltas_are_summed_with_their_weights_and_checked(tiny: TinyParts) -> None:
    first, second = whole_adapter(tiny, 1), whole_adapter(tiny, 2, share=0.5)
    row = tiny.row((first, 1.0), (second, -0.5))
    assert row.needs_weights
    assert row.dense is not None
    for name, delta in first.dense.items():
        other = second.dense.get(name)
        torch.testing.assert_close(row.dense[name], delta if other is None else delta - 0.5 * other)
    assert row.nbytes == sum(delta.numel() * 4 for delta in first.dense.values())
    assert tiny.row((first, 1.0)).dense is not None
    assert tiny.row((first, 0.0)).dense == {}
    name = next(iter(first.dense))
    text = next(layer.name for layer in tiny.rows.layout.matrices if is_text_side(layer.name))
    for deltas, reason in (
        ({"nowhere": torch.zeros(2, 2)}, Reason.ADAPTER_TENSOR_UNKNOWN),
        ({text: torch.zeros(2, 2)}, Reason.ADAPTER_TENSOR_UNKNOWN),
        ({name: torch.zeros(2, 2)}, Reason.ADAPTER_SHAPE_MISMATCH),
    ):
        with pytest.raises(InvalidArgument) as caught:
            tiny.row((Adapter(AdapterKind.DENSE, first.base_hash, "", dense=deltas), 1.0))
        assert caught.value.reason is reason


@pytest.mark.parametrize("make", ENGINES)
def test_whole_deltas_beside_shifts_and_branches_equal_merged_weights(tiny: TinyParts, make: Make) -> None:
    engine = make(tiny)
    assert isinstance(engine, WholeWeightEngine)
    inputs, index = tiny.inputs(2), torch.tensor([2, 2])
    spectral, branch = tiny.random_adapter(3), tiny.random_adapter(4, AdapterKind.LOWRANK)
    before = engine.denoise(Plan.FACTORED, *inputs, torch.tensor([1, 0]))
    for mix in (
        ((whole_adapter(tiny, 1), 1.0),),
        ((whole_adapter(tiny, 2, share=0.3), 0.7), (branch, 1.0)),
        ((whole_adapter(tiny, 2), 1.0), (spectral, 0.2), (branch, 0.5)),
    ):
        row = tiny.row(*mix)
        engine.load_row(2, row)
        assert engine.dense == {2}
        assert close(engine.denoise(Plan.MERGED, *inputs, index), truth(tiny, row, inputs))
    # Nothing of it is left where it was, and others did not notice.
    engine.load_row(2, EngineRow())
    assert engine.dense == frozenset()
    assert torch.equal(engine.denoise(Plan.FACTORED, *inputs, torch.tensor([1, 0])), before)
    assert close(engine.denoise(Plan.DENSE, *inputs, index), truth(tiny, EngineRow(), inputs))


@pytest.mark.parametrize("make", ENGINES)
def test_such_rows_run_under_no_other_plan_and_in_no_mixed_call(tiny: TinyParts, make: Make) -> None:
    engine = make(tiny)
    engine.load_row(2, tiny.row((whole_adapter(tiny, 1), 1.0)))
    inputs = tiny.inputs(2)
    for plan in (Plan.DENSE, Plan.FACTORED, Plan.FULL):
        with pytest.raises(InvalidArgument, match=r"slots \[2\] hold dense deltas"):
            engine.denoise(plan, *inputs, torch.tensor([1, 2]))
    with pytest.raises(InvalidArgument, match="must share one slot"):
        engine.denoise(Plan.MERGED, *inputs, torch.tensor([1, 2]))


def test_weights_that_are_kept_are_merged_over_by_nobody(tiny: TinyParts) -> None:
    engine = cuda(tiny)
    row = tiny.row((whole_adapter(tiny, 1), 1.0))
    engine.load_row(2, row)
    assert (engine.dense_slots, engine.weight_slots, engine.dense) == (2, 1, frozenset({2}))
    for slot in (1, 3):
        engine.load_row(slot, tiny.row((tiny.random_adapter(slot), 1.0)))
    inputs, index = tiny.inputs(2), torch.tensor([2, 2])
    for slot in (1, 3, 1):
        engine.merge(slot)
        assert close(engine.denoise(Plan.MERGED, *inputs, index), truth(tiny, row, inputs))
    engine.load_row(4, tiny.row((whole_adapter(tiny, 5), 1.0)))
    assert (engine.weight_slots, engine.dense) == (0, frozenset({2, 4}))
    # A merge has no room, and says nothing: its rows run factored.
    engine.merge(1)
    assert 1 not in engine.merged
    with pytest.raises(RuntimeError, match="all 2 copies of the weights are kept"):
        engine.load_row(3, row)


def test_an_engine_without_weight_slots_refuses_them(tiny: TinyParts) -> None:
    engine = cuda(tiny, weight_slots=0)
    assert (dense_slots(engine), dense_in(engine)) == (0, frozenset())
    with pytest.raises(FailedPrecondition, match=r"whole weights \(dense deltas\).*engine.merged_slots"):
        engine.load_row(1, tiny.row((whole_adapter(tiny, 1), 1.0)))


def test_pictures_are_divided_by_their_weights(tiny: TinyParts) -> None:
    engine = plain(tiny)
    for slot in (2, 4):
        engine.load_row(slot, tiny.row((whole_adapter(tiny, slot), 1.0)))
    assert divide(engine, [0, 2, 1, 4, 2, 3]) == [[0, 2, 5], [1, 4], [3]]
    assert divide(engine, [1, 1]) == [[0, 1]]


def picture(slot: int) -> Sample:
    """A picture of four steps."""
    table = make_table(NoiseSchedule.from_config({}), SamplerKind.DDIM, 4)
    cross = CrossInputs((torch.zeros(1, 3, 4),))
    return start_sample(0, (4, 8, 8), cross=cross, guidance=1.0, table=table, slot=slot)


def test_the_planner_gives_them_calls_of_their_own(tiny: TinyParts) -> None:
    engine: UNetEngine = cuda(tiny)
    engine.load_row(2, tiny.row((whole_adapter(tiny, 1), 1.0)))
    samples = [picture(slot) for slot in (0, 2, 1, 2)]
    table = CostTable({(plan, rows, (8, 8)): 1.0 for plan in Plan for rows in (1, 2, 4)}, merge_ms=1.0)
    decision = Planner(engine, table).decide(samples, {})
    assert [(run.plan, run.members) for run in decision.runs] == [(Plan.DENSE, (0, 2)), (Plan.MERGED, (1, 3))]
    assert decision.together_ms == 2.0
    assert choose_plan(engine, samples[1::2]) is Plan.MERGED


def test_adding_deltas_makes_no_copy_of_the_weights(tiny: TinyParts, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
        def __torch_dispatch__(
            self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            given = {part.untyped_storage().data_ptr() for part in args if isinstance(part, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
                made.append(out.shape)
            return out

    add = WeightWriter.add

    def watched(writer: WeightWriter, deltas: Mapping[str, Tensor]) -> None:
        with Watch():  # type: ignore[no-untyped-call]  # torch's own
            add(writer, deltas)

    monkeypatch.setattr(WeightWriter, "add", watched)
    engine, row = cuda(tiny), tiny.row((whole_adapter(tiny, 1), 1.0))
    engine.load_row(2, row)
    assert made == []
    inputs = tiny.inputs(1)
    assert close(engine.denoise(Plan.MERGED, *inputs, torch.tensor([2])), truth(tiny, row, inputs))


def test_on_a_gpu_they_arrive_beside_the_steps(tiny: TinyParts) -> None:
    row = tiny.row((whole_adapter(tiny, 1), 1.0))
    with fake_gpu() as gpu:
        options = CudaOptions(warm_sizes=((8, 8),), max_area=256, weight_slots=1)
        given = (tiny.base, tiny.factors, tiny.rows, tiny.norms)
        engine = CudaEngine(*given, slots=5, max_batch=4, lane=FakeLane(gpu), options=options)
        pinned = row.each(Tensor.pin_memory)
        gpu.waits.clear()
        engine.load_row(2, pinned)
        assert gpu.waits == []
        held = engine.networks.merged(engine._merged.use(2))  # type: ignore[union-attr]  # there is one weight slot
        assert {part.device for part in held.unet.parameters()} == {GPU}
