"""Files of other programs over gRPC: converted, reported, stored once, and written out again in other forms."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch
from adapter_server import Running, failure_of, serve_adapters
from small_adapters import LAYOUT, lowrank_adapter, spectral_adapter

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.formats.draft import ImportBase
from hueshift.adapters.validate import FileLimits
from hueshift.server.rpc.adapter_import import AdapterFormats
from hueshift.v1 import adapters_pb2 as pb

TENSORS = {
    "lora_unet_down_proj_out.lora_down.weight": torch.arange(10.0).reshape(2, 5),
    "lora_unet_down_proj_out.lora_up.weight": torch.arange(14.0).reshape(7, 2),
    "lora_unet_down_proj_out.alpha": torch.tensor(1.0),
    "lora_unet_up_norm.w_norm": torch.arange(7.0).half(),
    "lora_te_x.lora_down.weight": torch.ones(1, 2),
    "bundle_emb.cat.string_to_param.*": torch.ones(2, 6),
}
FILE = safetensors.torch.save(TENSORS)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with serve_adapters(tmp_path) as running:
        yield running


def exported(running: Running, **request: Any) -> bytes:
    _, *chunks = running.call("ExportAdapter", pb.ExportAdapterRequest(**request))
    return b"".join(message.chunk for message in chunks)


def test_a_file_of_another_program_is_converted_and_reported(running: Running) -> None:
    answer = running.import_file(FILE, adapter_id="cat")
    adapter, report = answer.adapter, answer.report
    assert (adapter.kind, adapter.method, adapter.identifier) == (pb.ADAPTER_KIND_LOWRANK, "import", "cat")
    assert (adapter.base_hash, adapter.revision) == (LAYOUT.base_hash, 1)
    assert (report.format, list(report.words), report.error) == ("kohya", ["cat"], 0)
    assert [(part.layer, part.form, part.rank, part.error) for part in report.layers] == [
        ("down.proj_out", "lora", 2, 0),
        ("up.norm", "norm", 0, 0),
    ]
    assert [(part.count, list(part.keys)) for part in report.left_out] == [(1, ["lora_te_x.lora_down.weight"])]
    assert "bound to this base model" in report.notes[0]
    stored = exported(running, name="cat")
    assert len(stored) == adapter.size_bytes
    read = read_adapter(stored, LAYOUT, FileLimits())
    assert torch.equal(read.lowrank["down.proj_out"].b, TENSORS["lora_unet_down_proj_out.lora_up.weight"])
    assert read.lowrank["down.proj_out"].scale == 0.5
    assert torch.equal(read.norm["up.norm"], TENSORS["lora_unet_up_norm.w_norm"])


def test_a_repeated_import_returns_the_same_report(running: Running) -> None:
    first = running.import_file(FILE, adapter_id="cat", idempotency_key="k")
    again = running.import_file(FILE, adapter_id="cat", idempotency_key="k")
    assert (first.replayed, again.replayed) == (False, True)
    assert again.report == first.report
    assert again.adapter.revision == 1


def test_our_own_files_have_no_report(running: Running) -> None:
    assert not running.import_file().HasField("report")


@pytest.mark.parametrize(
    ("spec", "reason", "named"),
    [
        ({"complete": True}, Reason.ADAPTER_TARGET_UNSUPPORTED, "lora_te_x"),
        ({"rank": 129}, Reason.INVALID_FIELD, "spec.rank"),
        ({"rank": -1}, Reason.INVALID_FIELD, "spec.rank"),
        ({"word": "two words"}, Reason.INVALID_FIELD, "spec.word"),
    ],
)
def test_wrong_wishes_are_refused(running: Running, spec: dict[str, Any], reason: Reason, named: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        running.import_file(FILE, **spec)
    code, found, message = failure_of(caught.value)
    assert (code, found, named in message) == ("INVALID_ARGUMENT", reason.value, True)


def test_files_of_another_base_model_are_refused(running: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        running.import_file(safetensors.torch.save({"unet.up_blocks.x.weight": torch.ones(1)}))
    assert failure_of(caught.value)[:2] == ("FAILED_PRECONDITION", Reason.ADAPTER_BASE_MISMATCH.value)


def test_exports_take_the_asked_form(running: Running) -> None:
    running.import_file(write_adapter(lowrank_adapter()), adapter_id="fox")
    kohya = safetensors.torch.load(exported(running, name="fox", format=pb.ADAPTER_FORMAT_KOHYA))
    assert kohya["lora_unet_down_proj_out.alpha"] == 1.0
    peft = safetensors.torch.load(exported(running, name="fox", format=pb.ADAPTER_FORMAT_PEFT))
    assert set(peft) == {f"unet.{layer}.lora_{side}.weight" for layer in ("down.proj_out", "up.to_q") for side in "AB"}
    own = exported(running, name="fox", format=pb.ADAPTER_FORMAT_HUESHIFT)
    assert own == write_adapter(lowrank_adapter())
    with pytest.raises(grpc.RpcError) as caught:
        exported(running, name="fox", format=pb.ADAPTER_FORMAT_MKSHING)
    assert failure_of(caught.value)[1] == Reason.ADAPTER_TARGET_UNSUPPORTED.value
    assert safetensors.torch.load(exported(running, name="fox", format=pb.ADAPTER_FORMAT_MKSHING, partial=True)) == {}
    with pytest.raises(grpc.RpcError) as caught:
        exported(running, name="fox", format=99)
    assert failure_of(caught.value)[:2] == ("INVALID_ARGUMENT", Reason.INVALID_FIELD.value)


def test_a_kohya_file_comes_back_as_it_went_in(running: Running) -> None:
    running.import_file(FILE, adapter_id="cat")
    back = safetensors.torch.load(exported(running, name="cat", format=pb.ADAPTER_FORMAT_KOHYA))
    expected = {name: tensor for name, tensor in TENSORS.items() if not name.startswith("lora_te")}
    assert {name: (t.dtype, t.tolist()) for name, t in back.items()} == {
        name: (t.dtype, t.tolist()) for name, t in expected.items()
    }


def formats(**branches: int) -> AdapterFormats:
    return AdapterFormats(ImportBase(LAYOUT), {name.replace("__", "."): rank for name, rank in branches.items()})


def test_what_the_engine_cannot_serve_is_told(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(FILE)
    spec, limits = pb.ImportAdapterSpec(), FileLimits()
    served = formats(down__proj_out=2).read(file, spec, limits)
    assert served.report is not None
    assert len(served.report.notes) == 1
    (note,) = _notes(formats(), file)
    assert "engine.lowrank_targets" in note
    assert "'down.proj_out'" in note
    (note,) = _notes(formats(down__proj_out=1), file)
    assert "engine.lowrank_rank" in note
    less = formats().read(file, pb.ImportAdapterSpec(served_only=True), limits)
    assert (list(less.adapter.lowrank), list(less.adapter.norm)) == ([], ["up.norm"])
    with pytest.raises(InvalidArgument, match="smaller rank") as caught:
        formats().read(file, spec, FileLimits(max_bytes=len(FILE)))
    assert caught.value.reason is Reason.UPLOAD_TOO_LARGE


def _notes(found: AdapterFormats, file: Path) -> list[str]:
    report = found.read(file, pb.ImportAdapterSpec(), FileLimits()).report
    assert report is not None
    return [note for note in report.notes if "bound to this base" not in note]


def test_own_files_of_other_kinds_are_not_touched(tmp_path: Path) -> None:
    file = tmp_path / "x"
    adapter = replace(spectral_adapter(), tokens={"sks": torch.ones(5, 6)})
    file.write_bytes(write_adapter(adapter))
    read = formats().read(file, pb.ImportAdapterSpec(), FileLimits())
    assert (read.packed, read.report) == (None, None)
    assert read.adapter.tokens["sks"].shape == (5, 6)
