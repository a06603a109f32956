"""The asyncio client: the parts that are its own, and that its surface is the blocking client's."""

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest
from fake_service import Failure, FakeServer, State, job_events, job_message, png

from hueshift.client import errors
from hueshift.client.aio import AsyncClient
from hueshift.client.combination import Sum
from hueshift.client.generation import Finished, Picture, Progress, Queued
from hueshift.client.jobs import FineTuneFailed
from hueshift.client.retry import RetryPolicy
from hueshift.client.sync import Client

BUSY = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", "QUEUE_FULL", retryable=True, retry_after=0.02)


@pytest.fixture
async def client(fake: FakeServer, quick: RetryPolicy) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake.address, api_key="hs_key", retry=quick) as client:
        yield client


def test_the_surface_is_the_blocking_clients() -> None:
    def surface(kind: type) -> dict[str, list[str]]:
        members = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(f).parameters) for name, f in members if not name.startswith("_")}

    assert surface(AsyncClient) == surface(Client)


async def test_generate(fake: FakeServer, client: AsyncClient) -> None:
    fake.service.fail("Generate", BUSY)
    kinds = [type(event) async for event in client.generate("a fox", count=1)]
    assert kinds == [Queued, Progress, Picture, Finished]
    pictures = await client.generate_images("a fox", count=3, seeds=[5])
    assert [picture.seed for picture in pictures] == [5, 6, 7]
    assert fake.service.metadata[0]["authorization"] == "Bearer hs_key"


async def test_generate_is_not_repeated_after_its_first_event(fake: FakeServer, client: AsyncClient) -> None:
    fake.service.fail("Generate", Failure(grpc.StatusCode.UNAVAILABLE, retryable=True, after=1))
    with pytest.raises(errors.Unavailable):
        await client.generate_images("a fox")
    assert len(fake.service.seen["Generate"]) == 1


async def test_cancelling_the_task_cancels_the_call(fake: FakeServer, client: AsyncClient) -> None:
    fake.service.hang_generate = True
    begun = asyncio.Event()

    async def consume() -> None:
        async with aclosing(client.generate("a fox")) as events:
            async for _ in events:
                begun.set()

    task = asyncio.create_task(consume())
    await asyncio.wait_for(begun.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(fake.service.cancelled.wait, 5)


async def test_adapters(client: AsyncClient, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.write_bytes(b"x" * 3000)
    await client.wait_until_ready(5)
    await client.import_adapter(path, adapter_id="fox")
    await client.import_adapter(b"y", adapter_id="owl")
    assert [adapter.id async for adapter in client.list_adapters(page_size=1)] == ["fox", "owl"]
    assert (await client.export_adapter("fox")).data == path.read_bytes()
    assert (await client.update_adapter("fox", display_name="Fox")).display_name == "Fox"
    assert (await client.combine_adapters(Sum({"fox": 0.5, "owl": 0.5}), adapter_id="both")).id == "both"
    assert (await client.warm_adapter("fox")).loaded
    assert (await client.storage()).limit == 1024 * 1024
    assert (await client.delete_adapter("fox")).revisions == 1
    with pytest.raises(errors.NotFound):
        await client.get_adapter("fox")
    assert (await client.model()).name == "models/emoji-128"
    assert [model.name async for model in client.list_models()] == ["models/emoji-128"]


async def test_jobs(fake: FakeServer, client: AsyncClient) -> None:
    fake.service.events = job_events()
    fake.service.fail("WatchFineTune", Failure(grpc.StatusCode.UNAVAILABLE, bare=True, after=2))
    fake.service.fail("CreateFineTune", BUSY)
    job = await client.fine_tune([png()], class_noun="fox")
    assert len(fake.service.seen["CreateFineTune"]) == 2
    assert [event.sequence async for event in client.watch(job)] == [1, 2, 3, 4, 5]
    fake.service.job = job_message(State.FINE_TUNE_STATE_FAILED)
    with pytest.raises(FineTuneFailed):
        await client.wait_for_job(job)
    assert (await client.get_job(job.name)).error is not None
    assert [found.id async for found in client.list_jobs()] == ["job-1"]
    assert (await client.cancel_job(job)).state.ended
    assert not (await client.retry_job(job)).state.ended
    assert (await client.delete_job(job)).picture_bytes == 2048


async def test_a_server_that_is_not_there(quick: RetryPolicy) -> None:
    async with AsyncClient("127.0.0.1:1", retry=quick) as client:
        with pytest.raises(errors.Unavailable, match="not ready"):
            await client.wait_until_ready(0.3)
