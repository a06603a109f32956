"""The benchmarks: shipped shapes, every case runs on small weights, rows have their fields, the page is up to date."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.engines.slot_weights import choose_layers
from hueshift.kernels.bench import Case, Timing, Weight, floor_ms
from hueshift.kernels.compare import relative_error

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FIELDS = [
    *("bench", "case", "ms", "p20", "p80", "baseline", "baseline_ms"),
    *("ratio", "floor_ms", "hardware", "versions", "date", "commit"),
]


def load(name: str) -> Any:
    """Import a file of the benchmarks folder."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_gpu() -> Any:
    """The runner."""
    return load("run_gpu")


# The published sizes: parameters, matrix weights, and FLOPs of rebuilding all of them from their decomposition.
@pytest.mark.parametrize(
    ("model", "weights", "parameters", "teraflops", "floor"),
    [("sd15", 282, 859_077_120, 1.990, 2.55), ("sdxl", 794, 2_565_880_320, 6.322, 8.02)],
)
def test_shipped_shapes_are_the_published_models(
    run_gpu: Any, model: str, weights: int, parameters: int, teraflops: float, floor: float
) -> None:
    found: list[Weight] = run_gpu.read_weights(model)
    assert len(found) == weights
    assert sum(weight.rows * weight.cols for weight in found) == parameters
    assert sum(2 * w.rows * w.cols * w.rank for w in found) / 1e12 == pytest.approx(teraflops, abs=1e-3)
    total = sum(
        floor_ms(2 * w.rows * w.cols * w.rank, 2 * (w.rank * (w.rows + w.cols) + 2 * w.rows * w.cols)) for w in found
    )
    assert total == pytest.approx(floor, abs=0.01)


def test_shapes_are_what_the_generator_gives(run_gpu: Any) -> None:
    shipped = json.loads((BENCHMARKS / "shapes" / "sd15.json").read_text(encoding="utf-8"))
    generator = load("make_shapes")
    assert generator.list_weights(generator.CONFIGS["sd15"]) == shipped


def test_layers_with_weights_of_slots_are_those_that_the_engine_chooses(run_gpu: Any) -> None:
    measured = load("slot_linear")
    for model, levels, side in (("sd15", 4, 64), ("sdxl", 3, 128)):
        weights: list[Weight] = run_gpu.read_weights(model)
        layout = BaseLayout("0" * 64, tuple(MatrixLayer(w.name, w.shape) for w in weights), (), 768)
        chosen = choose_layers(layout, levels, side, 64, 2, 1 << 40)
        assert {w.name for w in weights if measured.is_large(w)} == {layer.name for layer in chosen}
        if model == "sd15":
            tokens = {w.name: prod(w.input) for w in weights}
            # The figures of docs/design.md: megabytes and GFLOP of a slot, and GFLOP a sample that they are there for.
            assert len(chosen) == 107
            assert 2 * sum(x.rows * x.cols for x in chosen) / 1e6 == pytest.approx(110, abs=0.5)
            assert 2 * sum(x.rows * x.cols * x.rank for x in chosen) / 1e9 == pytest.approx(63, abs=0.5)
            spared = sum(2 * tokens[x.name] * (x.rank * (x.rows + x.cols) - x.rows * x.cols) for x in chosen)
            assert spared / 1e9 == pytest.approx(89, abs=0.5)


SMALL = [
    Weight("conv_in", (16, 4, 3, 3), (4, 4), 1, 1),
    Weight("down.0.attentions.0.proj_in", (16, 16, 1, 1), (4, 4)),
    Weight("down.0.attn1.to_q", (16, 16), (16,)),
    Weight("down.0.attn2.to_q", (16, 16), (16,)),
    Weight("down.0.attn2.to_k", (16, 24), (7,)),
    Weight("down.0.ff.net.0.proj", (16, 16), (16,)),
    Weight("down.0.resnets.0.conv2", (16, 16, 3, 3), (4, 4), 1, 1),
    Weight("conv_out", (4, 16, 3, 3), (4, 4), 2, 1),
]


KERNELS = [
    "spectral_reassemble",
    "lowrank_merge",
    "lowrank_residual",
    "lowrank_linear",
    "factored_linear",
    "factored_conv",
    "slot_linear",
    "group_norm",
    "layer_norm",
    "gated_gelu",
    "residual_add",
    "sampler_step",
    "lag_mask",
]
# Small tiles for the interpreter, whose time goes by their number and by their size.
CONSTANTS: dict[str, dict[str, Any]] = {
    "spectral_reassemble": {"VECTOR": 8, "TMA": True, "DIRECT": True},
    "lowrank_merge": {"BLOCK_R": 16, "VECTOR": 8},
    "lowrank_residual": {"BLOCK_T": 32, "BLOCK_I": 32, "BLOCK_O": 32, "FUSED": True},
    "lowrank_linear": {"TMA": True},
    "factored_linear": {"TMA": True, "FLATTEN": False, "SECOND_CUBLAS": False},
    "factored_conv": {"TMA": True, "FLATTEN": False, "SCALED_WEIGHTS": False, "SECOND_CUBLAS": False},
    "slot_linear": {"TMA": True},
    "group_norm": {"BLOCK_P": 16, "BLOCK_C": 16, "CHUNK": 16},
    "layer_norm": {"ELEMENTS": 64},
    "gated_gelu": {"BLOCK_T": 8, "BLOCK_C": 32},
    "residual_add": {"BLOCK": 256},
    "sampler_step": {"BLOCK": 4096},
    "lag_mask": {"BLOCK_T": 32, "BLOCK_D": 16},
}


def run_once(works: Any) -> Timing:
    """Stand in for the clock: run every work once."""
    for work in works:
        work()
    return Timing(2.0, 1.0, 3.0)


def shrink(monkeypatch: pytest.MonkeyPatch, benchmark: Any, stem: str) -> None:
    """Make what a benchmark fixes for real models fit the small weights."""
    if stem == "sampler_step":
        monkeypatch.setattr(benchmark, "TOTAL_BYTES", 0.0)
    if stem in ("lag_mask", "attention"):
        monkeypatch.setattr(benchmark, "HEADS", {"sd15": 2, "sdxl": 2})


@pytest.mark.parametrize("stem", [*KERNELS, "attention"])
def test_every_benchmark_runs_and_gives_whole_rows(
    run_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stem: str
) -> None:
    pytest.importorskip("triton")
    benchmark = load(stem)
    shrink(monkeypatch, benchmark, stem)
    monkeypatch.setattr(run_gpu, "load_benchmark", lambda _: benchmark)
    status = run_gpu.main(
        [stem, "--out", str(tmp_path), "--commit", "abc"],
        device=torch.device("cpu"),
        timer=run_once,
        weights=lambda model: SMALL,
    )
    assert status == 0
    rows = [json.loads(line) for line in (tmp_path / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["case"].partition("-")[0] for row in rows} >= {"sd15", "sdxl"}
    assert len({row["case"] for row in rows}) == len(rows)
    for row in rows:
        assert row["bench"] == stem
        assert [field for field in FIELDS if field not in row] == []
        assert row["floor_ms"] > 0 or row["floor_share"] == 0
        assert (row["hardware"], row["commit"], row["ms"], row["p20"], row["p80"]) == ("CPU", "abc", 2.0, 1.0, 3.0)


def interpreted_sweep(stem: str) -> dict[str, float]:
    """Sweep one small configuration with the kernels interpreted; return the cases and those of them that failed."""
    from hueshift.kernels import launch_table, lowrank_merge, spectral_plan
    from hueshift.kernels.launch_table import LaunchConfig

    benchmark, runner = load(stem), load("run_gpu")
    blocks = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    config = LaunchConfig({**blocks, **CONSTANTS[stem]}, 4, 2, 1, "")

    def plan_spectral(layers: Any, *, config: Any) -> Any:
        plan = spectral_plan.plan_spectral(layers)
        return replace(plan, tables=spectral_plan.build_tables(layers, plan.row_size, config))

    def plan_merge(layers: Any, *, config: Any) -> Any:
        return replace(lowrank_merge.plan_merge(layers), tables=lowrank_merge.build_tables(layers, config))

    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch, benchmark, stem)
        for holder in (benchmark, launch_table):
            if hasattr(holder, "candidates"):
                monkeypatch.setattr(holder, "candidates", lambda arch, kernel, shape_class="any": (config,))
        # On a CPU plans have no tables and take the reference; with tables they take the kernels.
        for name, function in (("plan_spectral", plan_spectral), ("plan_merge", plan_merge)):
            if hasattr(benchmark, name):
                monkeypatch.setattr(benchmark, name, function)
        if stem == "sampler_step":
            monkeypatch.setattr(benchmark, "SIZES", (("sd15", 2, 8),))
        monkeypatch.setattr(runner, "load_benchmark", lambda _: benchmark)
        run = runner.Run(torch.device("cpu"), run_once, {}, True)
        rows = list(runner.measure_stem(stem, {"sd15": SMALL}, run))
    return {"rows": float(len(rows)), "failed": float(len(run.failed))}


@pytest.mark.parametrize("stem", KERNELS)
def test_every_sweep_runs_the_kernels_and_checks_them(interpret: Callable[..., dict[str, float]], stem: str) -> None:
    found = interpret(__file__, "interpreted_sweep", stem=stem)
    assert found["failed"] == 0
    assert found["rows"] >= 1


def test_a_wrong_result_is_not_timed_and_costs_no_other_case_its_turn(
    run_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    benchmark = load("lowrank_merge")
    right = list(benchmark.cases({"sd15": SMALL}, torch.device("cpu"), False))
    with pytest.raises(run_gpu.WrongResultError, match="is over"):
        run_gpu.measure("lowrank_merge", replace(right[0], check=lambda: float("nan")), {}, run_once)
    cases = [replace(right[0], check=lambda: float("nan")), right[1]]
    monkeypatch.setattr(benchmark, "cases", lambda *_: iter(cases))
    monkeypatch.setattr(run_gpu, "load_benchmark", lambda _: benchmark)
    options = {"device": torch.device("cpu"), "timer": run_once, "weights": lambda model: SMALL}
    assert run_gpu.main(["lowrank_merge", "--out", str(tmp_path)], **options) == 1
    assert "1 failed: lowrank_merge sd15" in capsys.readouterr().err
    assert len((tmp_path / "lowrank_merge.jsonl").read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.parametrize("stem", ["lowrank_merge", "shared_training"])
def test_a_benchmark_that_cannot_be_made_costs_no_other_its_turn(
    run_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], stem: str
) -> None:
    pytest.importorskip("triton")

    def refuse(_: int) -> object:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def fail(*_: object) -> Iterator[object]:
        return map(refuse, [1])

    right = list(load("lowrank_merge").cases({"sd15": SMALL}, torch.device("cpu"), False))[:1]
    whole = SimpleNamespace(cases=lambda *_: iter(right))
    broken = SimpleNamespace(cases=fail, rows=fail, SHAPES={"sd15": None})
    monkeypatch.setattr(run_gpu, "load_benchmark", lambda name: broken if name == stem else whole)
    options = {"device": torch.device("cpu"), "timer": run_once, "weights": lambda model: SMALL}
    assert run_gpu.main([stem, "sampler_step", "--models", "sd15", "--out", str(tmp_path)], **options) == 1
    assert f"1 failed: {stem}" in capsys.readouterr().err
    assert (tmp_path / "sampler_step.jsonl").read_text(encoding="utf-8")


def test_what_configurations_compile_to_is_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    resources = load("compiled_resources")
    assert sorted(resources.VARIANTS) == sorted(KERNELS)
    out = tmp_path / "rows.jsonl"
    assert resources.main(["sampler_step", "--arch", "sm_90", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "0 of them spill" in shown
    first = json.loads(out.read_text(encoding="utf-8").splitlines()[0])
    assert first["spilled_bytes"] == 0
    assert 16 <= first["registers"] <= 64
    assert first["st"] == "16Bx2"
    with pytest.raises(SystemExit):
        resources.main(["nothing"])


def test_without_a_gpu_the_runner_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    command = [sys.executable, "-P", str(BENCHMARKS / "run_gpu.py")]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "skipped" in found.stdout
    assert "make bench-gpu" in found.stdout
    assert "compiled_resources.py" in found.stdout
    wrong = subprocess.run([*command, "nothing"], capture_output=True, text=True, check=False, timeout=120)
    assert wrong.returncode == 2
    assert "no benchmark 'nothing'" in wrong.stderr


def test_the_runner_says_which_half_of_a_gpu_is_missing(run_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert run_gpu.what_is_missing(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, said in ((None, "is built without CUDA"), ("13.0", "for CUDA 13.0, finds no device")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert said in run_gpu.what_is_missing(None)
    monkeypatch.setattr(run_gpu, "triton", None)
    assert run_gpu.what_is_missing(None) == "Triton is not installed"


def test_each_benchmark_has_its_process_and_kernels_come_first(
    run_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    started: list[list[str]] = []

    def start(command: list[str], *, check: bool) -> SimpleNamespace:
        assert not check
        started.append(command[3:])
        # A process that an illegal access ended.
        return SimpleNamespace(returncode=-6 if "lowrank_merge" in command else 0)

    monkeypatch.setattr(run_gpu, "what_is_missing", lambda device: None)
    monkeypatch.setattr(run_gpu.subprocess, "run", start)
    stems = ["attach", "shared_training", "unet_step", "sampler_step", "lowrank_merge"]
    common = ["--out", str(tmp_path), "--commit", "abc", "--models", "sd15"]
    assert run_gpu.main([*stems, *common]) == 1
    groups = [["lowrank_merge"], ["sampler_step"], ["unet_step", "attach"], ["shared_training"]]
    assert started == [[*group, *common] for group in groups]
    assert "1 of 4 processes failed: lowrank_merge (status -6)" in capsys.readouterr().err
    started.clear()
    assert run_gpu.main(["--sweep", "--out", str(tmp_path), "--commit", "abc"]) == 1
    assert [command[0] for command in started] == [*KERNELS, "attention"]
    assert all(command[-1] == "--sweep" for command in started)


def test_the_share_of_a_step_is_what_a_call_takes_beyond_its_dense_layers(run_gpu: Any) -> None:
    pytest.importorskip("triton")
    work, baseline, dense = (partial(float, number) for number in (3.0, 6.0, 2.5))

    def clock(works: Any) -> Timing:
        return Timing(works[0](), 0.0, 0.0)

    case = Case("sd15", [work], "", [baseline], 0.0, 0.0, 1.0, lambda: 0.0, 1.0, {"step_ms": 10.0})
    assert run_gpu.measure("stem", case, {}, clock)["share_of_step"] == 0.3
    row = run_gpu.measure("stem", replace(case, dense=dense), {}, clock)
    assert (row["share_of_step"], row["over_dense"], row["dense_ms"]) == (0.05, 0.2, 2.5)
    assert "step_ms" not in row
    assert load("report").cost(row) == "+20.0% over the layers dense, 5.0% of the UNet step"


def test_a_baseline_makes_what_the_kernel_makes() -> None:
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    merge = load("lowrank_merge")
    weights = [Weight("attn1.to_q", (24, 40), (1,)), Weight("attn1.to_k", (16, 8), (1,))]
    bases = [torch.randn(weight.shape).half() * 0.02 for weight in weights]
    plan = merge.plan_merge([merge.MergeLayer(base, torch.empty_like(base)) for base in bases])
    mix = merge.mix_adapters(plan, [merge.make_adapter(weights, cpu) for _ in range(3)])
    scales = torch.tensor([0.5, -1.0, 2.0])
    merge.lowrank_merge(plan, mix, scales)
    want = [layer.out.clone() for layer in plan.layers]
    merge.addmm_all(plan, *merge.side_by_side(plan, mix), scales)
    for layer, base, out in zip(plan.layers, bases, want, strict=True):
        assert relative_error(out, base) > 0.01
        assert relative_error(layer.out, out) <= 8e-4
    norm = load("layer_norm")
    call = norm.Norms([Weight("attn1.to_q", (16, 16), (16,))], cpu).calls[0]
    assert relative_error(norm.norm_in_torch(**call), norm.layer_norm(**call)) <= 2e-3


def test_the_page_is_what_the_rows_give() -> None:
    report = load("report")
    assert report.PAGE.read_text(encoding="utf-8") == report.render(report.RESULTS), "run benchmarks/report.py"


def test_the_page_takes_the_newest_row_of_a_case(tmp_path: Path) -> None:
    report = load("report")
    rows = [
        {"bench": "lowrank_merge", "case": "sd15", "ms": 0.2, "baseline": "addmm", "baseline_ms": 0.4, "ratio": 2.0},
        {"bench": "lowrank_merge", "case": "sd15", "ms": 0.125, "share_of_step": 0.031, "versions": {"torch": "2"}},
    ]
    (tmp_path / "lowrank_merge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "serve.jsonl").write_text(json.dumps({"case": "mixed", "over_dense": 0.12}) + "\n", encoding="utf-8")
    page = report.render(tmp_path)
    assert "0.125" in page
    assert "| 0.2 " not in page
    assert "3.1% of the UNet step" in page
    assert "+12.0% over the layers dense" in page
    assert "## serve" in page
    assert page.count("Not yet measured.") == len(report.TARGETS) - 1
