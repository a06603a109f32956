"""Edits over the contract: what is queued, what is refused, what a record tells, and what the model offers."""

import io
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from PIL import Image
from whole_server import LiveServer, RpcStubs, fake_parts, live_server, refusal

from hueshift.engines.base_model import BaseModel
from hueshift.server.rpc.finetune_messages import to_message
from hueshift.training.spec import SubjectKind
from hueshift.v1 import finetune_pb2 as pb
from hueshift.v1 import model_pb2


@pytest_asyncio.fixture
async def live(base_model: BaseModel, tmp_path: Path) -> AsyncIterator[LiveServer]:
    async with live_server(tmp_path, fake_parts(base_model)) as server:
        yield server


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


async def create(stubs: RpcStubs, data: bytes, **fields: Any) -> pb.FineTune:
    picture = pb.PictureSpec(caption="a red apple", size_bytes=len(data))
    spec = pb.FineTuneSpec(**{"subject": pb.FINE_TUNE_SUBJECT_EDIT, "pictures": [picture], **fields})
    messages = [
        pb.CreateFineTuneRequest(spec=spec),
        pb.CreateFineTuneRequest(chunk=pb.PictureChunk(index=0, data=data)),
    ]
    answer: pb.CreateFineTuneResponse = await stubs.finetunes.CreateFineTune(
        iter(messages), metadata=stubs.metadata, timeout=30
    )
    return answer.fine_tune


async def test_an_edit_is_queued_and_its_record_tells_the_errors(live: LiveServer) -> None:
    alice = await live.caller("alice")
    job = await create(alice, png())
    assert (job.method, job.subject) == (pb.FINE_TUNE_METHOD_SVDIFF, pb.FINE_TUNE_SUBJECT_EDIT)
    stored = live.stores.jobs.get("alice", job.name.rpartition("/")[2])
    assert stored.spec.subject_kind is SubjectKind.EDIT
    assert (stored.spec.identifier, stored.spec.captions) == ("", ("a red apple",))
    told = to_message(replace(stored, scores={"inversion_error": 0.25, "inversion_error_base": 0.5}))
    assert (told.scores.inversion_error, told.scores.inversion_error_base) == (0.25, 0.5)
    assert not to_message(replace(stored, scores={"clip_i": 0.5})).scores.HasField("inversion_error")


async def test_what_an_edit_cannot_have_is_named(live: LiveServer) -> None:
    alice = await live.caller("alice")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create(alice, png(), identifier="sks", method=pb.FINE_TUNE_METHOD_TEXTUAL_INVERSION)
    assert set(refusal(caught.value).fields) == {"identifier", "method"}


async def test_the_model_tells_what_edits_take(live: LiveServer) -> None:
    stubs = await live.caller("alice")
    answer = await stubs.models.GetModel(model_pb2.GetModelRequest(), metadata=stubs.metadata)
    edits = {info.method: info.edit_defaults for info in answer.model.methods if info.HasField("edit_defaults")}
    assert pb.FINE_TUNE_METHOD_TEXTUAL_INVERSION not in edits
    assert edits[pb.FINE_TUNE_METHOD_SVDIFF].anchor_below == 0
    assert edits[pb.FINE_TUNE_METHOD_SVDIFF].prior_weight == 0
