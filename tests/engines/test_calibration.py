"""Which form of the layers an engine serves with: measured, compared with torch, and refused where it is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from host_cuda import built_engine, cuda_engine, cuda_options
from recording_lane import RecordingLane
from structlog.testing import capture_logs
from tiny_unet import TinyParts
from torch import Tensor

from hueshift.adapters.errors import FailedPrecondition, Reason
from hueshift.engines import calibration, cuda_networks, cuda_setup
from hueshift.engines.cuda_buffers import CallShape
from hueshift.engines.cuda_compile import Compute
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.cuda_lane import GraphLane, HostLane, Work
from hueshift.engines.cuda_layers import KernelFactoredLinear, SlabRows
from hueshift.engines.cuda_options import CompileKind, KernelUse
from hueshift.engines.interface import BASE_SLOT, SLAB_PLANS, Plan
from hueshift.engines.merged_weights import WeightWriter
from hueshift.engines.torch_engine import TorchEngine
from hueshift.kernels.errors import KernelUnavailableError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that draw something else."""
    right = KernelFactoredLinear.forward
    monkeypatch.setattr(KernelFactoredLinear, "forward", lambda layer, x: right(layer, x) * 1.5)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are faster: they are measured second, and each time is shorter than the one before."""
    times = iter(range(1000, 0, -1))
    monkeypatch.setattr(calibration, "_median_ms", lambda lane, work: (work(), float(next(times)))[1])


def assert_draws_as_torch(parts: TinyParts, engine: CudaEngine, plan: Plan, rows: int) -> None:
    """Compare a call of a bucket that was tried with torch's own engine."""
    given = (parts.base, parts.factors, parts.rows, parts.norms)
    expected = TorchEngine(*given, slots=5, max_batch=4, device=torch.device("cpu"))
    row = parts.row((parts.random_adapter(1), 1.0))
    for one in (engine, expected):
        one.load_row(1, row)
    inputs, index = parts.inputs(rows), torch.full((rows,), 1)
    found = engine.denoise(plan, *inputs, index)
    assert torch.allclose(found, expected.denoise(plan, *inputs, index), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("faster")
def test_kernels_that_are_faster_are_chosen(tiny: TinyParts) -> None:
    engine = cuda_engine(tiny, HostLane())
    assert calibration.choose_forms(engine, None) == {Plan.DENSE: True, Plan.FACTORED: True, Plan.FULL: True}
    assert engine.networks.of(Plan.FACTORED).unet.kernel_layers > 0
    assert engine.networks.full.unet.kernel_layers > 0
    assert engine.networks.full.unet.fused_blocks > 0
    # What was tried is gone.
    assert torch.equal(torch.as_tensor(engine.row(1).spectral), torch.as_tensor(engine.row(BASE_SLOT).spectral))


@pytest.mark.usefixtures("faster")
def test_slots_with_weights_of_their_own_draw_the_same(tiny: TinyParts) -> None:
    engine = cuda_engine(tiny, HostLane(), slot_weight_bytes=1 << 24)
    with capture_logs() as logs:
        assert calibration.choose_forms(engine, None) == {Plan.DENSE: True, Plan.FACTORED: True, Plan.FULL: True}
    assert [line["error"] < 1e-4 for line in logs if line["event"] == "layer_form"] == [True] * 3
    assert engine.networks.slot_weights.weights
    assert_draws_as_torch(tiny, engine, Plan.FACTORED, 4)


@pytest.mark.usefixtures("faster", "broken")
def test_weights_of_slots_are_let_go_when_nothing_writes_them_any_more(
    tiny: TinyParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = RecordingLane()
    engine = cuda_engine(tiny, lane, slot_weight_bytes=1 << 24, weight_slots=0)
    settled: list[bool] = []

    def settle() -> None:
        # The steps' lane comes after the last row, and was waited for.
        settled.append(lane.besides[0].marks[-1] in lane.waited and lane.marks[-1].waits == 1)

    monkeypatch.setattr(engine.networks, "settle", settle)
    calibration.choose_forms(engine, None)
    assert settled == [True]


def test_calls_are_timed_as_they_are_when_they_serve(tiny: TinyParts, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = cuda_engine(tiny, HostLane(), weight_slots=0)
    views = engine.buffers.at(CallShape(4, 8, 8))
    seen: list[tuple[list[int], list[int]]] = []

    def median(lane: GraphLane, work: Work) -> float:
        seen.append((views.slots.tolist(), views.branches.tolist()))
        assert float(views.sample.std()) > 0.5
        return 1.0

    monkeypatch.setattr(calibration, "_median_ms", median)
    calibration.choose_forms(engine, None)
    # Both forms of each plan: half of the rows have an adapter, with a branch.
    assert seen == [([1, 0, 1, 0], [1, -1, 1, -1])] * 6
    seen.clear()
    calls = calibration.warm_all(engine, lambda stage, done, total: None)
    calibration.measure_costs(engine, calls, lambda stage, done, total: None)
    # Then every row has a slot of its own; the last is of a call from outside.
    assert seen[:-1] == [([1, 2, 3, 4], [1, 2, 3, 4])] * len(calls)
    for slot in range(1, 5):
        assert torch.equal(torch.as_tensor(engine.row(slot).spectral), torch.as_tensor(engine.row(BASE_SLOT).spectral))


@pytest.mark.parametrize("wrong", [False, True])
def test_what_was_compiled_wrong_is_not_served(tiny: TinyParts, monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    compiled: list[str] = []

    def compile_network(compute: Compute, *, autotune: bool) -> Compute:
        compiled.append("once")
        return lambda *inputs: compute(*inputs) * (1.5 if wrong else 1.0)

    monkeypatch.setattr(cuda_networks, "compile_network", compile_network)
    engine = cuda_engine(tiny, HostLane(), compile=CompileKind.INDUCTOR, kernels=KernelUse.OFF)
    with capture_logs() as logs:
        calibration.check_compiled(engine)
    events = [(line["event"], line["plan"]) for line in logs if line["event"].startswith("compiled_form")]
    assert events == [("compiled_form_wrong" if wrong else "compiled_form", plan) for plan in ("dense", "factored")]
    before = len(compiled)
    assert before == 2
    for role in ("dense", "factored", "merged base", "merged 0"):
        engine.warm_one(role, CallShape(4, 8, 8))
    # The two plans' are there already; none is made again where they were wrong.
    assert len(compiled) - before == (0 if wrong else 2)
    assert_draws_as_torch(tiny, engine, Plan.FACTORED, 4)


def test_what_cannot_be_compiled_is_served_uncompiled(tiny: TinyParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_networks, "compile_network", lambda compute, autotune: fail)
    engine = cuda_engine(tiny, HostLane(), compile=CompileKind.INDUCTOR, kernels=KernelUse.OFF)
    with capture_logs() as logs:
        calibration.check_compiled(engine)
    assert [log["plan"] for log in logs if log["event"] == "compiled_form_failed"] == ["dense", "factored"]
    engine.warm()
    assert_draws_as_torch(tiny, engine, Plan.FACTORED, 4)


@pytest.mark.usefixtures("faster", "broken")
def test_kernels_that_are_fast_and_wrong_are_not_chosen(tiny: TinyParts) -> None:
    engine = cuda_engine(tiny, HostLane())
    assert calibration.choose_forms(engine, None) == {Plan.DENSE: True, Plan.FACTORED: False, Plan.FULL: False}
    assert engine.networks.of(Plan.FACTORED).unet.kernel_layers == 0
    assert engine.networks.full.unet.kernel_layers == 0
    # Nor is any graph left that was captured of them while they were tried.
    assert len(engine.graphs) == 0
    for _ in range(3):
        assert_draws_as_torch(tiny, engine, Plan.FACTORED, 4)
        assert_draws_as_torch(tiny, engine, Plan.FULL, 4)


class OutOfResourcesError(Exception):
    """As Triton's, which is no RuntimeError."""


def fail(*_: object, **__: object) -> None:
    """What a kernel does that a GPU does not take."""
    raise OutOfResourcesError("out of resource: shared memory, Required: 262144, Hardware limit: 232448")


def test_kernels_that_fail_are_not_chosen_and_do_not_end_the_start(
    tiny: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KernelFactoredLinear, "forward", fail)
    with capture_logs() as logs:
        engine = built_engine(tiny, HostLane(), tmp_path, kernels=KernelUse.AUTO)
    assert [log["plan"] for log in logs if log["event"] == "layer_form_failed"] == ["factored", "full"]
    assert engine.networks.of(Plan.FACTORED).unet.kernel_layers == 0
    assert engine.networks.full.unet.kernel_layers == 0
    for _ in range(3):
        assert_draws_as_torch(tiny, engine, Plan.FACTORED, 4)
        assert_draws_as_torch(tiny, engine, Plan.FULL, 4)
    # The next start may have what they lacked, and tries them again.
    assert list(tmp_path.rglob("*.json")) == []
    with pytest.raises(OutOfResourcesError):
        built_engine(tiny, HostLane(), tmp_path, kernels=KernelUse.ON)


def test_kernels_that_cannot_be_launched_at_all_are_told_before_they_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(device: torch.device) -> None:
        raise KernelUnavailableError("no Triton kernel can be launched: there is no C compiler")

    monkeypatch.setattr(cuda_setup, "check_launches", refuse)
    usable, gpu = cuda_setup._with_usable_kernels, torch.device("cuda")
    with capture_logs() as logs:
        found = usable(cuda_options(kernels=KernelUse.AUTO), gpu)
    assert (found.kernels, found.weight_slots) == (KernelUse.OFF, 0)
    assert [(log["event"], log["log_level"]) for log in logs] == [("kernels_unavailable", "error")]
    assert "no C compiler" in logs[0]["error"]
    with pytest.raises(FailedPrecondition, match="no C compiler") as caught:
        usable(cuda_options(kernels=KernelUse.ON), gpu)
    assert caught.value.reason is Reason.ENGINE_UNAVAILABLE
    # Where they are not wanted, or on a lane of the host, nobody asks.
    assert usable(cuda_options(kernels=KernelUse.OFF), gpu).weight_slots == 2
    assert usable(cuda_options(kernels=KernelUse.ON), torch.device("cpu")).kernels is KernelUse.ON


def test_a_device_that_is_lost_while_kernels_are_tried_ends_the_start(
    tiny: TinyParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(layer: KernelFactoredLinear, x: Tensor) -> Tensor:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(KernelFactoredLinear, "forward", lose)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        calibration.choose_forms(cuda_engine(tiny, HostLane()), None)


def test_merged_weights_are_held_against_the_factored_plan(tiny: TinyParts, tmp_path: Path) -> None:
    with capture_logs() as logs:
        engine = built_engine(tiny, HostLane(), tmp_path, kernels=KernelUse.OFF)
    assert [log["error"] < 1e-4 for log in logs if log["event"] == "merged_form"] == [True]
    assert engine.weight_slots == 2
    # What was tried is gone, and nothing was captured for it but what serves.
    for slot in (1, 2):
        assert torch.equal(torch.as_tensor(engine.row(slot).spectral), torch.as_tensor(engine.row(BASE_SLOT).spectral))
    assert len(engine.graphs) == engine.graphs.captures == len(engine.captures_to_warm())


@pytest.mark.parametrize("copy", [0, 1])
def test_merged_weights_that_are_wrong_are_not_served(
    tiny: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: int
) -> None:
    right, writers = WeightWriter.launch, list[WeightWriter]()

    def launch(writer: WeightWriter) -> None:
        right(writer)
        if writer not in writers:
            writers.append(writer)
        if writers.index(writer) == copy:
            for layer in writer._plan.layers:
                layer.out.mul_(1.5)

    monkeypatch.setattr(WeightWriter, "launch", launch)
    with capture_logs() as logs:
        engine = built_engine(tiny, HostLane(), tmp_path, kernels=KernelUse.OFF)
    assert [log["log_level"] for log in logs if log["event"] == "merged_form_wrong"] == ["error"]
    assert engine.weight_slots == 0
    assert Plan.MERGED not in engine.plans
    assert list(tmp_path.rglob("*.json")) == []
    assert_draws_as_torch(tiny, engine, Plan.FACTORED, 4)


def test_weights_that_cannot_be_written_do_not_end_the_start(
    tiny: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # While the engine is made, and later, when the first mix is merged.
    for when, event in (("launch", "merged_plan_failed"), ("take", "merged_form_failed")):
        with monkeypatch.context() as patch, capture_logs() as logs:
            patch.setattr(WeightWriter, when, fail)
            engine = built_engine(tiny, HostLane(), tmp_path, kernels=KernelUse.OFF)
        assert [log["log_level"] for log in logs if log["event"] == event] == ["error"]
        assert engine.weight_slots == 0
        assert_draws_as_torch(tiny, engine, Plan.FACTORED, 4)


@pytest.mark.usefixtures("faster")
def test_forms_are_compared_at_fewer_rows_where_a_batch_does_not_fit(
    tiny: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, tried = CudaEngine._run, list[int]()

    def run(engine: CudaEngine, network: Any, shape: CallShape, *given: Any) -> tuple[Tensor, ...]:
        tried.append(shape.rows)
        if shape.rows > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return right(engine, network, shape, *given)

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(CudaEngine, "_run", run)
        engine = built_engine(tiny, HostLane(), tmp_path)
    # Down to the one row that fits, in which an adapter is at work.
    assert [log["rows"] for log in logs if log["event"] == "layer_form"] == [1, 1, 1]
    assert [log["rows"] for log in logs if log["event"] == "form_without_memory"] == [4, 3, 2] * 4
    assert all(log["error"] > 0 for log in logs if log["event"] == "layer_form" and log["plan"] != "full")
    assert engine.weight_slots == 2
    # No graph of the form that was tried first is left: warmed calls are those of the one that serves.
    assert engine.networks.of(Plan.FACTORED).unet.kernel_layers > 0
    assert len(engine.graphs) == len(engine.captures_to_warm())
    for rows in (1, 4):
        assert_draws_as_torch(tiny, engine, Plan.FACTORED, rows)


@pytest.mark.usefixtures("faster")
def test_the_full_plan_has_a_form_of_its_own(tiny: TinyParts, monkeypatch: pytest.MonkeyPatch) -> None:
    right = SlabRows.add_branch

    def wrong(rows: SlabRows, name: str, out: Tensor, x: Tensor) -> Tensor:
        return right(rows, name, out if rows.mask(name) is None else out * 1.5, x)

    monkeypatch.setattr(SlabRows, "add_branch", wrong)
    engine = cuda_engine(tiny, HostLane(), weight_slots=0)
    chosen = calibration.choose_forms(engine, None)
    assert chosen == {Plan.DENSE: True, Plan.FACTORED: True, Plan.FULL: False}
    assert engine.networks.full.unet.kernel_layers == 0
    # And as a later start finds it.
    again = cuda_engine(tiny, HostLane(), weight_slots=0)
    assert calibration.choose_forms(again, chosen) == chosen
    assert again.networks.of(Plan.FACTORED).unet.kernel_layers > 0
    assert again.networks.full.unet.kernel_layers == 0


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("live", [False, True])
def test_a_start_with_forced_kernels_that_are_wrong_ends(tiny: TinyParts, tmp_path: Path, live: bool) -> None:
    for _ in range(2):
        # Nothing was kept that would let the next start go on.
        with capture_logs() as logs, pytest.raises(FailedPrecondition) as caught:
            built_engine(tiny, HostLane(), tmp_path, live=live, kernels=KernelUse.ON, weight_slots=0)
        assert caught.value.reason is Reason.ENGINE_PARITY
        for said in ("engine.kernels", "factored plan", "allowed is 0.02", "auto", "off"):
            assert said in caught.value.message
        assert caught.value.metadata["plan"] == "factored"
        assert [log["plan"] for log in logs if log["event"] == "layer_form_wrong"] == ["factored"]


def test_forced_kernels_that_are_right_serve_and_are_compared_once(tiny: TinyParts, tmp_path: Path) -> None:
    def plans_compared() -> list[str]:
        with capture_logs() as logs:
            engine = built_engine(tiny, HostLane(), tmp_path, kernels=KernelUse.ON, weight_slots=0)
        assert engine.networks.of(Plan.FACTORED).unet.kernel_layers > 0
        assert_draws_as_torch(tiny, engine, Plan.FACTORED, 4)
        return [log["plan"] for log in logs if log["event"] == "layer_form"]

    assert plans_compared() == ["dense", "factored", "full"]
    assert plans_compared() == []


@pytest.mark.usefixtures("broken")
def test_kernels_that_are_off_are_not_asked(tiny: TinyParts) -> None:
    engine = cuda_engine(tiny, HostLane(), kernels=KernelUse.OFF, weight_slots=0)
    assert calibration.choose_forms(engine, None) == dict.fromkeys(SLAB_PLANS, False)
