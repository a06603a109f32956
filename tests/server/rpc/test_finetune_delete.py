"""DeleteFineTune and what DeleteAdapter takes along: nothing of a person's pictures stays, and nothing else goes."""

import asyncio
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from PIL import Image
from small_store import small_file
from sqlalchemy import func, select
from whole_server import LiveServer, Refusal, RpcStubs, fake_parts, live_server, refusal

from hueshift.adapters.adapter import Adapter
from hueshift.engines.base_model import BaseModel
from hueshift.server.store.job_records import ClaimedJob
from hueshift.server.store.tables import job_events
from hueshift.v1 import adapters_pb2
from hueshift.v1 import finetune_pb2 as pb


def png() -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 90, 20)).save(target, "PNG")
    return target.getvalue()


class Caller:
    """One tenant's jobs."""

    def __init__(self, live: LiveServer, stubs: RpcStubs) -> None:
        self.live, self.stubs = live, stubs
        self.folder = live.settings.store.path / "jobs"

    async def queue(self, adapter_id: str = "fox") -> str:
        """Queue a job and return its id."""

        def messages() -> Iterator[pb.CreateFineTuneRequest]:
            pictures = [pb.PictureSpec(size_bytes=len(png()))]
            spec = pb.FineTuneSpec(adapter_id=adapter_id, class_noun="animal", pictures=pictures)
            yield pb.CreateFineTuneRequest(spec=spec)
            yield pb.CreateFineTuneRequest(chunk=pb.PictureChunk(index=0, data=png()))

        job = (await self.call("CreateFineTune", messages())).fine_tune
        return str(job.name).rpartition("/")[2]

    async def call(self, method: str, request: Any) -> Any:
        stub = self.stubs.adapters if "Adapter" in method else self.stubs.finetunes
        return await getattr(stub, method)(request, metadata=self.stubs.metadata, timeout=30)

    async def refused(self, method: str, request: Any) -> Refusal:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(method, request)
        return refusal(caught.value)

    def claim(self) -> ClaimedJob:
        claimed = self.live.stores.jobs.claim("worker", 60.0)
        assert claimed is not None
        return claimed

    def fail(self) -> None:
        """Take the next job, show a sample of it, and give it up in a way that can be retried."""
        lease = self.claim().lease
        self.live.stores.jobs.sample(lease, 1, "a fox", png())
        self.live.stores.jobs.fail(lease, "ATTEMPTS_EXHAUSTED", "why")

    def publish(self, adapter_id: str) -> None:
        adapter, data = small_file(0)
        assert isinstance(adapter, Adapter)
        self.live.stores.adapters.publish("alice", adapter_id, "", {}, data, adapter)

    def folders(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def events(self) -> int:
        with self.live.stores.database.read() as connection:
            return connection.scalar(select(func.count()).select_from(job_events)) or 0


@pytest_asyncio.fixture
async def alice(base_model: BaseModel, tmp_path: Path) -> AsyncIterator[Caller]:
    async with live_server(tmp_path, fake_parts(base_model)) as live:
        yield Caller(live, await live.caller("alice"))


async def test_a_failed_job_goes_with_its_pictures_and_samples(alice: Caller) -> None:
    failed = await alice.queue()
    alice.fail()
    waiting = await alice.queue()
    assert alice.folders() == {failed, waiting}
    (picture,) = alice.live.stores.folders.pictures(failed)
    size = picture.stat().st_size
    request = pb.DeleteFineTuneRequest(name=failed, idempotency_key="once")
    answer = await alice.call("DeleteFineTune", request)
    assert (answer.events, answer.picture_bytes) == (4, size)
    assert (alice.folders(), alice.events()) == ({waiting}, 1)
    assert (await alice.refused("GetFineTune", pb.GetFineTuneRequest(name=failed))).reason == "FINE_TUNE_NOT_FOUND"
    # Said again it succeeds, and does what a crash may have left undone.
    (alice.folder / failed / "pictures").mkdir(parents=True)
    assert await alice.call("DeleteFineTune", request) == answer
    assert alice.folders() == {waiting}
    other = pb.DeleteFineTuneRequest(name=waiting, idempotency_key="once")
    assert (await alice.refused("DeleteFineTune", other)).reason == "IDEMPOTENCY_CONFLICT"
    assert (
        await alice.refused("DeleteFineTune", pb.DeleteFineTuneRequest(name=failed))
    ).reason == "FINE_TUNE_NOT_FOUND"


async def test_a_running_job_is_cancelled_first_and_a_waiting_one_is_never_taken(alice: Caller) -> None:
    job = await alice.queue()
    lease = alice.claim().lease
    told = await alice.refused("DeleteFineTune", pb.DeleteFineTuneRequest(name=job))
    assert (told.code, told.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "FINE_TUNE_RUNNING")
    assert "Cancel it" in told.message
    assert alice.live.stores.folders.pictures(job)
    await alice.call("CancelFineTune", pb.CancelFineTuneRequest(name=job))
    alice.live.stores.jobs.stop_cancelled(lease)
    answer = await alice.call("DeleteFineTune", pb.DeleteFineTuneRequest(name=job))
    # The pictures had gone when it ended.
    assert answer.picture_bytes == 0
    queued = await alice.queue()
    await alice.call("DeleteFineTune", pb.DeleteFineTuneRequest(name=queued))
    assert alice.live.stores.jobs.claim("worker", 60.0) is None
    assert alice.folders() == set()


async def test_a_watch_of_a_deleted_job_ends(alice: Caller) -> None:
    job = await alice.queue()
    call = alice.stubs.finetunes.WatchFineTune(
        pb.WatchFineTuneRequest(name=job), metadata=alice.stubs.metadata, timeout=30
    )
    assert (await call.read()).state_change.state == pb.FINE_TUNE_STATE_QUEUED
    await alice.call("DeleteFineTune", pb.DeleteFineTuneRequest(name=job))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(10):
            await call.read()
    assert refusal(caught.value).reason == "FINE_TUNE_NOT_FOUND"


async def test_another_tenant_deletes_nothing(alice: Caller) -> None:
    job = await alice.queue()
    bob = Caller(alice.live, await alice.live.caller("bob"))
    for name in (job, f"tenants/alice/fineTunes/{job}"):
        assert (
            await bob.refused("DeleteFineTune", pb.DeleteFineTuneRequest(name=name))
        ).reason == "FINE_TUNE_NOT_FOUND"
    long_key = pb.DeleteFineTuneRequest(name=job, idempotency_key="k" * 65)
    assert (await alice.refused("DeleteFineTune", long_key)).fields == ["idempotency_key"]
    assert alice.folders() == {job}


async def test_an_adapter_takes_its_ended_jobs_along(alice: Caller) -> None:
    failed, elsewhere = await alice.queue(), await alice.queue("owl")
    alice.fail()
    alice.fail()
    waiting = await alice.queue()
    alice.publish("fox")
    answer = await alice.call("DeleteAdapter", adapters_pb2.DeleteAdapterRequest(name="fox", idempotency_key="k"))
    assert (answer.revisions, answer.fine_tunes) == (1, 1)
    assert alice.folders() == {elsewhere, waiting}
    left = await alice.call("ListFineTunes", pb.ListFineTunesRequest())
    assert {job.name.rpartition("/")[2] for job in left.fine_tunes} == {elsewhere, waiting}
    # What a crash left undone is done by the repetition.
    (alice.folder / failed).mkdir()
    again = adapters_pb2.DeleteAdapterRequest(name="fox", idempotency_key="k")
    assert await alice.call("DeleteAdapter", again) == answer
    assert alice.folders() == {elsewhere, waiting}
