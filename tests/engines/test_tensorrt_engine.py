"""The whole TensorRT path against a double that runs its plans on the CPU and refuses what TensorRT forbids."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recording_tensorrt import make_parts
from structlog.testing import capture_logs
from tensorrt_world import InlineLane, World
from tiny_unet import TinyParts

from hueshift.adapters.adapter import AdapterKind
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.engines.build import EngineOptions, build_engine
from hueshift.engines.fallback_engine import FallbackEngine
from hueshift.engines.interface import BASE_SLOT, EngineRow, MeasuredEngine, Plan, RunsAhead
from hueshift.engines.tensorrt_engine import TensorRtEngine
from hueshift.engines.tensorrt_loader import Fallback, TensorRtError
from hueshift.engines.tensorrt_setup import Model, build_tensorrt, load_engine, prepare_plans, ranges_of
from hueshift.engines.tensorrt_verify import verify
from hueshift.engines.text_side import is_text_side

CPU = torch.device("cpu")
# fp16 against fp64: weights and activations are rounded, here to at most 3e-3 of outputs of up to 4.
CLOSE = 2e-2


@dataclass
class Bench:
    """One world of the double, and what was reported in it."""

    parts: TinyParts
    options: EngineOptions
    world: World = field(default_factory=World)
    fallbacks: list[str] = field(default_factory=list)
    parity: dict[str, float] = field(default_factory=dict)
    stages: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def model(self) -> Model:
        return Model(self.parts.base, self.parts.factors, self.parts.rows, self.parts.norms)

    def build(self, **changes: Any) -> Any:
        return build_tensorrt(
            self.model,
            replace(self.options, **changes),
            CPU,
            lambda *stage: self.stages.append(stage),
            self.parity.__setitem__,
            self.fallbacks.append,
            make_parts(self.world),
        )

    def engine(self, **changes: Any) -> TensorRtEngine:
        """The engine of cached plans without verification."""
        options = replace(self.options, **changes)
        parts = make_parts(self.world)
        plans = prepare_plans(parts, self.model, options, lambda *stage: None)
        return load_engine(parts, self.model, options, plans, self.fallbacks.append)


@pytest.fixture(scope="module")
def built(tiny: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with every graph and plan."""
    folder = tmp_path_factory.mktemp("plans")
    bench = Bench(tiny, EngineOptions(cache_dir=folder, kind="tensorrt", slots=5, max_batch=4, max_size=128))
    prepare_plans(make_parts(bench.world), bench.model, replace(bench.options, merge_after=2), lambda *stage: None)
    return folder


@pytest.fixture
def bench(tiny: TinyParts, built: Path, tmp_path: Path) -> Bench:
    """A copy of that folder for each test."""
    shutil.copytree(built, tmp_path / "cache")
    options = EngineOptions(cache_dir=tmp_path / "cache", kind="tensorrt", slots=5, max_batch=4, max_size=128)
    return Bench(tiny, options)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


def test_build_reports_verifies_and_serves(tiny: TinyParts, tmp_path: Path) -> None:
    options = EngineOptions(cache_dir=tmp_path, kind="tensorrt", slots=3, max_batch=4, max_size=128)
    bench = Bench(tiny, options)
    engine = bench.build(merge_after=2)
    assert isinstance(engine, FallbackEngine)
    assert engine.name == "tensorrt"
    assert bench.fallbacks == []
    assert set(bench.parity) == {"dense", "factored", "merged"}
    assert max(bench.parity.values()) < 5e-3
    names = list(dict.fromkeys(stage for stage, _, _ in bench.stages))
    roles = ("dense", "factored", "merged")
    assert names == [f"{verb} {role}" for role in roles for verb in ("export", "build")] + ["check"]
    shares = [done for stage, done, _ in bench.stages if stage == "build merged"]
    assert shares == sorted(shares)
    assert shares[-1] == 1000
    assert bench.world.events[:3] == ["build", "build", "build refit"]
    assert bench.world.timing_given == [b"", b"timed", b"timed"]
    engine.warm()


def test_plans_are_built_once(bench: Bench) -> None:
    bench.engine()
    assert bench.world.count("build") == 0
    other = Bench(bench.parts, bench.options, World(version="10.16.2"))
    other.engine()
    assert other.world.count("build") == 2, "another version builds its own"


@pytest.mark.parametrize("plan", TensorRtEngine.plans)
def test_mixed_batch_equals_merged_weights(bench: Bench, plan: Plan) -> None:
    parts, engine = bench.parts, bench.engine()
    kind = AdapterKind.LOWRANK if plan is Plan.DENSE else AdapterKind.SPECTRAL
    rows = [parts.row((parts.random_adapter(seed, kind), 1.0)) for seed in (1, 2)]
    for slot, row in enumerate(rows, 1):
        engine.load_row(slot, row)
    inputs = parts.inputs(3)
    for _ in range(2):
        out = engine.denoise(plan, *inputs, torch.tensor([0, 2, 1]))
        for number, row in enumerate((EngineRow(), rows[1], rows[0])):
            one = tuple(part[number : number + 1] for part in inputs)
            assert error(out[number : number + 1], parts.merged_output(row, *one)) < CLOSE
    assert bench.world.count("replay") == 1, "the second call is the captured one"


def test_the_host_runs_one_call_ahead_and_the_engine_tells_what_it_has(bench: Bench) -> None:
    engine = bench.engine()
    lane, inputs = engine.lane, bench.parts.inputs(1)
    assert isinstance(lane, InlineLane)
    lane.passing = False
    for _ in range(3):
        engine.denoise(Plan.DENSE, *inputs, torch.tensor([0]))
    assert [mark.waits for mark in lane.marks] == [1, 0, 0]
    assert isinstance(engine, RunsAhead)
    working = [engine.working]
    lane.marks[-1].passed = True
    assert [*working, engine.working] == [True, False]
    assert isinstance(engine, MeasuredEngine)
    assert (engine.buckets, engine.capacity) == ((1, 2, 4), {(8, 8): 4, (16, 16): 4})


def test_sdxl_plans_take_the_added_embedding(tiny_xl: TinyParts, tmp_path: Path) -> None:
    """Built, verified, mixed and merged; what pooled text adds is an input of every plan."""
    options = EngineOptions(cache_dir=tmp_path, kind="tensorrt", slots=3, max_batch=4, max_size=128, merge_after=2)
    bench = Bench(tiny_xl, options)
    assert bench.build().name == "tensorrt"
    assert max(bench.parity.values()) < 5e-3
    engine = bench.engine()
    row = tiny_xl.row((tiny_xl.random_adapter(1), 1.0))
    engine.load_row(1, row)
    inputs, added = tiny_xl.inputs(2), tiny_xl.added(2)
    expected = [tiny_xl.merged_output(one, *inputs, added) for one in (EngineRow(), row)]
    for _ in range(2):
        out = engine.denoise(Plan.FACTORED, *inputs, torch.tensor([0, 1]), added)
        assert error(out[0], expected[0][0]) < CLOSE
        assert error(out[1], expected[1][1]) < CLOSE
    engine.merge(1)
    assert error(engine.denoise_merged(*inputs, added), expected[1]) < CLOSE
    with pytest.raises(InvalidArgument, match="added: absent"):
        engine.denoise(Plan.FACTORED, *inputs, torch.tensor([0, 1]))


def test_batch_is_filled_with_base_rows(bench: Bench) -> None:
    engine = bench.engine(cuda_graphs=False)
    inputs = bench.parts.inputs(4)
    index = torch.zeros(4, dtype=torch.int64)
    four = engine.denoise(Plan.DENSE, *inputs, index)
    latents, timesteps, context = inputs
    three = engine.denoise(Plan.DENSE, latents[:3], timesteps[:3], context[:3], index[:3])
    assert torch.allclose(four[:3], three, atol=1e-2)
    assert bench.world.count("context") == 1, "both run in the bucket of four"
    assert bench.world.count("captured") == 0


def test_every_shape_has_a_context_of_its_own(bench: Bench) -> None:
    engine = bench.engine()
    index = torch.zeros(1, dtype=torch.int64)
    for side in ((8, 8), (16, 8), (8, 8)):
        inputs = bench.parts.inputs(1, side=side)
        out = engine.denoise(Plan.DENSE, *inputs, index)
        assert error(out, bench.parts.merged_output(EngineRow(), *inputs)) < CLOSE
    assert bench.world.count("context") == 2
    assert bench.world.count("replay") == 1


def test_sizes_outside_the_profile_are_refused(bench: Bench) -> None:
    engine = bench.engine()
    assert ranges_of(bench.parts.base, bench.options).sides == (2, 8, 16)
    with pytest.raises(InvalidArgument, match="18x8 is outside"):
        engine.denoise(Plan.DENSE, *bench.parts.inputs(1, side=(18, 8)), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("kind", list(AdapterKind)[:2])
def test_merge_equals_merged_weights_and_the_base_comes_back_bit_for_bit(bench: Bench, kind: AdapterKind) -> None:
    parts, engine = bench.parts, bench.engine(merge_after=2)
    rows = [parts.row((parts.random_adapter(seed, kind), 1.0)) for seed in (1, 2)]
    for slot, row in enumerate(rows, 1):
        engine.load_row(slot, row)
    inputs = parts.inputs(2)
    pristine = engine.denoise_merged(*inputs)
    for slot in (1, 2):
        engine.merge(slot)
        assert error(engine.denoise_merged(*inputs), parts.merged_output(rows[slot - 1], *inputs)) < CLOSE
    engine.merge(BASE_SLOT)
    assert torch.equal(engine.denoise_merged(*inputs), pristine)
    names = [name for name, _, _ in parts.rows.layout.spans() if not is_text_side(name)]
    assert bench.world.count("set weights") == len(names), "the addresses were set once"


def test_calls_are_captured_anew_after_a_refit(bench: Bench) -> None:
    engine = bench.engine(merge_after=2)
    inputs = bench.parts.inputs(1)
    for _ in range(3):
        engine.denoise_merged(*inputs)
    assert (bench.world.count("captured"), bench.world.count("replay")) == (1, 2)
    engine.merge(BASE_SLOT)
    engine.denoise_merged(*inputs)
    assert (bench.world.count("captured"), bench.world.count("replay")) == (2, 2)


def test_a_run_of_calls_for_one_adapter_is_merged(bench: Bench) -> None:
    parts, engine = bench.parts, bench.engine(merge_after=2)
    engine.load_row(1, parts.row((parts.random_adapter(1), 1.0)))
    inputs = parts.inputs(2)

    def call(*slots: int) -> torch.Tensor:
        return engine.denoise(Plan.FACTORED, *inputs, torch.tensor(slots))

    def merged() -> list[int]:
        return [] if engine.merged_slot is None else [engine.merged_slot]

    apart = call(1, 1)
    assert merged() == []
    together = call(1, 1)
    assert merged() == [1]
    assert torch.allclose(apart, together, atol=CLOSE)
    call(0, 1)
    assert torch.equal(call(1, 1), together), "the merged weights are still there"
    engine.load_row(1, EngineRow())
    assert merged() == [], "a slot that is loaded anew is merged anew"
    assert bench.world.count("refit") - bench.world.count("refitter") == 1


def test_refused_refit_restores_the_base_and_leaves_the_other_plans(bench: Bench) -> None:
    parts, engine = bench.parts, bench.engine(merge_after=1)
    row = parts.row((parts.random_adapter(1), 1.0))
    engine.load_row(1, row)
    inputs = parts.inputs(1)
    pristine = engine.denoise_merged(*inputs)
    bench.world.faults.refits = 1
    with capture_logs() as logs:
        out = engine.denoise(Plan.FACTORED, *inputs, torch.tensor([1]))
    assert error(out, parts.merged_output(row, *inputs)) < CLOSE, "the factored plan answered"
    assert not engine.can_merge
    assert bench.fallbacks == [Fallback.REFIT]
    assert bench.world.events.index("refit refused") < bench.world.events.index("refit")
    assert torch.equal(engine.denoise_merged(*inputs), pristine), "half an adapter was taken back"
    assert [log["event"] for log in logs] == ["merged_plan_given_up"]


def test_base_that_cannot_be_restored_is_told(bench: Bench) -> None:
    engine = bench.engine(merge_after=1)
    bench.world.faults.refits = 2
    with capture_logs() as logs, pytest.raises(TensorRtError, match="refused new weights"):
        engine.merge(1)
    assert [log["event"] for log in logs] == ["merged_plan_not_restored"]
    with pytest.raises(TensorRtError, match="no merged plan"):
        engine.merge(1)


def test_refit_while_another_stream_works_is_what_the_double_refuses(bench: Bench) -> None:
    engine = bench.engine(merge_after=1)
    bench.world.pending[7] = "somebody's call"
    with pytest.raises(AssertionError, match="work on stream"):
        engine.merge(1)


def test_lost_weights_are_named(bench: Bench) -> None:
    bench.world.faults.missing = ("conv_in.weight", "conv_out.weight")
    with pytest.raises(TensorRtError, match=r"cannot refit conv_in\.weight, conv_out\.weight \(2 in all\)") as caught:
        bench.engine(merge_after=1)
    assert caught.value.fallback is Fallback.REFIT


def test_dropped_bias_is_caught(bench: Bench) -> None:
    shutil.rmtree(bench.options.cache_dir / "tensorrt")
    bench.world.faults.drop_bias = "mid_block.attentions.0.proj_in.bias"
    engine = bench.engine(merge_after=1)
    with pytest.raises(TensorRtError, match="merged plan differs") as caught:
        verify(engine, bench.parts.base, 5e-3)
    assert (caught.value.fallback, caught.value.reason) == (Fallback.PARITY, Reason.ENGINE_PARITY)


def parse_error(world: World) -> None:
    world.faults.parse = "Unsupported operator"


def memory_error(world: World) -> None:
    world.faults.memory = True


def build_error(world: World) -> None:
    world.faults.build = "Could not find any implementation"


@pytest.mark.parametrize(
    ("fault", "reason", "told"),
    [
        (parse_error, Fallback.PARSE, r"Unsupported operator \(node mid_block/Conv_7\)"),
        (memory_error, Fallback.MEMORY, r"lower engine\.max_batch"),
        (build_error, Fallback.BUILD, "Could not find any implementation"),
    ],
)
def test_failed_build_falls_back_or_refuses(
    bench: Bench, fault: Callable[[World], None], reason: Fallback, told: str
) -> None:
    shutil.rmtree(bench.options.cache_dir / "tensorrt")
    fault(bench.world)
    with pytest.raises(TensorRtError, match=told) as caught:
        bench.build(fallback=False)
    assert caught.value.fallback is reason
    with capture_logs() as logs:
        engine = bench.build()
    assert engine.name == "torch"
    assert bench.fallbacks == [reason]
    assert [(log["reason"], log["serves"]) for log in logs if log["event"] == "engine_fallback"] == [(reason, "torch")]


def test_parity_above_the_bound_falls_back(bench: Bench) -> None:
    engine = bench.build(fp16_parity_bound=1e-7)
    assert engine.name == "torch"
    assert bench.fallbacks == [Fallback.PARITY]


def test_damaged_plan_is_built_again(bench: Bench) -> None:
    file = next((bench.options.cache_dir / "tensorrt").glob("*-dense-*/engine.plan"))
    file.write_bytes(file.read_bytes()[:-10])
    bench.engine()
    assert bench.world.count("build") == 1


@pytest.mark.parametrize(("times", "serves"), [(1, "tensorrt"), (9, "torch")])
def test_plan_that_cannot_be_loaded_is_built_once_more(bench: Bench, times: int, serves: str) -> None:
    bench.world.faults.deserialize = times
    assert bench.build().name == serves
    assert bench.world.count("build") == 2
    assert bench.fallbacks == ([] if serves == "tensorrt" else [Fallback.PLAN])


def test_refused_call_is_answered_by_torch_with_every_row(bench: Bench) -> None:
    parts, engine = bench.parts, bench.build()
    row = parts.row((parts.random_adapter(1), 1.0))
    engine.load_row(3, row)
    bench.world.faults.calls = 1
    inputs = parts.inputs(1)
    with capture_logs() as logs:
        out = engine.denoise(Plan.FACTORED, *inputs, torch.tensor([3]))
    assert error(out, parts.merged_output(row, *inputs)) < 1e-4, "torch in fp32"
    assert engine.name == "torch"
    assert bench.fallbacks == [Fallback.RUN]
    assert [log["event"] for log in logs] == ["engine_fallback", "engine_taken_over"]
    assert logs[1]["rows"] == 4
    assert engine.slots == 5
    engine.load_row(3, EngineRow())
    assert error(engine.denoise(Plan.DENSE, *inputs, torch.tensor([3])), out) > 1e-3


def test_failing_progress_ends_the_build(bench: Bench) -> None:
    class StoppedError(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("build") and done > 0:
            raise StoppedError

    shutil.rmtree(bench.options.cache_dir / "tensorrt")
    with pytest.raises(StoppedError):
        prepare_plans(make_parts(bench.world), bench.model, bench.options, stop)
    assert bench.world.count("build") == 0
    assert not list((bench.options.cache_dir / "tensorrt").glob("*/engine.plan"))


def test_without_a_gpu_torch_serves(tiny: TinyParts, tmp_path: Path) -> None:
    fallbacks: list[str] = []
    options = EngineOptions(cache_dir=tmp_path, kind="tensorrt", device="cpu", slots=3)
    with capture_logs() as logs:
        engine = build_engine(tiny.base, options, on_fallback=fallbacks.append)
    assert engine.name == "torch"
    assert fallbacks in ([Fallback.DEVICE], [Fallback.MISSING])
    assert "engine_fallback" in [log["event"] for log in logs]
    with pytest.raises(TensorRtError):
        build_engine(tiny.base, replace(options, fallback=False))
