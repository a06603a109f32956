"""The engine's benchmarks run whole, on a tiny model on the CPU, and give rows that the page can show."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from recording_tensorrt import make_parts
from tensorrt_world import World

from hueshift.engines.base_model import read_layout
from hueshift.engines.interface import BASE_SLOT

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ABOUT = {"hardware": "none", "versions": {"torch": "2"}, "date": "2026-11-20", "commit": "abc"}

pytestmark = pytest.mark.usefixtures("one_thread")


def load(name: str) -> Any:
    """Import a file of the benchmarks folder."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny kit."""
    return load("engine_kit").tiny_kit(tmp_path_factory.mktemp("costs"), ABOUT)


@pytest.fixture(scope="module")
def xl_kit(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SDXL's tiny kit."""
    return load("engine_kit").tiny_kit(tmp_path_factory.mktemp("xl_costs"), ABOUT, "tinyxl")


@pytest.mark.parametrize(
    ("stem", "cases"),
    [
        (
            "unet_step",
            {"tiny-dense-b2-graph", "tiny-factored-b4-graph", "tiny-full-b4-graph", "tiny-merged-b2-graph"},
        ),
        ("attach", {"tiny-spectral-slot", "tiny-lowrank-rows", "tiny-spectral-host", "tiny-lowrank-file"}),
        ("serve_mixed", {"tiny-2tenants-zipf-spectral-3adapters", "tiny-1tenants-zipf-lowrank-3adapters"}),
    ],
)
# peft tells of layers that diffusers fuses back, and diffusers of defaults: theirs, not ours.
@pytest.mark.filterwarnings("ignore")
def test_every_benchmark_gives_whole_rows(kit: Any, tmp_path: Path, stem: str, cases: set[str]) -> None:
    rows = load("run_gpu").run_engine(stem, kit, tmp_path)
    found = {row["case"] for row in rows if row["bench"] == stem}
    assert cases <= found
    assert len(found) == sum(row["bench"] == stem for row in rows)
    stored = [json.loads(line) for line in (tmp_path / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert stored == [row for row in rows if row["bench"] == stem]
    for row in rows:
        assert row["hardware"] == "none"
        if row["bench"] == "serve_mixed":
            assert min(row["images_per_s"], row["ratio_a_fuse"], row["ratio_c_swap_per_user"]) > 0
            assert row["p50_s"] <= row["p99_s"]
            # A call is a part of its round, so the loop cannot have taken less.
            assert 0 <= row["overhead"] < 100
        elif row["bench"] == "unet_profile":
            shares = ("gemm", "convolution", "attention", "elementwise", "other", "gaps")
            assert sum(row[name] for name in shares) == pytest.approx(1, abs=1e-3)
        else:
            assert 0 < row["p20"] <= row["ms"] <= row["p80"]
    page = load("report").render(tmp_path)
    assert all(case in page for case in cases)


@pytest.mark.parametrize(
    ("stem", "cases"),
    [
        ("unet_step", {f"tinyxl-{plan}-b2-graph" for plan in ("dense", "factored", "full", "merged")}),
        ("attach", {"tinyxl-spectral-slot", "tinyxl-lowrank-rows"}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_sdxl_has_its_rows(xl_kit: Any, tmp_path: Path, stem: str, cases: set[str]) -> None:
    assert xl_kit.base.xl is not None
    assert cases <= {row["case"] for row in load("run_gpu").run_engine(stem, xl_kit, tmp_path)}


def test_the_full_scale_of_sdxl_is_the_published_model() -> None:
    kit, run_gpu = load("engine_kit"), load("run_gpu")
    with torch.device("meta"):
        layout = read_layout(UNet2DConditionModel(**kit.FULL_XL.unet), "", 2048)
    assert [(layer.name, layer.weight_shape) for layer in layout.matrices] == [
        (weight.name, weight.shape) for weight in run_gpu.read_weights("sdxl")
    ]
    assert len(layout.matrices) == 794


def test_models_of_the_engine_are_chosen_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_gpu, ran = load("run_gpu"), []
    monkeypatch.setattr(run_gpu, "run_engine", lambda stem, kit, folder: ran.append((stem, kit.scale.name)))

    def run(*arguments: str) -> list[tuple[str, str]]:
        ran.clear()
        given = [*arguments, "--out", str(tmp_path), "--commit", "abc"]
        assert run_gpu.main(given, device=torch.device("cpu"), weights=lambda model: []) == 0
        return list(ran)

    assert run("unet_step") == [("unet_step", "sd15")]
    assert run("unet_step", "serve_mixed", "--models", "sdxl") == [("unet_step", "sdxl")]
    assert "sdxl: serve_mixed left out" in capsys.readouterr().out
    assert run("attach", "--models", "sd15", "sdxl") == [("attach", "sd15"), ("attach", "sdxl")]


def test_requests_of_a_full_queue_wait_for_each_other() -> None:
    serve_mixed = load("serve_mixed")
    assert serve_mixed.closed_loop([1.0] * 6, 1) == [1.0] * 5
    assert serve_mixed.closed_loop([1.0] * 8, 4) == [4.0] * 4
    assert max(serve_mixed.zipf(3, 100)) < 3
    drawn = serve_mixed.zipf(1000, 2000)
    assert drawn.count(0) > 5 * drawn.count(10) > 0


def test_kernels_are_sorted_by_name() -> None:
    classify = load("unet_step").classify_kernel
    names = {
        "pytorch_flash::flash_fwd_kernel": "attention",
        "sm90_xmma_fprop_implicit_gemm_f16f16": "convolution",
        "cutlass_80_tensorop_f16_s16816gemm": "gemm",
        "_product_kernel": "gemm",
        "void at::native::vectorized_elementwise_kernel": "elementwise",
        "triton_poi_fused_silu_3": "elementwise",
        "_moments_kernel": "elementwise",
        "_factors_kernel": "elementwise",
        "_apply_kernel": "elementwise",
        "_gelu_kernel": "elementwise",
        "_add_kernel": "elementwise",
        "something": "other",
    }
    assert {name: classify(name) for name in names} == names


def test_tensorrt_gets_a_row_for_every_plan_and_the_refit(kit: Any) -> None:
    benchmark = load("tensorrt_step")
    engine = benchmark.make_engine(make_parts(World()), kit)
    rows = {row["case"]: row for row in benchmark.measure(kit, engine)}
    plans = {f"tiny-{plan}-b{count}" for plan in ("dense", "factored", "merged") for count in kit.scale.rows}
    assert rows.keys() == plans | {"tiny-refit"}
    for row in rows.values():
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
    assert all(rows[name]["ratio"] > 0 for name in plans)
    assert engine.merged_slot not in (None, BASE_SLOT), "refits were timed with an adapter"


def test_where_tensorrt_is_missing_nothing_is_measured(kit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(load("tensorrt_step").rows(kit)) == []
    assert "Nothing was measured" in capsys.readouterr().out
