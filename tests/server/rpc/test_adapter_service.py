"""AdapterService over gRPC: lists, updates, pins, deletions that stop serving, and tenants that never meet."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from adapter_server import DATA, FakeResidents, Running, serve_adapters, until
from google.protobuf.field_mask_pb2 import FieldMask
from small_adapters import LAYOUT
from small_store import open_small_store, small_file

from hueshift.server.clock import SystemClock
from hueshift.server.rpc.adapter_changes import AdapterChanges, Imported
from hueshift.server.rpc.adapter_service import AdapterService
from hueshift.server.settings import LimitSettings
from hueshift.v1 import adapters_pb2 as pb
from hueshift.v1 import generation_pb2 as generation_pb


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with serve_adapters(tmp_path) as running:
        yield running


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


def test_a_store_of_files_that_does_not_answer_holds_up_no_other_call(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.import_file(adapter_id="fox")
    answers, store_upload = threading.Event(), AdapterChanges.store_upload

    def store_late(*arguments: Any) -> Imported:
        answers.wait(20)
        return store_upload(*arguments)

    monkeypatch.setattr(AdapterChanges, "store_upload", store_late)
    with ThreadPoolExecutor(16) as pool:
        imports = [pool.submit(running.import_file, adapter_id=f"a{number}") for number in range(16)]
        try:
            until(lambda: running.service._files._pool._work_queue.qsize() > 0)
            begun = time.monotonic()
            assert running.call("GetAdapter", pb.GetAdapterRequest(name="fox")).adapter.name.endswith("/fox")
            assert time.monotonic() - begun < 5
        finally:
            answers.set()
        assert all(future.result(20).adapter.name for future in imports)


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
    for field, adapter in (
        ("adapter.display_name", pb.Adapter(name="fox", display_name="x" * 121)),
        ("adapter.labels", pb.Adapter(name="fox", labels={"-": "b"})),
    ):
        path = field.removeprefix("adapter.")
        wrong = pb.UpdateAdapterRequest(adapter=adapter, update_mask=FieldMask(paths=[path]))
        code, reason, message = running.refused("UpdateAdapter", wrong)
        assert (reason, message.partition(":")[0]) == ("INVALID_FIELD", field)
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


def test_a_row_of_two_adapters_stays_pinned_for_the_other_one(running: Running) -> None:
    content_hash = running.import_file(adapter_id="fox").adapter.content_hash
    assert running.import_file(adapter_id="owl", tenant="other").adapter.content_hash == content_hash
    running.call("WarmAdapter", pb.WarmAdapterRequest(name="fox", pin=True))
    running.call("WarmAdapter", pb.WarmAdapterRequest(name="owl", pin=True), tenant="other")
    assert not running.call("WarmAdapter", pb.WarmAdapterRequest(name="fox", pin=False)).adapter.pinned
    assert running.residents.pins == {content_hash}
    running.call("WarmAdapter", pb.WarmAdapterRequest(name="owl", pin=False), tenant="other")
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
    assert await service.pins.follow() == 2
    assert residents.pins == {store.adapters.get("acme", adapter_id).newest.content_hash for adapter_id in ("a", "c")}
    residents.refuse = True
    refused = AdapterService(store.adapters, LAYOUT, LimitSettings(), residents, SystemClock())
    assert await refused.pins.follow() == 0
    store.database.close()


NAMED: dict[str, Callable[[str], Any]] = {
    "GetAdapter": lambda name: pb.GetAdapterRequest(name=name),
    "ExportAdapter": lambda name: pb.ExportAdapterRequest(name=name),
    "CombineAdapters": lambda name: pb.CombineAdaptersRequest(
        adapter_id="fox", sum=pb.AdapterSum(parts=[generation_pb.AdapterUse(adapter=name)])
    ),
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
