"""`hueshift adapters combine`: what it asks a server, and what it makes of files alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_service import FakeServer

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.validate import FileLimits
from hueshift.engines.base_model import BaseModel
from hueshift.models.embedded import EMBEDDED_MODEL

Run = Callable[..., Any]
LAYERS = ("down_blocks.2.resnets.0.conv1", "up_blocks.0.resnets.0.conv1")


def adapter(base: BaseModel, value: float, word: str) -> Adapter:
    sizes = {layer.name: layer.rank for layer in base.layout.matrices}
    shifts = {name: torch.full((sizes[name],), value) for name in LAYERS}
    tokens = {word: torch.full((1, base.layout.token_width), value)}
    return Adapter(AdapterKind.SPECTRAL, base.base_hash, "svdiff", spectral=shifts, tokens=tokens)


@pytest.fixture
def files(base_model: BaseModel, tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "fox.safetensors", tmp_path / "ink.safetensors"
    for path, value, word in zip(paths, (1.0, 3.0), ("fox", "ink"), strict=True):
        path.write_bytes(write_adapter(adapter(base_model, value, word)))
    return paths


def test_a_server_is_asked_for_each_operation(fake: FakeServer, run: Run) -> None:
    stored = ("--name", "both", "--display-name", "Both", "--label", "a=b")
    ran = run("adapters", "combine", "sum", "fox:0.5", "ink@2:structure=1,mid_block=0.5", *stored)
    assert ran.code == 0
    assert "both" in ran.out
    assert "its rank is not served" in ran.err
    assert run("adapters", "combine", "interpolate", "fox", "ink@3", "--position", 0.25).code == 0
    words = ("mix-blocks", "fox", "ink", "--block", "mid_block", "--block", "up_blocks.1", "--json")
    assert run("adapters", "combine", *words).json["method"] == "combine"
    added, between, mixed = fake.service.seen["CombineAdapters"]
    assert (added.adapter_id, added.display_name, dict(added.labels)) == ("both", "Both", {"a": "b"})
    assert [(use.adapter, use.revision, use.weight, dict(use.block_weights)) for use in added.sum.parts] == [
        ("fox", 0, 0.5, {}),
        ("ink", 2, 1.0, {"structure": 1.0, "mid_block": 0.5}),
    ]
    assert (between.interpolation.second.revision, between.interpolation.position) == (3, 0.25)
    assert list(mixed.block_mix.blocks) == ["mid_block", "up_blocks.1"]


def test_wrong_words_are_wrong_usage(fake: FakeServer, run: Run, tmp_path: Path) -> None:
    assert run("adapters", "combine", "interpolate", "fox@x", "ink").code == 2
    assert run("adapters", "combine", "sum", "fox:a:b:c").code == 2
    assert run("adapters", "combine", "sum", "fox@2", "--out", tmp_path / "x").code == 2
    assert not fake.service.seen["CombineAdapters"]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("sum", "{0}:0.5", "{1}:structure=2"), (0.5 + 6, 0.5)),
        (("interpolate", "{0}", "{1}", "--position", "0.25"), (1.5, 1.5)),
        (("mix-blocks", "{0}", "{1}"), (1.0, 3.0)),
        (("mix-blocks", "{0}", "{1}", "--block", "up_blocks"), (3.0, 1.0)),
    ],
)
def test_files_are_combined_without_a_server(
    fake: FakeServer,
    run: Run,
    base_model: BaseModel,
    files: tuple[Path, Path],
    tmp_path: Path,
    words: tuple[str, ...],
    values: tuple[float, float],
) -> None:
    out = tmp_path / "new" / "mixed.safetensors"
    given = [word.format(*files) for word in words]
    ran = run("adapters", "combine", *given, "--out", out, "--model", EMBEDDED_MODEL, "--json")
    assert ran.code == 0
    assert (ran.json["kind"], ran.json["words"]) == ("spectral", ["fox", "ink"])
    combined = read_adapter(out, base_model.layout, FileLimits())
    assert tuple(combined.spectral[name][0].item() for name in LAYERS) == values
    assert not fake.service.seen["CombineAdapters"]


def test_files_that_do_not_go_together_say_why(run: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    ran = run("adapters", "combine", "sum", f"{files[0]}:sideways=1", "--out", tmp_path / "x")
    assert ran.code == 1
    assert "no layer's name begins so" in ran.err
    ran = run("adapters", "combine", "interpolate", files[0], tmp_path / "none", "--out", tmp_path / "x")
    assert ran.code == 1
    assert not (tmp_path / "x").exists()
