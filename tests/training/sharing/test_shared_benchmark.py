"""The benchmark of shared steps runs at a tiny size, and its rows say what they should."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from hueshift.engines.cuda_lane import HostLane
from hueshift.training.sharing.compiled import Errors
from hueshift.training.sharing.shared_training import SharedTraining

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


def load(stem: str) -> Any:
    """benchmarks/STEM.py; the folder is on no path."""
    spec = importlib.util.spec_from_file_location(f"{stem}_benchmark", BENCHMARKS / f"{stem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """The benchmark of the ways without a compiler."""
    return load("shared_training")


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
    ways = [
        benchmark.Way("", blocks=2, steps=2, clock=Clock()),
        benchmark.Way("-graph", HostLane(), None, 2, 2, Clock()),
    ]
    rows = list(benchmark.rows(shape, torch.device("cpu"), about, companies=(3,), batches=(1, 2), chosen=ways))
    names = ["tiny-svdiff-factored", "tiny-svdiff-3jobs"]
    suffixes = ["", "-graph", "-batch2", "-graph-batch2"]
    assert [row["case"] for row in rows] == [f"{name}{suffix}" for suffix in suffixes for name in names]
    for row in rows:
        json.dumps(row)
        assert row["p20"] <= row["ms"] <= row["p80"]
        assert row["floor_ms"] > 0
        assert row["jobs_per_hour"] > 0
        assert row["baseline_jobs_per_hour"] > 0
        assert row["plain_jobs_per_hour"] > 0
        assert "peak_bytes" in row
    # Alone a block of two steps takes half a second.
    assert rows[0]["ms"] == rows[0]["baseline_ms"] == 250
    assert rows[0]["ratio"] == 1
    # As many operations per job, whatever the company; a batch of two has about twice as many.
    per_job = {row["case"]: row["flops"] / row.get("jobs", 1) for row in rows}
    assert per_job[names[1]] == pytest.approx(per_job[names[0]])
    assert 1.5 < per_job[f"{names[1]}-batch2"] / per_job[names[1]] < 2.5


def test_all_jobs_are_in_every_step(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SharedTraining] = []

    def make(*args: Any, **given: Any) -> SharedTraining:
        made.append(SharedTraining(*args, **given))
        return made[-1]

    monkeypatch.setattr(benchmark, "SharedTraining", make)
    shape = benchmark.Shape("tiny", TINY_UNET, (24, 1, 2, 16))
    ways = [benchmark.Way("", blocks=2, steps=3)]
    list(benchmark.rows(shape, torch.device("cpu"), {}, companies=(4,), batches=(1,), chosen=ways))
    [sharing] = made
    assert dict(sharing.rounds) == {4: benchmark.WARM_STEPS + 6}


def test_compiled_steps_are_measured_apart() -> None:
    benchmark = load("compiled_training")
    compiled: list[Errors] = []

    def compiler(errors: Errors) -> Errors:
        compiled.append(errors)
        return errors

    shape = benchmark.SHARED.Shape("tiny", TINY_UNET, (24, 1, 2, 16))
    ways = [benchmark.SHARED.Way("-inductor", HostLane(), compiler, 2, 2, Clock())]
    rows = list(benchmark.rows(shape, torch.device("cpu"), {}, chosen=ways))
    assert [row["case"] for row in rows] == ["tiny-svdiff-factored-inductor", "tiny-svdiff-8jobs-inductor"]
    assert {row["bench"] for row in rows} == {"compiled_training"}
    # A job alone and the company.
    assert len(compiled) == 2


def test_a_way_that_fails_costs_no_other_its_rows(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> NoReturn:
        raise torch.OutOfMemoryError("no room")

    class Broken(HostLane):
        @contextmanager
        def running(self) -> Iterator[None]:
            yield refuse()

    shape = benchmark.Shape("tiny", TINY_UNET, (24, 1, 2, 16))
    ways = [benchmark.Way("-graph", Broken(), None, 2, 2), benchmark.Way("", blocks=2, steps=2)]
    found: list[str] = []
    rows = benchmark.rows(shape, torch.device("cpu"), {}, companies=(), batches=(1,), chosen=ways)
    with pytest.raises(RuntimeError, match="not all measured: batch 1-graph"):
        found.extend(row["case"] for row in rows)
    assert found == ["tiny-svdiff-factored"]
    assert "no room" in capsys.readouterr().err


def test_runs_that_do_not_agree_are_no_result(benchmark: Any) -> None:
    with pytest.raises(RuntimeError, match="losses differ"):
        benchmark.check([1.0, 2.0], [1.0, 2.5], torch.device("cpu"))
    assert benchmark.check([1.0, 2.0], [1.0, 2.0], torch.device("cpu")) == 0
    assert benchmark.jobs_per_hour(8, 120, 100.0) == 2400
