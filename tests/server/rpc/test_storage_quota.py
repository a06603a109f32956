"""How much a tenant may store: refused before anything is written, told with its numbers, never counted twice."""

import io
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from adapter_server import DATA, Running, chunk, failure_of, import_spec, serve_adapters
from fake_clock import FakeClock
from google.rpc.error_details_pb2 import ErrorInfo, QuotaFailure
from google.rpc.status_pb2 import Status
from PIL import Image
from postgres import fresh_database
from small_jobs import small_spec
from small_store import small_file
from whole_server import LiveServer, RpcStubs, fake_parts, live_server, refusal

from hueshift.adapters.errors import ResourceExhausted
from hueshift.engines.base_model import BaseModel
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.blobs import BlobStore
from hueshift.server.store.database import Database
from hueshift.server.store.job_quotas import JobQuotas
from hueshift.server.store.job_records import NewJob
from hueshift.server.store.job_store import JobStore
from hueshift.server.store.stored_bytes import Storage, StorageQuota, Stored, check_storage
from hueshift.v1 import adapters_pb2 as pb
from hueshift.v1 import finetune_pb2

SIZE = len(DATA)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with serve_adapters(tmp_path) as running:
        running.store.adapters.storage.quota = StorageQuota(most=2 * SIZE + 10, own={"other": 0})
        yield running


def storage(running: Running, tenant: str = "acme") -> tuple[int, int, int]:
    told = running.call("GetStorage", pb.GetStorageRequest(), tenant)
    return told.adapter_bytes, told.picture_bytes, told.limit_bytes


def test_an_import_beyond_the_limit_is_refused_before_its_bytes(running: Running) -> None:
    running.import_file(adapter_id="a", idempotency_key="k")
    running.import_file(small_file(1)[1], adapter_id="b")
    written: list[Path] = []

    def messages() -> Iterator[pb.ImportAdapterRequest]:
        yield import_spec(size_bytes=SIZE, adapter_id="c")
        for _ in range(100):
            written.extend(running.store.temporaries())
            yield chunk(b"x")

    with pytest.raises(grpc.RpcError) as caught:
        running.call("ImportAdapter", messages())
    assert written == []
    code, reason, message = failure_of(caught.value)
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "TENANT_STORAGE")
    assert f"you store {2 * SIZE}" in message
    assert f"allowed: {2 * SIZE + 10} in all. Delete adapters" in message
    error: Any = caught.value
    status = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info, quota = ErrorInfo(), QuotaFailure()
    assert any(detail.Unpack(info) for detail in status.details)
    assert any(detail.Unpack(quota) for detail in status.details)
    # Nothing but the tenant's own doing makes room, so no client tries again by itself.
    assert (info.metadata["used"], info.metadata["retryable"]) == (str(2 * SIZE), "false")
    assert (quota.violations[0].subject, storage(running)) == ("tenant", (2 * SIZE, 0, 2 * SIZE + 10))
    # A repetition stores nothing, and a tenant with a limit of its own has that.
    assert running.import_file(adapter_id="a", idempotency_key="k").replayed
    for seed in range(3):
        running.import_file(small_file(seed)[1], tenant="other", adapter_id="a")
    assert storage(running, "other") == (sum(len(small_file(seed)[1]) for seed in range(3)), 0, 0)
    running.call("DeleteAdapter", pb.DeleteAdapterRequest(name="a"))
    running.import_file(adapter_id="c")


def test_a_combination_beyond_the_limit_is_refused(running: Running) -> None:
    for adapter_id, seed in (("a", 0), ("b", 1)):
        running.import_file(small_file(seed)[1], adapter_id=adapter_id)
    between = pb.AdapterInterpolation(first=pb.AdapterRef(adapter="a"), second=pb.AdapterRef(adapter="b"), position=0.5)
    request = pb.CombineAdaptersRequest(adapter_id="c", interpolation=between)
    # There is room for ten bytes, which no combination fits into: known once it is made, and nothing is stored.
    for quota in (2 * SIZE + 10, 2 * SIZE):
        running.store.adapters.storage.quota = StorageQuota(most=quota)
        assert running.refused("CombineAdapters", request)[1] == "TENANT_STORAGE"
        assert len(running.store.files()) == 2


def test_of_imports_at_once_none_passes_the_limit(running: Running) -> None:
    def attempt(seed: int) -> str:
        try:
            running.import_file(small_file(seed)[1], adapter_id=f"a{seed}")
        except grpc.RpcError as error:
            return failure_of(error)[1]
        return "stored"

    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(attempt, range(6)))
    assert sorted(told) == ["TENANT_STORAGE"] * 4 + ["stored"] * 2


def test_equal_files_count_once(running: Running) -> None:
    for adapter_id in ("a", "b"):
        running.import_file(adapter_id=adapter_id)
    assert storage(running)[0] == SIZE
    running.import_file(tenant="other", adapter_id="a")
    assert running.store.adapters.storage.totals() == Stored(SIZE, 0)


def png(colour: int = 200) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (64, 48), (colour, 90, 20)).save(target, "PNG")
    return target.getvalue()


@pytest_asyncio.fixture
async def live(base_model: BaseModel, tmp_path: Path) -> AsyncIterator[LiveServer]:
    limits = {"tenant_stored_bytes": 20_000, "tenant_stored_bytes_of": {"bob": 10}}
    async with live_server(tmp_path, fake_parts(base_model), limits=limits) as server:
        yield server


async def create(stubs: RpcStubs, size: int, data: bytes, **spec: Any) -> Any:
    def messages() -> Iterator[finetune_pb2.CreateFineTuneRequest]:
        pictures = [finetune_pb2.PictureSpec(size_bytes=size)]
        yield finetune_pb2.CreateFineTuneRequest(
            spec=finetune_pb2.FineTuneSpec(class_noun="animal", pictures=pictures, **spec)
        )
        yield finetune_pb2.CreateFineTuneRequest(chunk=finetune_pb2.PictureChunk(index=0, data=data))

    return await stubs.finetunes.CreateFineTune(messages(), metadata=stubs.metadata, timeout=30)


async def test_pictures_count_while_their_job_needs_them(live: LiveServer) -> None:
    alice, bob = await live.caller("alice"), await live.caller("bob")
    for stubs, size in ((alice, 20_001), (bob, 11)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await create(stubs, size, b"x")
        told = refusal(caught.value)
        assert (told.code, told.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_STORAGE")
        assert list((live.settings.store.path / "jobs").iterdir()) == []
    data = png()
    job = (await create(alice, len(data), data, idempotency_key="k")).fine_tune
    (picture,) = live.stores.folders.pictures(job.name.rpartition("/")[2])
    used = live.stores.adapters.storage.usage("alice")
    # As it is stored, not as it was sent.
    assert used == Stored(0, picture.stat().st_size)
    assert (await create(alice, len(data), data, idempotency_key="k")).replayed
    cancel = finetune_pb2.CancelFineTuneRequest(name=job.name)
    await alice.finetunes.CancelFineTune(cancel, metadata=alice.metadata, timeout=30)
    assert live.stores.adapters.storage.usage("alice") == Stored(0, 0)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_jobs_are_counted_by_what_is_kept_of_them(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    where: str | Path = tmp_path / "hueshift.db"
    if kind == "postgres":
        where = fresh_database(request.getfixturevalue("postgres_server"), "stored")
    clock = FakeClock()
    database = Database(where, clock)
    quota = StorageQuota(most=100, failed_seconds=50)
    jobs, store = JobStore(database, clock, quotas=JobQuotas(storage=quota)), Storage(database, quota)
    kept = Storage(database, StorageQuota(keep_pictures=True))

    def new(job_id: str) -> NewJob:
        return NewJob(job_id, "acme", small_spec(), "fox", "Fox", {}, picture_bytes=60)

    jobs.create(new("ft-1"), tenant_limit=9)
    with pytest.raises(ResourceExhausted, match="60 more bytes asked for; you store 60"):
        jobs.create(new("ft-2"), tenant_limit=9)
    claimed = jobs.claim("worker", 1e9)
    assert claimed is not None
    jobs.fail(claimed.lease, "ATTEMPTS_EXHAUSTED", "why")
    assert store.usage("acme") == Stored(0, 60)
    clock.advance(50)
    assert (store.usage("acme"), kept.usage("acme")) == (Stored(0, 0), Stored(0, 60))
    jobs.create(new("ft-2"), tenant_limit=9)
    assert (store.totals(), kept.totals()) == (Stored(0, 60), Stored(0, 120))
    database.close()


def test_on_postgres_two_that_store_at_once_wait_for_each_other(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    where = fresh_database(request.getfixturevalue("postgres_server"), "at_once")
    clock = FakeClock()
    database = Database(where, clock)
    quota = StorageQuota(most=SIZE + 10)
    store = AdapterStore(database, BlobStore(tmp_path / "blobs"), clock, quota)
    both = threading.Barrier(2)

    def attempt(seed: int) -> bool:
        adapter, data = small_file(seed)
        both.wait(10)
        try:
            with store.write() as connection:
                check_storage(connection, quota, "acme", len(data))
                # Long enough for the other one to look, if it could.
                time.sleep(0.3)
                store.publish("acme", f"a{seed}", "", {}, data, adapter, connection=connection)
        except ResourceExhausted:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(attempt, range(2))) == [False, True]
    database.close()
