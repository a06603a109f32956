"""The benchmark of shared steps runs at a tiny size, and its rows say what they should."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hueshift.engines.cuda_lane import HostLane
from hueshift.training.sharing.compiled import Errors

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
TINY_UNET = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
}


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """benchmarks/shared_training.py; the folder is on no path."""
    spec = importlib.util.spec_from_file_location("shared_training_benchmark", BENCHMARKS / "shared_training.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Clock:
    """Seconds that pass by being asked for: every block takes one."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Half a second later."""
        self.now += 0.5
        return self.now


def test_rows_are_whole_and_compare_what_does_the_same(benchmark: Any) -> None:
    shape = benchmark.Shape("tiny", TINY_UNET, (24, 1, 2, 16))
    about = {"hardware": "none", "versions": {}, "date": "2026-11-20", "commit": "abc"}
    compiled: list[Errors] = []

    def compiler(errors: Errors) -> Errors:
        compiled.append(errors)
        return errors

    ways = [
        benchmark.Way("", blocks=2, steps=2, clock=Clock()),
        benchmark.Way("-graph", HostLane(), None, 2, 2, Clock()),
    ]
    compiling = [benchmark.Way("-inductor", HostLane(), compiler, 2, 2, Clock())]
    rows = list(benchmark.rows(shape, torch.device("cpu"), about, companies=(3,), batches=(1, 2), chosen=ways))
    rows += benchmark.rows(shape, torch.device("cpu"), about, companies=(3,), batches=(1,), chosen=compiling)
    names = ["tiny-svdiff-factored", "tiny-svdiff-3jobs"]
    suffixes = ["", "-graph", "-batch2", "-graph-batch2", "-inductor"]
    assert [row["case"] for row in rows] == [f"{name}{suffix}" for suffix in suffixes for name in names]
    # A job alone and a company.
    assert len(compiled) == 2
    for row in rows:
        json.dumps(row)
        assert row["p20"] <= row["ms"] <= row["p80"]
        assert row["floor_ms"] > 0
        assert row["jobs_per_hour"] > 0
        assert row["baseline_jobs_per_hour"] > 0
        assert "peak_bytes" in row
    # Alone a block of two steps takes half a second.
    assert rows[0]["ms"] == rows[0]["baseline_ms"] == 250
    assert rows[0]["ratio"] == 1
    # As many operations per job, whatever the company; a batch of two has about twice as many.
    per_job = {row["case"]: row["flops"] / row.get("jobs", 1) for row in rows}
    assert per_job[names[1]] == pytest.approx(per_job[names[0]])
    assert 1.5 < per_job[f"{names[1]}-batch2"] / per_job[names[1]] < 2.5


def test_runs_that_do_not_agree_are_no_result(benchmark: Any) -> None:
    with pytest.raises(SystemExit, match="losses differ"):
        benchmark.check([1.0, 2.0], [1.0, 2.5], torch.device("cpu"))
    assert benchmark.check([1.0, 2.0], [1.0, 2.0], torch.device("cpu")) == 0
    assert benchmark.jobs_per_hour(8, 120, 100.0) == 2400
