"""AdapterService over real gRPC with keys of two tenants: imports are whole or nothing, deletions stop serving."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from prometheus_client import CollectorRegistry
from small_adapters import LAYOUT, spectral_adapter
from small_store import SmallStore, open_small_store, small_file

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.file import write_adapter
from hueshift.server.auth import Authenticator
from hueshift.server.clock import SystemClock
from hueshift.server.metrics import Metrics
from hueshift.server.rpc.adapter_service import AdapterService, Mix
from hueshift.server.rpc.gate import Gate
from hueshift.server.rpc.interceptors import make_interceptors
from hueshift.server.settings import LimitSettings, ServerSettings
from hueshift.server.store.keys import KeyStore
from hueshift.v1 import adapters_pb2 as pb
from hueshift.v1 import adapters_pb2_grpc

MIB = 1024 * 1024
DATA = small_file(0)[1]


@dataclass
class FakeResidents:
    """Remembers what the engine would hold."""

    rows: set[str] = field(default_factory=set)
    pins: set[str] = field(default_factory=set)
    dropped: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    refuse: bool = False
    warming: Callable[[], object] = lambda: None

    async def warm(self, mix: Mix, pin: bool | None) -> bool:
        ((content_hash, weight),) = mix
        assert weight == 1.0
        if self.refuse:
            raise InvalidArgument(Reason.ADAPTER_RANK_TOO_LARGE, "too large for this engine")
        await asyncio.to_thread(self.warming)
        loaded = content_hash not in self.rows
        self.rows.add(content_hash)
        if pin is not None:
            (self.pins.add if pin else self.pins.discard)(content_hash)
        return loaded

    def drop_adapter(self, name: str, hashes: Sequence[str]) -> None:
        self.dropped.append((name, tuple(hashes)))
        self.rows -= set(hashes)
        self.pins -= set(hashes)

    def resident(self, content_hash: str) -> bool:
        return content_hash in self.rows


@dataclass
class Running:
    """A server, its store and its engine, and two tenants with keys."""

    store: SmallStore
    residents: FakeResidents
    service: AdapterService
    stub: adapters_pb2_grpc.AdapterServiceStub
    keys: dict[str, str]

    def call(self, method: str, request: Any, tenant: str = "acme") -> Any:
        """Call an RPC as a tenant; a stream is returned as a list."""
        metadata = (("authorization", f"Bearer {self.keys[tenant]}"),)
        answer = getattr(self.stub, method)(request, timeout=20, metadata=metadata)
        return list(answer) if method == "ExportAdapter" else answer

    def import_file(self, data: bytes = DATA, tenant: str = "acme", chunk: int = 200, **spec: Any) -> Any:
        """Import a file in chunks."""
        messages = [import_spec(size_bytes=len(data), **spec)]
        messages += [pb.ImportAdapterRequest(chunk=data[at : at + chunk]) for at in range(0, len(data), chunk)]
        return self.call("ImportAdapter", iter(messages), tenant)

    def refused(self, method: str, request: Any, tenant: str = "acme") -> tuple[str, str, str]:
        """Call an RPC that fails; return its code, reason and message."""
        with pytest.raises(grpc.RpcError) as caught:
            self.call(method, request, tenant)
        return failure_of(caught.value)


def failure_of(error: Any) -> tuple[str, str, str]:
    status = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info = ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return error.code().name, info.reason, status.message


def import_spec(**values: Any) -> pb.ImportAdapterRequest:
    return pb.ImportAdapterRequest(spec=pb.ImportAdapterSpec(**values))


def chunk(data: bytes) -> pb.ImportAdapterRequest:
    return pb.ImportAdapterRequest(chunk=data)


async def serve(service: AdapterService, keys: KeyStore, ready: Callable[[int, Callable[[], object]], None]) -> None:
    clock, gate, stop = SystemClock(), Gate(()), asyncio.Event()
    interceptors = make_interceptors(
        settings=ServerSettings(),
        metrics=Metrics(CollectorRegistry()),
        authenticator=Authenticator(keys, clock, default_tenant="local", required=True),
        gate=gate,
        clock=clock,
        label=lambda method: method,
    )
    server = grpc.aio.server(interceptors=interceptors)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gate.open()
    loop = asyncio.get_running_loop()
    ready(port, lambda: loop.call_soon_threadsafe(stop.set))
    await stop.wait()
    await server.stop(None)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    store, residents = open_small_store(tmp_path), FakeResidents()
    key_store = KeyStore(store.database, store.clock)
    keys = {tenant: key_store.create(tenant)[1] for tenant in ("acme", "other")}
    service = AdapterService(store.adapters, LAYOUT, LimitSettings(max_adapter_bytes=3 * MIB), residents, SystemClock())
    started, places = threading.Event(), list[tuple[int, Callable[[], object]]]()

    def ready(port: int, stop: Callable[[], object]) -> None:
        places.append((port, stop))
        started.set()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: asyncio.run(serve(service, key_store, ready)))
        assert started.wait(20)
        port, stop = places[0]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Running(store, residents, service, adapters_pb2_grpc.AdapterServiceStub(channel), keys)
        stop()
        future.result(20)
    store.check()
    assert store.temporaries() == []
    store.database.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait up to five seconds for a condition."""
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition never came true")


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


def test_lists_are_paged_newest_first_and_filtered(running: Running) -> None:
    for n in range(5):
        running.store.clock.now += 1
        running.import_file(adapter_id=f"a{n}", labels={"odd": str(n % 2)})
    seen: list[str] = []
    token = ""
    while True:
        page = running.call("ListAdapters", pb.ListAdaptersRequest(page_size=2, page_token=token))
        seen += [adapter.name.rsplit("/", 1)[1] for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
    assert seen == ["a4", "a3", "a2", "a1", "a0"]
    odd = running.call("ListAdapters", pb.ListAdaptersRequest(labels={"odd": "1"})).adapters
    assert [adapter.display_name for adapter in odd] == ["a3", "a1"]
    code, reason, _ = running.refused("ListAdapters", pb.ListAdaptersRequest(page_token="x"))
    assert (code, reason) == ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID")


def test_updates_follow_their_mask(running: Running) -> None:
    running.import_file(adapter_id="fox", display_name="Fox", labels={"a": "b"})
    wanted = pb.Adapter(name="fox", display_name="Foxy", labels={"c": "d"}, pinned=True)

    def update(*paths: str, **more: Any) -> pb.UpdateAdapterRequest:
        return pb.UpdateAdapterRequest(adapter=wanted, update_mask=FieldMask(paths=paths), **more)

    adapter = running.call("UpdateAdapter", update("display_name")).adapter
    assert (adapter.display_name, dict(adapter.labels), adapter.pinned) == ("Foxy", {"a": "b"}, False)
    adapter = running.call("UpdateAdapter", update("labels")).adapter
    assert dict(adapter.labels) == {"c": "d"}
    for paths in ((), ("pinned",), ("display_name", "name"), ("*",)):
        code, reason, message = running.refused("UpdateAdapter", update(*paths))
        assert (code, reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        assert "display_name and labels" in message
    first = running.call("UpdateAdapter", update("display_name", idempotency_key="k"))
    running.store.clock.now += 10
    assert running.call("UpdateAdapter", update("display_name", idempotency_key="k")) == first
    assert running.refused("UpdateAdapter", update("labels", idempotency_key="k"))[1] == "IDEMPOTENCY_CONFLICT"


def test_deleting_stops_serving_and_frees_the_disk(running: Running) -> None:
    running.import_file(adapter_id="fox")
    content_hash = running.import_file(small_file(1)[1], adapter_id="fox").adapter.content_hash
    running.call("WarmAdapter", pb.WarmAdapterRequest(name="fox", pin=True))
    assert running.call("GetAdapter", pb.GetAdapterRequest(name="fox")).adapter.resident
    hashes = tuple(sorted(running.store.files()))
    request = pb.DeleteAdapterRequest(name="fox", idempotency_key="k")
    answer = running.call("DeleteAdapter", request)
    assert (answer.revisions, answer.bytes) == (2, len(DATA) + len(small_file(1)[1]))
    assert running.store.files() == {}
    assert running.residents.dropped == [("tenants/acme/adapters/fox", hashes)]
    assert content_hash in hashes
    assert running.call("DeleteAdapter", request) == answer
    assert running.refused("DeleteAdapter", pb.DeleteAdapterRequest(name="fox"))[0] == "NOT_FOUND"
    # A repeated delete does not reach the adapter that has the name now.
    running.import_file(adapter_id="fox")
    assert running.call("DeleteAdapter", request) == answer
    assert len(running.residents.dropped) == 1
    assert running.call("GetAdapter", pb.GetAdapterRequest(name="fox")).adapter.revision == 1


def test_a_deletion_ends_even_if_its_caller_leaves(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.import_file(adapter_id="fox")
    begun, left = threading.Event(), threading.Event()
    delete_rows = running.store.adapters.delete_rows

    def slow(*args: Any) -> Any:
        begun.set()
        left.wait(20)
        return delete_rows(*args)

    monkeypatch.setattr(running.store.adapters, "delete_rows", slow)
    metadata = (("authorization", f"Bearer {running.keys['acme']}"),)
    call = running.stub.DeleteAdapter.future(pb.DeleteAdapterRequest(name="fox"), metadata=metadata)
    assert begun.wait(20)
    call.cancel()
    left.set()
    until(lambda: running.store.files() == {})
    assert [name for name, _ in running.residents.dropped] == ["tenants/acme/adapters/fox"]


def test_warming_loads_pins_and_unpins(running: Running) -> None:
    content_hash = running.import_file(adapter_id="fox").adapter.content_hash
    answer = running.call("WarmAdapter", pb.WarmAdapterRequest(name="fox"))
    assert answer.loaded
    assert (answer.adapter.resident, answer.adapter.pinned) == (True, False)
    answer = running.call("WarmAdapter", pb.WarmAdapterRequest(name="fox", pin=True))
    assert not answer.loaded
    assert answer.adapter.pinned
    assert running.residents.pins == {content_hash}
    assert running.call("WarmAdapter", pb.WarmAdapterRequest(name="fox")).adapter.pinned
    assert running.residents.pins == {content_hash}
    assert not running.call("WarmAdapter", pb.WarmAdapterRequest(name="fox", pin=False)).adapter.pinned
    assert running.residents.pins == set()


def test_a_pin_moves_to_the_next_revision(running: Running) -> None:
    first = running.import_file(adapter_id="fox").adapter.content_hash
    running.call("WarmAdapter", pb.WarmAdapterRequest(name="fox", pin=True))
    second = running.import_file(small_file(1)[1], adapter_id="fox").adapter
    assert second.pinned
    assert running.residents.pins == {second.content_hash}
    assert running.call("WarmAdapter", pb.WarmAdapterRequest(name="fox", revision=1)).adapter.revision == 2
    code, reason, _ = running.refused("WarmAdapter", pb.WarmAdapterRequest(name="fox", revision=1, pin=True))
    assert (code, reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert first not in running.residents.pins


def test_what_the_engine_refuses_is_not_pinned(running: Running) -> None:
    running.import_file(adapter_id="fox")
    running.residents.refuse = True
    code, reason, _ = running.refused("WarmAdapter", pb.WarmAdapterRequest(name="fox", pin=True))
    assert (code, reason) == ("INVALID_ARGUMENT", "ADAPTER_RANK_TOO_LARGE")
    assert not running.store.adapters.get("acme", "fox").pinned


def test_an_adapter_deleted_while_it_is_pinned_is_not_kept(running: Running) -> None:
    running.import_file(adapter_id="fox")
    running.residents.warming = lambda: running.store.adapters.delete("acme", "fox")
    assert running.refused("WarmAdapter", pb.WarmAdapterRequest(name="fox", pin=True))[0] == "NOT_FOUND"
    assert running.residents.rows == running.residents.pins == set()


async def test_pins_come_back_after_a_restart(tmp_path: Path) -> None:
    store = open_small_store(tmp_path)
    for adapter_id in ("a", "b", "c"):
        store.publish(adapter_id=adapter_id, seed=ord(adapter_id))
        store.adapters.set_pinned("acme", adapter_id, adapter_id != "b")
    residents = FakeResidents()
    service = AdapterService(store.adapters, LAYOUT, LimitSettings(), residents, SystemClock())
    assert await service.warm_pinned() == 2
    assert residents.pins == {store.adapters.get("acme", adapter_id).newest.content_hash for adapter_id in ("a", "c")}
    residents.refuse = True
    assert await service.warm_pinned() == 0
    store.database.close()


NAMED: dict[str, Callable[[str], Any]] = {
    "GetAdapter": lambda name: pb.GetAdapterRequest(name=name),
    "ExportAdapter": lambda name: pb.ExportAdapterRequest(name=name),
    "WarmAdapter": lambda name: pb.WarmAdapterRequest(name=name, pin=True),
    "DeleteAdapter": lambda name: pb.DeleteAdapterRequest(name=name),
    "UpdateAdapter": lambda name: pb.UpdateAdapterRequest(
        adapter=pb.Adapter(name=name, display_name="stolen"), update_mask=FieldMask(paths=["display_name"])
    ),
}


@pytest.mark.parametrize("method", NAMED)
def test_another_tenants_adapter_looks_exactly_like_none(running: Running, method: str) -> None:
    running.import_file(adapter_id="fox")
    record = running.store.adapters.get("acme", "fox")
    there = running.refused(method, NAMED[method]("tenants/acme/adapters/fox"), "other")
    absent = running.refused(method, NAMED[method]("tenants/acme/adapters/nothing"), "other")
    own = running.refused(method, NAMED[method]("tenants/other/adapters/fox"), "other")
    bare = running.refused(method, NAMED[method]("fox"), "other")
    assert there[:2] == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert absent == (*there[:2], there[2].replace("fox", "nothing"))
    assert own == bare == (*there[:2], there[2].replace("tenants/acme", "tenants/other"))
    assert running.store.adapters.get("acme", "fox") == record
    assert running.residents.rows == set()
    assert list(running.call("ListAdapters", pb.ListAdaptersRequest(), "other").adapters) == []


def test_malformed_names_are_refused(running: Running) -> None:
    for name in ("", "a/b", "tenants/acme/fineTunes/x", "tenants/acme/adapters/", "Fox", "x" * 64):
        for method, request in NAMED.items():
            assert running.refused(method, request(name))[:2] == ("INVALID_ARGUMENT", "INVALID_FIELD"), (method, name)


def test_a_damaged_file_is_an_internal_error_that_tells_callers_nothing(running: Running) -> None:
    content_hash = running.import_file(adapter_id="fox").adapter.content_hash
    file = running.store.blobs.path(content_hash)
    data = file.read_bytes()
    file.write_bytes(b"damaged")
    code, reason, message = running.refused("ExportAdapter", pb.ExportAdapterRequest(name="fox"))
    assert (code, reason) == ("INTERNAL", "INTERNAL")
    assert "incident" in message
    assert content_hash not in message
    file.write_bytes(data)
