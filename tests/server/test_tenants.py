"""Every RPC against credentials and tenants: no key, a wrong key, and another tenant's adapter or job."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from PIL import Image
from whole_server import LiveServer, Refusal, RpcStubs, adapter_file, fake_parts, live_server, refusal

from hueshift.engines.base_model import BaseModel
from hueshift.v1 import adapters_pb2 as adapters_pb
from hueshift.v1 import finetune_pb2 as finetune_pb
from hueshift.v1 import generation_pb2 as generation_pb
from hueshift.v1 import model_pb2 as model_pb

ADAPTER = "tenants/{tenant}/adapters/{id}"
JOB = "tenants/{tenant}/fineTunes/{id}"
Call = Callable[[RpcStubs, str], Awaitable[Any]]


async def drain(stream: Any) -> list[Any]:
    return [message async for message in stream]


def uploads(*messages: Any) -> Any:
    return iter(messages)


def picture() -> bytes:
    file = BytesIO()
    Image.new("RGB", (64, 64), "orange").save(file, "PNG")
    return file.getvalue()


def fine_tune(adapter_id: str = "") -> list[finetune_pb.CreateFineTuneRequest]:
    data = picture()
    spec = finetune_pb.FineTuneSpec(
        adapter_id=adapter_id,
        class_noun="animal",
        settings=finetune_pb.FineTuneSettings(steps=1),
        pictures=[finetune_pb.PictureSpec(size_bytes=len(data))],
    )
    chunk = finetune_pb.PictureChunk(index=0, data=data)
    return [finetune_pb.CreateFineTuneRequest(spec=spec), finetune_pb.CreateFineTuneRequest(chunk=chunk)]


def generate(stubs: RpcStubs, name: str) -> Awaitable[Any]:
    request = generation_pb.GenerateRequest(
        prompt="a fox", steps=1, adapters=[generation_pb.AdapterUse(adapter=name)] if name else []
    )
    return drain(stubs.generation.Generate(request, metadata=stubs.metadata))


# Calls that name an adapter, and calls that name a job.
ON_ADAPTERS: dict[str, Call] = {
    "Generate": generate,
    "GetAdapter": lambda s, n: s.adapters.GetAdapter(adapters_pb.GetAdapterRequest(name=n), metadata=s.metadata),
    "ExportAdapter": lambda s, n: drain(
        s.adapters.ExportAdapter(adapters_pb.ExportAdapterRequest(name=n), metadata=s.metadata)
    ),
    "UpdateAdapter": lambda s, n: s.adapters.UpdateAdapter(
        adapters_pb.UpdateAdapterRequest(
            adapter=adapters_pb.Adapter(name=n, display_name="mine now"), update_mask=FieldMask(paths=["display_name"])
        ),
        metadata=s.metadata,
    ),
    "CombineAdapters": lambda s, n: s.adapters.CombineAdapters(
        adapters_pb.CombineAdaptersRequest(
            adapter_id="fox", sum=adapters_pb.AdapterSum(parts=[generation_pb.AdapterUse(adapter=n)])
        ),
        metadata=s.metadata,
    ),
    "WarmAdapter": lambda s, n: s.adapters.WarmAdapter(
        adapters_pb.WarmAdapterRequest(name=n, pin=True), metadata=s.metadata
    ),
    "DeleteAdapter": lambda s, n: s.adapters.DeleteAdapter(
        adapters_pb.DeleteAdapterRequest(name=n), metadata=s.metadata
    ),
}
ON_JOBS: dict[str, Call] = {
    "GetFineTune": lambda s, n: s.finetunes.GetFineTune(finetune_pb.GetFineTuneRequest(name=n), metadata=s.metadata),
    "WatchFineTune": lambda s, n: drain(
        s.finetunes.WatchFineTune(finetune_pb.WatchFineTuneRequest(name=n), metadata=s.metadata)
    ),
    "CancelFineTune": lambda s, n: s.finetunes.CancelFineTune(
        finetune_pb.CancelFineTuneRequest(name=n), metadata=s.metadata
    ),
    "RetryFineTune": lambda s, n: s.finetunes.RetryFineTune(
        finetune_pb.RetryFineTuneRequest(name=n), metadata=s.metadata
    ),
    "DeleteFineTune": lambda s, n: s.finetunes.DeleteFineTune(
        finetune_pb.DeleteFineTuneRequest(name=n), metadata=s.metadata
    ),
}
# Calls that name nothing of a tenant's.
ON_NOTHING: dict[str, Call] = {
    "ImportAdapter": lambda s, _: s.adapters.ImportAdapter(
        uploads(adapters_pb.ImportAdapterRequest(spec=adapters_pb.ImportAdapterSpec(size_bytes=1))),
        metadata=s.metadata,
    ),
    "ListAdapters": lambda s, _: s.adapters.ListAdapters(adapters_pb.ListAdaptersRequest(), metadata=s.metadata),
    "GetStorage": lambda s, _: s.adapters.GetStorage(adapters_pb.GetStorageRequest(), metadata=s.metadata),
    "CreateFineTune": lambda s, _: s.finetunes.CreateFineTune(uploads(*fine_tune()), metadata=s.metadata),
    "ListFineTunes": lambda s, _: s.finetunes.ListFineTunes(finetune_pb.ListFineTunesRequest(), metadata=s.metadata),
    "GetModel": lambda s, _: s.models.GetModel(model_pb.GetModelRequest(), metadata=s.metadata),
    "ListModels": lambda s, _: s.models.ListModels(model_pb.ListModelsRequest(), metadata=s.metadata),
}
EVERYTHING = {**ON_ADAPTERS, **ON_JOBS, **ON_NOTHING}


@dataclass
class Owned:
    """A server on which `acme` owns an adapter and a queued job, and `rival` owns nothing."""

    live: LiveServer
    acme: RpcStubs
    rival: RpcStubs
    job_id: str

    def names(self, call: str, tenant: str, other_id: str = "") -> str:
        if call in ON_ADAPTERS:
            return ADAPTER.format(tenant=tenant, id=other_id or "fox")
        return JOB.format(tenant=tenant, id=other_id or self.job_id)


@pytest_asyncio.fixture
async def owned(base_model: BaseModel, tmp_path: Path) -> AsyncIterator[Owned]:
    async with live_server(tmp_path, fake_parts(base_model)) as live:
        acme, rival = await live.caller("acme"), await live.caller("rival")
        await acme.import_adapter("fox", adapter_file(base_model, 0.5))
        created = await acme.finetunes.CreateFineTune(iter(fine_tune("later")), metadata=acme.metadata)
        yield Owned(live, acme, rival, created.fine_tune.name.rpartition("/")[2])


async def fails(call: Awaitable[Any]) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value)


def test_the_tables_cover_the_contract() -> None:
    methods = {
        method.name
        for file in (generation_pb, adapters_pb, finetune_pb, model_pb)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == set(EVERYTHING)


@pytest.mark.parametrize("key", [None, "hs_0123456789abcdef_" + "x" * 43, "nonsense"])
async def test_no_rpc_answers_a_stranger(owned: Owned, key: str | None) -> None:
    async with grpc.aio.insecure_channel(owned.live.addresses.grpc) as channel:
        stranger = RpcStubs(channel, key)
        for name, call in EVERYTHING.items():
            told = await fails(call(stranger, owned.names(name, "acme")))
            assert told.code is grpc.StatusCode.UNAUTHENTICATED, name
            assert told.reason == ("CREDENTIAL_INVALID" if key else "CREDENTIAL_MISSING")


async def test_anothers_adapter_or_job_is_like_one_that_is_not_there(owned: Owned) -> None:
    for name, call in {**ON_ADAPTERS, **ON_JOBS}.items():
        # By full name: as a name in acme's collection that never was.
        theirs, ghost = owned.names(name, "acme"), owned.names(name, "acme", "ghost")
        there, absent = await fails(call(owned.rival, theirs)), await fails(call(owned.rival, ghost))
        assert there.code is absent.code is grpc.StatusCode.NOT_FOUND, name
        assert there.reason == absent.reason
        assert there.message == absent.message.replace(ghost, theirs)
        assert there.metadata == absent.metadata
        assert there.resource == absent.resource.replace(ghost, theirs)
        # By bare id: as an id of one's own that never was.
        bare = theirs.rpartition("/")[2]
        there, absent = await fails(call(owned.rival, bare)), await fails(call(owned.rival, "ghost"))
        assert there.code is grpc.StatusCode.NOT_FOUND, name
        assert there.message.replace(bare, "ghost") == absent.message
        assert "acme" not in there.message
    # And nothing of it had an effect.
    record = (await ON_ADAPTERS["GetAdapter"](owned.acme, "fox")).adapter
    assert (record.display_name, record.pinned) == ("fox", False)
    job = (await ON_JOBS["GetFineTune"](owned.acme, owned.job_id)).fine_tune
    assert job.state == finetune_pb.FINE_TUNE_STATE_QUEUED


async def test_lists_show_ones_own_only(owned: Owned) -> None:
    for stubs, count in ((owned.acme, 1), (owned.rival, 0)):
        assert len((await ON_NOTHING["ListAdapters"](stubs, "")).adapters) == count
        assert len((await ON_NOTHING["ListFineTunes"](stubs, "")).fine_tunes) == count


async def test_the_owner_is_answered_on_every_rpc(owned: Owned) -> None:
    last = ("WatchFineTune", "DeleteFineTune", "DeleteAdapter")
    order = sorted(EVERYTHING, key=lambda name: last.index(name) if name in last else -1)
    for name in order:
        if name == "ImportAdapter":
            continue
        if name == "RetryFineTune":
            assert (await fails(EVERYTHING[name](owned.acme, owned.names(name, "acme")))).reason == "JOB_NOT_RETRYABLE"
            continue
        await asyncio.wait_for(EVERYTHING[name](owned.acme, owned.names(name, "acme")), 20)


async def test_equal_bytes_of_two_tenants_stay_apart(owned: Owned, base_model: BaseModel) -> None:
    """The same file in two tenants has one content hash; deleting one tenant's must not touch the other's."""
    await owned.rival.import_adapter("fox", adapter_file(base_model, 0.5))
    mine = await owned.acme.images(seeds=[3], adapters=[generation_pb.AdapterUse(adapter="fox")])
    await ON_ADAPTERS["DeleteAdapter"](owned.rival, "fox")
    assert await owned.acme.images(seeds=[3], adapters=[generation_pb.AdapterUse(adapter="fox")]) == mine
    assert (await fails(generate(owned.rival, "fox"))).code is grpc.StatusCode.NOT_FOUND
