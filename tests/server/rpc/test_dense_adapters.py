"""Adapters with full deltas over gRPC: imported when asked, listed, exported, combined; what is too large says so."""

import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import safetensors.torch
import torch
from adapter_server import MIB, Running, failure_of, serve_adapters
from dense_adapters import dense_adapter
from small_adapters import LAYOUT, lowrank_adapter
from small_store import open_small_store

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.file import pack_adapter, read_adapter, write_adapter
from hueshift.adapters.formats.draft import ImportBase
from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.adapters.validate import FileLimits
from hueshift.client.adapters import import_call, read_adapter_record
from hueshift.client.choices import AdapterKind
from hueshift.client.conversion import Conversion
from hueshift.server.rpc.adapter_changes import AdapterChanges
from hueshift.server.rpc.adapter_import import AdapterFormats
from hueshift.server.settings import LimitSettings
from hueshift.v1 import adapters_pb2 as pb
from hueshift.v1 import generation_pb2

OURS = dense_adapter(LAYOUT)
DIFF = safetensors.torch.save({"lora_unet_down_conv.diff": OURS.dense["down.conv"].reshape(5, 3, 3, 3)})
SUM = pb.CombineAdaptersRequest(
    adapter_id="both",
    sum=pb.AdapterSum(parts=[generation_pb2.AdapterUse(adapter=name, weight=1) for name in ("fox", "ink")]),
)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with serve_adapters(tmp_path) as running:
        yield running


def exported(running: Running, name: str) -> bytes:
    _, *chunks = running.call("ExportAdapter", pb.ExportAdapterRequest(name=name))
    return b"".join(message.chunk for message in chunks)


def test_differences_are_kept_whole_when_asked(running: Running) -> None:
    answer = running.import_file(DIFF, adapter_id="fox", dense=True)
    assert (answer.adapter.kind, answer.report.error) == (pb.ADAPTER_KIND_DENSE, 0)
    assert read_adapter_record(answer.adapter).kind is AdapterKind.DENSE
    stored = exported(running, "fox")
    assert len(stored) == answer.adapter.size_bytes
    assert torch.equal(read_adapter(stored, LAYOUT, FileLimits()).dense["down.conv"], OURS.dense["down.conv"])
    unasked = running.import_file(DIFF, adapter_id="ink").adapter
    assert unasked.kind == pb.ADAPTER_KIND_LOWRANK
    spec = next(import_call(DIFF, conversion=Conversion(dense=True)).messages()).spec
    assert (spec.dense, spec.rank) == (True, 0)


def test_an_own_file_is_stored_as_it_is_or_brought_to_a_rank(running: Running) -> None:
    data = write_adapter(OURS)
    assert not running.import_file(data, adapter_id="fox").HasField("report")
    assert exported(running, "fox") == data
    lowered = running.import_file(data, adapter_id="low", rank=2)
    assert (lowered.adapter.kind, lowered.report.format) == (pb.ADAPTER_KIND_LOWRANK, "hueshift")
    assert {layer.rank for layer in lowered.report.layers} == {2}


def test_a_rank_beside_full_deltas_is_refused_before_any_byte(running: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        running.import_file(DIFF, dense=True, rank=4)
    code, reason, message = failure_of(caught.value)
    assert (code, reason) == ("INVALID_ARGUMENT", Reason.INVALID_FIELD.value)
    assert "spec.dense: given with rank 4" in message


def test_sums_keep_both_parts(running: Running) -> None:
    running.import_file(write_adapter(OURS), adapter_id="fox")
    running.import_file(write_adapter(lowrank_adapter()), adapter_id="ink")
    combined = running.call("CombineAdapters", SUM)
    assert combined.adapter.kind == pb.ADAPTER_KIND_DENSE
    read = read_adapter(exported(running, "both"), LAYOUT, FileLimits())
    assert (read.dense.keys(), read.lowrank.keys()) == (OURS.dense.keys(), lowrank_adapter().lowrank.keys())
    assert running.store.temporaries() == []


def test_what_is_too_large_says_its_size_and_the_setting(running: Running, tmp_path: Path) -> None:
    formats, file = AdapterFormats(ImportBase(LAYOUT)), tmp_path / "x"
    file.write_bytes(DIFF)
    with pytest.raises(InvalidArgument, match="Import it without dense") as caught:
        formats.read(file, pb.ImportAdapterSpec(dense=True), FileLimits(max_bytes=len(DIFF)))
    assert "(setting limits.max_adapter_bytes)" in caught.value.message
    for name in ("fox", "ink"):
        running.import_file(write_adapter(OURS), adapter_id=name)
    limits = LimitSettings(max_adapter_bytes=500)
    changes = AdapterChanges(running.store.adapters, formats, LAYOUT, limits)
    with pytest.raises(InvalidArgument) as caught:
        changes.combine("acme", SUM)
    assert caught.value.reason is Reason.UPLOAD_TOO_LARGE
    assert re.search(
        r"the combined adapter has \d{3} bytes; allowed: at most 500 \(setting limits", caught.value.message
    )
    assert running.store.temporaries() == []


def test_an_engine_that_serves_no_full_deltas_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(DIFF)
    for slots, told in ((lambda: 0, True), (lambda: 2, False), (None, False)):
        formats = AdapterFormats(ImportBase(LAYOUT), {}, slots)
        report = formats.read(file, pb.ImportAdapterSpec(dense=True), FileLimits()).report
        assert report is not None
        assert any("full deltas, which this server's engine does not serve" in n for n in report.notes) is told


def test_the_store_holds_no_second_copy_in_memory(tmp_path: Path) -> None:
    matrices = tuple(MatrixLayer(f"layer.{number}", (512, 1024)) for number in range(8))
    layout = BaseLayout(LAYOUT.base_hash, matrices, (), token_width=6)
    adapter, store = dense_adapter(layout), open_small_store(tmp_path)
    tracemalloc.start()
    try:
        staged = store.adapters.stage(pack_adapter(adapter))
        written = tracemalloc.get_traced_memory()[1]
        stored = store.adapters.publish("acme", "fox", "", {}, staged, adapter)
        tracemalloc.reset_peak()
        loaded = store.adapters.load(stored.content_hash, layout)
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(torch.equal(loaded.dense[name], delta) for name, delta in adapter.dense.items())
    assert (staged.size_bytes, store.temporaries()) == (pack_adapter(adapter).size_bytes, [])
    # Chunks of 1 MiB are hashed; a tensor has as much.
    assert (written < 3 * MIB, 8 * MIB <= read < 11 * MIB) == (True, True), (written, read)
