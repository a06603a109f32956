"""Adapter files on the command line: conversion reports, other forms, and looking at files without a server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fake_service import FakeServer
from small_adapters import lowrank_adapter, spectral_adapter

from hueshift.adapters.file import write_adapter
from hueshift.v1 import adapters_pb2 as pb

Run = Callable[..., Any]
REPORT = pb.ImportReport(
    format="kohya",
    layers=[
        pb.ImportedLayer(layer="a", form="lora", rank=4),
        pb.ImportedLayer(layer="b", form="loha", rank=16, error=0.25),
        pb.ImportedLayer(layer="n", form="norm"),
    ],
    words=["sks"],
    error=0.1,
    left_out=[pb.LeftOut(count=2, keys=["lora_te_x"], reason="it changes the text encoder")],
    notes=["bound by its shapes"],
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "any-name.bin"
    path.write_bytes(write_adapter(lowrank_adapter()))
    return path


def test_an_import_shows_its_report(fake: FakeServer, run: Run, file: Path) -> None:
    fake.service.report = REPORT
    words = ("adapters", "import", file, "--rank", 16, "--word", "sks", "--served-only", "--complete")
    shown = run(*words)
    assert shown.code == 0
    for told in ("1 loha, 1 lora, 1 norm", "4 (1 layers), 16 (1 layers)", "10.00% of the change; 99.00% of its energy"):
        assert told in shown.out
    for told in ("b (25.00%)", "2 tensors: it changes the text encoder (lora_te_x, ...)", "bound by its shapes", "sks"):
        assert told in shown.out
    spec = fake.service.seen["ImportAdapter"][0][0].spec
    assert (spec.rank, spec.word, spec.served_only, spec.complete) == (16, "sks", True, True)
    run("adapters", "import", file, "--dense")
    assert fake.service.seen["ImportAdapter"][-1][0].spec.dense
    report = run(*words, "--json").json["report"]
    assert (report["error"], report["layers"][1]["error"], report["left_out"][0]["count"]) == (0.1, 0.25, 2)
    fake.service.report = pb.ImportReport(format="peft", layers=[pb.ImportedLayer(layer="a", form="lora", rank=1)])
    assert "none" in run(*words).out
    fake.service.report = None
    assert run(*words, "--json").json["report"] is None


def test_a_folder_goes_up_as_one_file(fake: FakeServer, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    safetensors.torch.save_file({"x.lora_A.weight": torch.ones(1, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 1}')
    assert run("adapters", "import", folder, "--name", "fox").code == 0
    (data,) = fake.service.files.values()
    assert list(safetensors.torch.load(data)) == ["x.lora_A.weight"]
    refused = run("adapters", "import", tmp_path / "peft" / "..", "--name", "fox")
    assert refused.code == 1
    assert "no safetensors file" in refused.err


def test_an_export_takes_a_form(fake: FakeServer, run: Run, file: Path, tmp_path: Path) -> None:
    run("adapters", "import", file, "--name", "fox")
    target = tmp_path / "out"
    assert run("adapters", "export", "fox", "--format", "kohya", "--partial", "--out", target).code == 0
    request = fake.service.seen["ExportAdapter"][0]
    assert (request.format, request.partial) == (pb.ADAPTER_FORMAT_KOHYA, True)
    assert run("adapters", "export", "fox", "--format", "word", "--out", target).code == 2


def test_inspect_needs_no_server(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUESHIFT_ADDRESS", "127.0.0.1:1")
    shown = run("adapters", "inspect", file)
    assert shown.code == 0
    for told in ("hueshift", "lowrank", "residuals", "1 (1 layers), 2 (1 layers)", "ab" * 32, "F16 2, F32 2"):
        assert told in shown.out
    facts = run("adapters", "inspect", file, "--json").json
    assert (facts["kind"], facts["ranks"], facts["tensors"]) == ("lowrank", {"1": 1, "2": 1}, 4)
    file.write_bytes(b"\x80\x04. a pickle")
    refused = run("adapters", "inspect", file)
    assert refused.code == 1
    assert "pickle" in refused.err


def test_diff_tells_by_its_exit_code(run: Run, file: Path, tmp_path: Path) -> None:
    same = run("adapters", "diff", file, file)
    assert (same.code, "equal parts" in same.out) == (0, True)
    other = tmp_path / "other"
    other.write_bytes(write_adapter(lowrank_adapter(seed=1)))
    different = run("adapters", "diff", file, other)
    assert different.code == 1
    assert "lowrank/down.proj_out" in different.out
    found = run("adapters", "diff", file, other, "--json").json
    assert (found["equal"], len(found["compared"]), found["only_first"]) == (False, 2, [])
    other.write_bytes(write_adapter(spectral_adapter()))
    found = run("adapters", "diff", file, other, "--json").json
    assert found["fields"]["kind"] == ["lowrank", "spectral"]
