"""Imports and exports over gRPC with keys of two tenants: a file is stored whole or not at all, once per key."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from adapter_server import DATA, MIB, Running, chunk, failure_of, import_spec, serve_adapters, until
from small_adapters import LAYOUT, spectral_adapter
from small_store import small_file

from hueshift.adapters.file import write_adapter
from hueshift.v1 import adapters_pb2 as pb


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with serve_adapters(tmp_path) as running:
        yield running


def test_an_import_comes_back_byte_for_byte(running: Running) -> None:
    answer = running.import_file(adapter_id="fox", display_name="Fox", labels={"a": "b"})
    adapter = answer.adapter
    assert not answer.replayed
    assert (adapter.name, adapter.display_name, dict(adapter.labels)) == (
        "tenants/acme/adapters/fox",
        "Fox",
        {"a": "b"},
    )
    assert (adapter.kind, adapter.revision, adapter.method) == (pb.ADAPTER_KIND_SPECTRAL, 1, "import")
    assert adapter.content_hash == hashlib.sha256(DATA).hexdigest()
    assert (adapter.base_hash, adapter.size_bytes) == (LAYOUT.base_hash, len(DATA))
    assert (adapter.identifier, adapter.create_time.seconds, adapter.fine_tune) == ("sks", 1000, "")
    assert not adapter.resident
    assert not adapter.pinned
    for name in ("fox", "tenants/acme/adapters/fox"):
        assert running.call("GetAdapter", pb.GetAdapterRequest(name=name)).adapter == adapter
        first, *rest = running.call("ExportAdapter", pb.ExportAdapterRequest(name=name))
        assert first.adapter == adapter
        assert b"".join(message.chunk for message in rest) == DATA


def test_a_large_file_goes_in_and_out_in_chunks_of_a_mebibyte(running: Running) -> None:
    # Padding of the header makes a file of 2.5 MiB of the small adapter.
    length = int.from_bytes(DATA[:8], "little")
    padded = length + 5 * MIB // 2
    data = padded.to_bytes(8, "little") + DATA[8 : 8 + length] + b" " * (padded - length) + DATA[8 + length :]
    running.import_file(data, adapter_id="big", chunk=MIB)
    _, *chunks = running.call("ExportAdapter", pb.ExportAdapterRequest(name="big"))
    assert [len(message.chunk) for message in chunks] == [MIB, MIB, len(data) - 2 * MIB]
    assert b"".join(message.chunk for message in chunks) == data


def test_revisions_are_kept_and_named(running: Running) -> None:
    second = small_file(1)[1]
    running.import_file(adapter_id="fox", display_name="Fox")
    adapter = running.import_file(second, adapter_id="fox").adapter
    assert (adapter.revision, adapter.display_name) == (2, "Fox")
    for number, data in ((1, DATA), (2, second), (0, second)):
        _, *rest = running.call("ExportAdapter", pb.ExportAdapterRequest(name="fox", revision=number))
        assert b"".join(message.chunk for message in rest) == data
    for number, code in ((3, "NOT_FOUND"), (-1, "INVALID_ARGUMENT"), (2**63 - 1, "NOT_FOUND")):
        assert running.refused("ExportAdapter", pb.ExportAdapterRequest(name="fox", revision=number))[0] == code


def test_without_an_id_the_server_makes_one(running: Running) -> None:
    first, second = running.import_file().adapter, running.import_file().adapter
    assert first.name != second.name
    assert first.display_name == first.name.rsplit("/", 1)[1]
    assert len(running.store.files()) == 1


SIZE = len(DATA)
OK = {"adapter_id": "fox", "size_bytes": SIZE}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "MESSAGE_OUT_OF_ORDER"),
        ([pb.ImportAdapterRequest()], "MESSAGE_OUT_OF_ORDER"),
        ([chunk(DATA)], "MESSAGE_OUT_OF_ORDER"),
        ([import_spec(**OK), import_spec(**OK)], "MESSAGE_OUT_OF_ORDER"),
        ([import_spec(**OK), chunk(DATA[:9]), pb.ImportAdapterRequest()], "MESSAGE_OUT_OF_ORDER"),
        ([import_spec(**OK)], "UPLOAD_SIZE_MISMATCH"),
        ([import_spec(**OK), chunk(DATA[:-1])], "UPLOAD_SIZE_MISMATCH"),
        ([import_spec(**OK), chunk(DATA), chunk(b"x")], "UPLOAD_SIZE_MISMATCH"),
        ([import_spec(**OK), chunk(DATA + b"x")], "UPLOAD_SIZE_MISMATCH"),
        ([import_spec(**OK), chunk(b"")], "INVALID_FIELD"),
        ([import_spec(size_bytes=2 * MIB), chunk(b"x" * (MIB + 1))], "UPLOAD_TOO_LARGE"),
        ([import_spec(size_bytes=3 * MIB + 1)], "UPLOAD_TOO_LARGE"),
        ([import_spec(adapter_id="fox")], "INVALID_FIELD"),
        ([import_spec(size_bytes=-1)], "INVALID_FIELD"),
        ([import_spec(**{**OK, "adapter_id": "../fox"})], "INVALID_FIELD"),
        ([import_spec(**OK, display_name="x" * 121)], "INVALID_FIELD"),
        ([import_spec(**OK, labels={"a b": ""})], "INVALID_FIELD"),
        ([import_spec(**OK, idempotency_key="x" * 65)], "INVALID_FIELD"),
        ([import_spec(**OK), chunk(bytes(SIZE))], "ADAPTER_FILE_INVALID"),
        ([import_spec(**OK), chunk(b"PK\x03\x04" + bytes(SIZE - 4))], "ADAPTER_FILE_UNSAFE"),
    ],
)
def test_a_wrong_import_stores_nothing(running: Running, messages: list[pb.ImportAdapterRequest], reason: str) -> None:
    assert running.refused("ImportAdapter", iter(messages))[:2] == ("INVALID_ARGUMENT", reason)
    assert running.store.files() == {}
    assert running.store.temporaries() == []
    assert list(running.call("ListAdapters", pb.ListAdaptersRequest()).adapters) == []


def test_an_adapter_of_another_base_model_is_refused(running: Running) -> None:
    data = write_adapter(replace(spectral_adapter(), base_hash="cd" * 32))
    request = iter([import_spec(size_bytes=len(data)), chunk(data)])
    code, reason, message = running.refused("ImportAdapter", request)
    assert (code, reason) == ("FAILED_PRECONDITION", "ADAPTER_BASE_MISMATCH")
    assert "cd" * 32 in message
    assert LAYOUT.base_hash in message


def test_a_caller_that_leaves_while_sending_leaves_nothing(running: Running) -> None:
    waiting = threading.Event()

    def messages() -> Iterator[pb.ImportAdapterRequest]:
        yield import_spec(**OK)
        yield chunk(DATA[:100])
        waiting.wait(20)

    metadata = (("authorization", f"Bearer {running.keys['acme']}"),)
    call = running.stub.ImportAdapter.future(messages(), metadata=metadata)
    until(lambda: len(running.store.temporaries()) == 1)
    call.cancel()
    until(lambda: running.store.temporaries() == [])
    waiting.set()
    assert running.store.files() == {}


def test_a_key_imports_once(running: Running) -> None:
    first = running.import_file(idempotency_key="k1")
    again = running.import_file(idempotency_key="k1", chunk=77)
    assert (first.replayed, again.replayed) == (False, True)
    assert again.adapter == first.adapter
    for name, data in (("x", DATA), ("", small_file(1)[1])):
        with pytest.raises(grpc.RpcError) as caught:
            running.import_file(data, idempotency_key="k1", display_name=name)
        assert failure_of(caught.value)[:2] == ("ALREADY_EXISTS", "IDEMPOTENCY_CONFLICT")
    assert not running.import_file(tenant="other", idempotency_key="k1").replayed
    assert len(running.call("ListAdapters", pb.ListAdaptersRequest()).adapters) == 1
    # The first answer is given even after the adapter has gone.
    running.call("DeleteAdapter", pb.DeleteAdapterRequest(name=first.adapter.name))
    assert running.import_file(idempotency_key="k1").adapter == first.adapter


def test_one_key_sent_many_times_at_once_imports_once(running: Running) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: running.import_file(idempotency_key="k"), range(8)))
    assert sum(not answer.replayed for answer in answers) == 1
    assert len({answer.adapter.name for answer in answers}) == 1
    assert len(running.call("ListAdapters", pb.ListAdaptersRequest()).adapters) == 1
