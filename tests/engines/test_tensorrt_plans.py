"""Plan files: found by all that decides them, refused when damaged, never half written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.tensorrt_plans import PlanCache, PlanIdentity, PlanRanges

IDENTITY = PlanIdentity(
    role="dense",
    base="ab" * 32,
    graph="cd" * 32,
    library="tensorrt",
    version="10.16.1",
    gpu="Imagined GPU",
    capability="9.9",
    ranges=PlanRanges(4, (8, 16, 32), 64),
    flags=("level=3",),
)


def test_stored_plan_is_found_and_keeps_its_map(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    assert cache.find(IDENTITY) is None
    with cache.lock(IDENTITY):
        cache.store(IDENTITY, b"plan", [{"name": "conv_in.weight", "layer": "conv_in"}])
    plan = cache.find(IDENTITY)
    assert plan is not None
    assert plan.file.read_bytes() == b"plan"
    assert plan.weights == [{"name": "conv_in.weight", "layer": "conv_in"}]
    assert [found.key for found in cache.plans()] == [IDENTITY.key]


@pytest.mark.parametrize(
    "change",
    [
        {"version": "10.16.2"},
        {"gpu": "Another GPU"},
        {"capability": "8.0"},
        {"graph": "ce" * 32},
        {"ranges": PlanRanges(8, (8, 16, 32), 64)},
        {"ranges": PlanRanges(4, (8, 16, 32), 65)},
        {"flags": ("level=3", "refit-individual")},
        {"role": "merged"},
        {"library": "tensorrt_rtx"},
    ],
)
def test_another_identity_is_another_plan(tmp_path: Path, change: dict[str, Any]) -> None:
    cache = PlanCache(tmp_path)
    cache.store(IDENTITY, b"plan", [])
    other = replace(IDENTITY, **change)
    assert other.key != IDENTITY.key
    assert cache.find(other) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "manifest", "foreign"])
def test_damaged_plan_is_refused_with_a_word(tmp_path: Path, damage: str) -> None:
    cache = PlanCache(tmp_path)
    plan = cache.store(IDENTITY, b"a plan of some length", [])
    manifest = plan.file.with_name("manifest.json")
    if damage == "cut":
        plan.file.write_bytes(b"a plan")
    elif damage == "flipped":
        plan.file.write_bytes(b"A plan of some length")
    elif damage == "gone":
        plan.file.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        content = json.loads(manifest.read_text())
        content["identity"]["gpu"] = "Another GPU"
        manifest.write_text(json.dumps(content))
    with capture_logs() as logs:
        assert cache.find(IDENTITY) is None
    assert [log["event"] for log in logs] == ["plan_refused"]
    cache.store(IDENTITY, b"built again", [])
    assert cache.find(IDENTITY) is not None


def test_plans_are_named_by_any_beginning(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    cache.store(IDENTITY, b"plan", [])
    merged = replace(IDENTITY, role="merged")
    cache.store(merged, b"plan", [])
    assert cache.named(merged.key[:16]).key == merged.key
    with pytest.raises(InvalidArgument, match="fits 2 plans"):
        cache.named("ab")
    cache.remove(merged.key)
    assert cache.named("ab").key == IDENTITY.key


def test_timing_cache_comes_back(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    name = "tensorrt-10.16.1-NVIDIA H200/x"
    assert cache.read_timing(name) == b""
    cache.write_timing(name, b"timed")
    assert cache.read_timing(name) == b"timed"
    assert cache.plans() == []
