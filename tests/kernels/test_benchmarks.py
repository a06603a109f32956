"""The benchmarks: shipped shapes, every case runs on small weights, rows have their fields, the page is up to date."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hueshift.kernels.bench import Timing, Weight, floor_ms

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


SMALL = [
    Weight("conv_in", (16, 4, 3, 3), (4, 4), 1, 1),
    Weight("down.0.attentions.0.proj_in", (16, 16, 1, 1), (4, 4)),
    Weight("down.0.attn1.to_q", (16, 16), (16,)),
    Weight("down.0.attn2.to_q", (16, 16), (16,)),
    Weight("down.0.attn2.to_k", (16, 24), (7,)),
    Weight("conv_out", (4, 16, 3, 3), (4, 4), 2, 1),
]


@pytest.mark.parametrize(
    "stem",
    [
        "spectral_reassemble",
        "lowrank_merge",
        "lowrank_residual",
        "factored_linear",
        "factored_conv",
        "sampler_step",
        "lag_mask",
    ],
)
def test_every_benchmark_runs_and_gives_whole_rows(run_gpu: Any, monkeypatch: pytest.MonkeyPatch, stem: str) -> None:
    torch.manual_seed(0)
    benchmark = load(stem)
    if stem == "sampler_step":
        monkeypatch.setattr(benchmark, "TOTAL_BYTES", 0.0)
    if stem == "lag_mask":
        monkeypatch.setattr(benchmark, "HEADS", {"sd15": 2, "sdxl": 2})

    def run_once(works: Any, replays: int = 1) -> Timing:
        for work in works:
            work()
        return Timing(2.0, 1.0, 3.0)

    monkeypatch.setattr(run_gpu, "time_in_graph", run_once)
    about = {"hardware": "none", "versions": {}, "date": "2026-11-20", "commit": "abc"}
    rows = [
        run_gpu.measure(stem, case, about)
        for case in benchmark.cases({"sd15": SMALL, "sdxl": SMALL}, torch.device("cpu"), False)
    ]
    assert {row["case"] for row in rows} >= {"sd15", "sdxl"}
    assert len({row["case"] for row in rows}) == len(rows)
    for row in rows:
        assert row["bench"] == stem
        assert [field for field in FIELDS if field not in row] == []
        assert row["floor_ms"] > 0 or row["floor_share"] == 0
        json.dumps(row)


def test_a_wrong_result_is_not_timed(run_gpu: Any) -> None:
    case = next(iter(load("lowrank_merge").cases({"sd15": SMALL}, torch.device("cpu"), False)))
    with pytest.raises(SystemExit, match="is over"):
        run_gpu.measure("lowrank_merge", replace(case, check=lambda: float("nan")), {})


def test_without_a_gpu_the_runner_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    command = [sys.executable, "-P", str(BENCHMARKS / "run_gpu.py")]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "skipped" in found.stdout
    wrong = subprocess.run([*command, "nothing"], capture_output=True, text=True, check=False, timeout=120)
    assert wrong.returncode == 2
    assert "no benchmark 'nothing'" in wrong.stderr


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
