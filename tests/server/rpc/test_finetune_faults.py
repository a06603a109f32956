"""FineTuneService where the database breaks while it commits, and where a watch has more to tell than memory holds."""

import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from PIL import Image
from whole_server import LiveServer, RpcStubs, fake_parts, live_server, refusal

from hueshift.adapters.errors import Reason, Unavailable
from hueshift.engines.base_model import BaseModel
from hueshift.server.store.job_store import JobStore
from hueshift.v1 import finetune_pb2 as pb


class Caller:
    """One tenant's jobs."""

    def __init__(self, live: LiveServer, stubs: RpcStubs) -> None:
        self.live, self.stubs = live, stubs

    async def queue(self) -> pb.CreateFineTuneResponse:
        target = io.BytesIO()
        Image.new("RGB", (64, 48), (200, 90, 20)).save(target, "PNG")
        data = target.getvalue()

        def messages() -> Iterator[pb.CreateFineTuneRequest]:
            pictures = [pb.PictureSpec(size_bytes=len(data))]
            spec = pb.FineTuneSpec(class_noun="animal", pictures=pictures, idempotency_key="once")
            yield pb.CreateFineTuneRequest(spec=spec)
            yield pb.CreateFineTuneRequest(chunk=pb.PictureChunk(index=0, data=data))

        call = self.stubs.finetunes.CreateFineTune(messages(), metadata=self.stubs.metadata, timeout=30)
        answer: pb.CreateFineTuneResponse = await call
        return answer


@pytest_asyncio.fixture
async def alice(base_model: BaseModel, tmp_path: Path) -> AsyncIterator[Caller]:
    async with live_server(tmp_path, fake_parts(base_model)) as live:
        yield Caller(live, await live.caller("alice"))


async def test_a_job_that_was_committed_without_a_word_keeps_its_pictures(
    alice: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = JobStore.create

    def lose_the_answer(*arguments: Any, **named: Any) -> Any:
        create(*arguments, **named)
        raise Unavailable(Reason.STORE_UNAVAILABLE, "the connection broke while it committed")

    with monkeypatch.context() as broken:
        broken.setattr(JobStore, "create", lose_the_answer)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await alice.queue()
    assert refusal(caught.value).reason == "STORE_UNAVAILABLE"
    again = await alice.queue()
    assert again.replayed
    job_id = again.fine_tune.name.rpartition("/")[2]
    assert len(alice.live.stores.folders.pictures(job_id)) == 1
    assert [path.name for path in (alice.live.settings.store.path / "jobs").iterdir()] == [job_id]


async def test_a_watch_from_the_beginning_goes_through_more_samples_than_one_read_takes(alice: Caller) -> None:
    job = (await alice.queue()).fine_tune
    jobs = alice.live.stores.jobs
    claimed = jobs.claim("worker", 60.0)
    assert claimed is not None
    for step in range(1, 4):
        jobs.progress(claimed.lease, step, 0.5, 0.25)
        jobs.sample(claimed.lease, step, "a prompt", bytes([step]) * 1_500_000)
    jobs.fail(claimed.lease, "TRAINING_DIVERGED", "lower the learning rate")
    request = pb.WatchFineTuneRequest(name=job.name)
    call = alice.stubs.finetunes.WatchFineTune(request, metadata=alice.stubs.metadata, timeout=30)
    events = [event async for event in call]
    assert [event.sequence for event in events] == list(range(1, 10))
    assert [event.sample.data[0] for event in events if event.HasField("sample")] == [1, 2, 3]
