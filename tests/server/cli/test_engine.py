"""`hueshift engine`: what can be said of plans without a GPU, and what is told where there is none."""

import json
from pathlib import Path

import pytest

from hueshift.engines.tensorrt_plans import PlanCache, PlanIdentity, PlanRanges
from hueshift.server.cli.main import main


def identity(role: str) -> PlanIdentity:
    ranges = PlanRanges(16, (2, 16, 128), 64)
    flags = ("level=3", *(("refit-individual", "conv_in.weight") if role == "merged" else ()))
    return PlanIdentity(role, "ab" * 32, "cd" * 32, "tensorrt", "10.16.1", "NVIDIA H200", "9.0", ranges, flags)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanCache:
    """A cache folder with a dense and a merged plan, which the settings name."""
    monkeypatch.setenv("HUESHIFT_STORE__CACHE_PATH", str(tmp_path))
    cache = PlanCache(tmp_path)
    cache.store(identity("dense"), b"d" * 2000, [])
    cache.store(identity("merged"), b"m" * 3000, [{"name": "conv_in.weight", "layer": "conv_in"}])
    return cache


def run(*arguments: str) -> int:
    return main(["engine", *arguments])


def test_list_shows_what_each_plan_is_for(cache: PlanCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(plan["role"], plan["bytes"], plan["version"]) for plan in shown] == [
        ("dense", 2000, "10.16.1"),
        ("merged", 3000, "10.16.1"),
    ]
    assert run("list") == 0
    assert "NVIDIA H200 (9.0)" in capsys.readouterr().out


def test_inspect_tells_the_map_and_the_damage(cache: PlanCache, capsys: pytest.CaptureFixture[str]) -> None:
    merged = identity("merged").key
    assert run("inspect", merged, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["weights"] == [{"name": "conv_in.weight", "layer": "conv_in"}]
    assert shown["problem"] == ""
    cache.named(merged).file.write_bytes(b"cut")
    assert run("inspect", merged) == 1
    assert "digest does not fit" in capsys.readouterr().out
    assert run("inspect", "nothing") == 1
    assert identity("dense").key in capsys.readouterr().err


def test_prune_removes_what_is_damaged_or_not_kept(cache: PlanCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"removed": [], "bytes": 0}
    cache.named(identity("dense").key).file.write_bytes(b"cut")
    assert run("prune") == 0
    assert "removed 1 of 2 plans" in capsys.readouterr().out
    cache.store(identity("dense"), b"d" * 2000, [])
    assert run("prune", "--keep", identity("merged").key) == 0
    assert [plan.key for plan in cache.plans()] == [identity("merged").key]
    assert run("prune", "--all") == 0
    assert cache.plans() == []
    assert not cache.folder.exists()


@pytest.mark.parametrize("command", ["build", "verify"])
def test_without_a_gpu_it_says_so(cache: PlanCache, capsys: pytest.CaptureFixture[str], command: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here: nothing is missing")
    assert run(command) == 1
    assert "engine.kind is tensorrt" in capsys.readouterr().err
