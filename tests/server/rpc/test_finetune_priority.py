"""Priorities of jobs over real gRPC: they order one tenant's waiting jobs, and no tenant overtakes another by them."""

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from PIL import Image
from whole_server import LiveServer, fake_parts, live_server, refusal

from hueshift.engines.base_model import BaseModel
from hueshift.v1 import finetune_pb2 as pb
from hueshift.v1 import generation_pb2
from hueshift.v1.generation_pb2 import PRIORITY_HIGH, PRIORITY_LOW, PRIORITY_NORMAL, PRIORITY_UNSPECIFIED


def png() -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 90, 20)).save(target, "PNG")
    return target.getvalue()


@pytest_asyncio.fixture
async def live(base_model: BaseModel, tmp_path: Path) -> AsyncIterator[LiveServer]:
    async with live_server(tmp_path, fake_parts(base_model)) as live:
        yield live


async def create(live: LiveServer, tenant: str, **fields: Any) -> pb.CreateFineTuneResponse:
    stubs = await live.caller(tenant)
    sizes = [pb.PictureSpec(size_bytes=len(png()))]
    spec = pb.FineTuneSpec(**{"class_noun": "animal", "pictures": sizes, **fields})
    messages = [pb.CreateFineTuneRequest(spec=spec)]
    if not spec.validate_only:
        messages.append(pb.CreateFineTuneRequest(chunk=pb.PictureChunk(index=0, data=png())))
    answer: pb.CreateFineTuneResponse = await stubs.finetunes.CreateFineTune(
        iter(messages), metadata=stubs.metadata, timeout=30
    )
    return answer


async def test_higher_jobs_of_a_tenant_are_claimed_first_and_no_tenant_gains_by_them(live: LiveServer) -> None:
    asked = [
        ("bob", "bob-low", PRIORITY_LOW),
        ("alice", "alice-low", PRIORITY_LOW),
        ("alice", "alice-open", PRIORITY_UNSPECIFIED),
        ("alice", "alice-normal", PRIORITY_NORMAL),
        ("alice", "alice-high", PRIORITY_HIGH),
    ]
    told = [(await create(live, tenant, adapter_id=name, priority=value)).fine_tune for tenant, name, value in asked]
    assert [job.priority for job in told] == [
        *(PRIORITY_LOW, PRIORITY_LOW),
        *(PRIORITY_NORMAL, PRIORITY_NORMAL),
        PRIORITY_HIGH,
    ]
    claimed = [live.stores.jobs.claim("worker", 60.0) for _ in asked]
    order = [found.job.adapter_id for found in claimed if found is not None]
    # Bob's waits longest, and one job of each tenant runs before a second one of any.
    assert order == ["bob-low", "alice-high", "alice-open", "alice-normal", "alice-low"]


async def test_a_priority_is_kept_with_the_job(live: LiveServer) -> None:
    created = (await create(live, "alice", priority=PRIORITY_HIGH)).fine_tune
    stubs = await live.caller("alice")
    request = pb.GetFineTuneRequest(name=created.name)
    read = (await stubs.finetunes.GetFineTune(request, metadata=stubs.metadata)).fine_tune
    assert read == created
    claimed = live.stores.jobs.claim("worker", 60.0)
    assert claimed is not None
    live.stores.jobs.fail(claimed.lease, "JOB_TIME_LIMIT", "too long")
    again = await stubs.finetunes.RetryFineTune(pb.RetryFineTuneRequest(name=created.name), metadata=stubs.metadata)
    assert (again.fine_tune.state, again.fine_tune.priority) == (pb.FINE_TUNE_STATE_QUEUED, PRIORITY_HIGH)


async def test_a_dry_run_tells_it_and_an_unknown_one_is_refused(live: LiveServer) -> None:
    plan = (await create(live, "alice", priority=PRIORITY_LOW, validate_only=True)).fine_tune
    assert plan.priority == PRIORITY_LOW
    for validate_only in (True, False):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await create(live, "alice", priority=9, validate_only=validate_only)
        told = refusal(caught.value)
        assert (told.code, told.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["priority"])
        assert "9 is not a value" in told.message
        assert generation_pb2.Priority.Name(PRIORITY_HIGH) in told.message
    assert live.stores.jobs.open_jobs() == set()


async def test_a_key_holds_for_one_priority(live: LiveServer) -> None:
    first = await create(live, "alice", idempotency_key="k", adapter_id="fox", priority=PRIORITY_HIGH)
    same = await create(live, "alice", idempotency_key="k", adapter_id="fox", priority=PRIORITY_HIGH)
    assert same.replayed
    assert same.fine_tune.name == first.fine_tune.name
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create(live, "alice", idempotency_key="k", adapter_id="fox", priority=PRIORITY_LOW)
    assert refusal(caught.value).reason == "IDEMPOTENCY_CONFLICT"
