"""FineTuneService over real gRPC: uploads, their refusals, repetition, quotas, pages, watching, cancelling."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from PIL import Image
from small_jobs import SMALL_ADAPTER
from whole_server import LiveServer, Refusal, RpcStubs, fake_parts, live_server, refusal

from hueshift.engines.base_model import BaseModel
from hueshift.server.store.job_records import ClaimedJob
from hueshift.v1 import finetune_pb2 as pb

LIMITS = {"max_picture_bytes": 50_000, "max_pictures": 3, "max_pictures_bytes": 60_000, "tenant_queued_jobs": 3}
Message = pb.CreateFineTuneRequest


def png(red: int = 200, side: int = 64) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (side, side), (red, 90, 20)).save(target, "PNG")
    return target.getvalue()


def spec_of(pictures: Iterable[bytes], **fields: Any) -> Message:
    sizes = [pb.PictureSpec(size_bytes=len(data)) for data in pictures]
    return Message(spec=pb.FineTuneSpec(**{"class_noun": "animal", "pictures": sizes, **fields}))


def chunk(index: int, data: bytes) -> Message:
    return Message(chunk=pb.PictureChunk(index=index, data=data))


def upload(pictures: list[bytes], size: int = 100, **fields: Any) -> Iterator[Message]:
    yield spec_of(pictures, **fields)
    for index, data in enumerate(pictures):
        for begin in range(0, len(data), size):
            yield chunk(index, data[begin : begin + size])


class Caller:
    """One tenant's calls."""

    def __init__(self, live: LiveServer, stubs: RpcStubs, tenant: str) -> None:
        self.live, self.stubs, self.tenant = live, stubs, tenant
        self.folder = live.settings.store.path / "jobs"

    async def call(self, method: str, request: Any) -> Any:
        return await getattr(self.stubs.finetunes, method)(request, metadata=self.stubs.metadata, timeout=30)

    async def create(self, messages: Iterable[Message]) -> pb.CreateFineTuneResponse:
        answer: pb.CreateFineTuneResponse = await self.call("CreateFineTune", iter(messages))
        return answer

    async def queue(self, **fields: Any) -> pb.FineTune:
        return (await self.create(upload([png()], **fields))).fine_tune

    async def refused(self, messages: Iterable[Message]) -> Refusal:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.create(messages)
        return refusal(caught.value)

    async def watch(self, name: str, after: int = 0) -> list[pb.WatchFineTuneResponse]:
        request = pb.WatchFineTuneRequest(name=name, after_sequence=after)
        call = self.stubs.finetunes.WatchFineTune(request, metadata=self.stubs.metadata, timeout=30)
        return [event async for event in call]

    def left_behind(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def claim(self) -> ClaimedJob:
        claimed = self.live.stores.jobs.claim("worker", 60.0)
        assert claimed is not None
        return claimed


@pytest_asyncio.fixture
async def alice(base_model: BaseModel, tmp_path: Path) -> AsyncIterator[Caller]:
    async with live_server(tmp_path, fake_parts(base_model), limits=LIMITS) as live:
        yield Caller(live, await live.caller("alice"), "alice")


async def test_a_job_is_queued_with_its_pictures_made_harmless(alice: Caller) -> None:
    pictures = [png(10), png(20, 80)]
    settings = pb.FineTuneSettings(steps=7, sample_interval=0, seed=2**63 + 1)
    fields: dict[str, Any] = {
        "adapter_id": "fox",
        "display_name": "Fox",
        "labels": {"kind": "animal"},
        "settings": settings,
    }
    job = (await alice.create(upload(pictures, **fields))).fine_tune
    job_id = job.name.rpartition("/")[2]
    assert job.name == f"tenants/alice/fineTunes/{job_id}"
    assert job.adapter == "tenants/alice/adapters/fox"
    assert (job.state, job.method, job.subject) == (
        pb.FINE_TUNE_STATE_QUEUED,
        pb.FINE_TUNE_METHOD_SVDIFF,
        pb.FINE_TUNE_SUBJECT_SUBJECT,
    )
    assert (job.step, job.steps, job.attempt, job.revision, job.sequence) == (0, 7, 0, 0, 1)
    assert job.HasField("create_time")
    assert not any(job.HasField(name) for name in ("loss", "error", "scores", "start_time", "end_time"))
    stored = alice.live.stores.jobs.get("alice", job_id)
    assert stored.spec.captions == ("a sks animal", "a sks animal")
    assert stored.spec.seed == 2**63 + 1
    assert (stored.display_name, stored.labels) == ("Fox", {"kind": "animal"})
    sizes = []
    for path in alice.live.stores.folders.pictures(job_id):
        with Image.open(path) as image:
            sizes.append((image.format, image.size))
    assert sizes == [("PNG", (64, 64)), ("PNG", (80, 80))]
    # Nothing of the raw upload is kept.
    assert sorted(path.name for path in (alice.folder / job_id).iterdir()) == ["pictures", "work"]
    assert (await alice.call("GetFineTune", pb.GetFineTuneRequest(name=job_id))).fine_tune == job


GOOD = [png(10), png(20)]
BIG = b"x" * 50_001
OUT_OF_STEP: dict[str, tuple[Callable[[], list[Message]], str, list[str]]] = {
    "nothing": (list, "MESSAGE_OUT_OF_ORDER", []),
    "an empty message": (lambda: [Message()], "MESSAGE_OUT_OF_ORDER", []),
    "chunk first": (lambda: [chunk(0, b"x")], "MESSAGE_OUT_OF_ORDER", []),
    "spec twice": (lambda: [spec_of(GOOD), spec_of(GOOD)], "MESSAGE_OUT_OF_ORDER", []),
    "second picture first": (lambda: [spec_of(GOOD), chunk(1, GOOD[1])], "MESSAGE_OUT_OF_ORDER", []),
    "negative index": (lambda: [spec_of(GOOD), chunk(-1, GOOD[1])], "MESSAGE_OUT_OF_ORDER", []),
    "picture too many": (lambda: [*upload(GOOD), chunk(2, b"x")], "MESSAGE_OUT_OF_ORDER", []),
    "stream ends early": (
        lambda: list(upload(GOOD))[:-1],
        "UPLOAD_SIZE_MISMATCH",
        ["pictures[1].size_bytes"],
    ),
    "picture too short": (
        lambda: [spec_of(GOOD), chunk(0, b"x"), chunk(1, GOOD[1])],
        "UPLOAD_SIZE_MISMATCH",
        ["pictures[0].size_bytes"],
    ),
    "picture too long": (
        lambda: [spec_of(GOOD), chunk(0, GOOD[0] + b"x")],
        "UPLOAD_SIZE_MISMATCH",
        ["pictures[0].size_bytes"],
    ),
    "empty chunk": (lambda: [spec_of(GOOD), chunk(0, b"")], "INVALID_FIELD", ["chunk.data"]),
    "chunk too large": (lambda: [spec_of(GOOD), chunk(0, b"x" * 1048577)], "UPLOAD_TOO_LARGE", ["chunk.data"]),
    "no picture": (lambda: [spec_of([])], "INVALID_FIELD", ["pictures"]),
    "too many pictures": (lambda: [spec_of([b"x"] * 4)], "INVALID_FIELD", ["pictures"]),
    "empty picture": (lambda: [spec_of([b""])], "INVALID_FIELD", ["pictures[0].size_bytes"]),
    "picture over its cap": (lambda: [spec_of([BIG])], "PICTURE_TOO_LARGE", ["pictures[0].size_bytes"]),
    "all over theirs": (lambda: [spec_of([BIG[:40_000]] * 2)], "UPLOAD_TOO_LARGE", ["pictures"]),
}


@pytest.mark.parametrize("case", OUT_OF_STEP)
async def test_wrong_uploads_are_refused_and_leave_nothing(alice: Caller, case: str) -> None:
    messages, reason, fields = OUT_OF_STEP[case]
    told = await alice.refused(messages())
    assert told.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (told.reason, told.fields) == (reason, fields)
    assert alice.left_behind() == []
    assert alice.live.stores.jobs.open_jobs() == set()


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"settings": pb.FineTuneSettings(steps=0, learning_rate=2)}, ["settings.steps", "settings.learning_rate"]),
        ({"settings": pb.FineTuneSettings(learning_rate=float("nan"))}, ["settings.learning_rate"]),
        ({"identifier": "extraordinarily-long"}, ["identifier"]),
        ({"class_noun": ""}, ["pictures[0].caption"]),
        ({"adapter_id": "Not An Id"}, ["adapter_id"]),
        ({"labels": {"": "x"}}, ["labels"]),
        ({"display_name": "a\nb"}, ["display_name"]),
        ({"idempotency_key": "k" * 65}, ["idempotency_key"]),
        ({"method": 99}, ["method"]),
        ({"subject": 99}, ["subject"]),
        ({"sample_prompts": ["x"] * 5}, ["sample_prompts"]),
        (
            {
                "identifier_init": [""] * 10_000,
                "more_subjects": [pb.FineTuneSubjectSpec(identifier_init=[""] * 17)] * 4,
            },
            ["identifier_init", "more_subjects", *(f"more_subjects[{n}].identifier_init" for n in range(4))],
        ),
    ],
)
async def test_wrong_specs_are_refused_before_a_picture_is_read(
    alice: Caller, fields: dict[str, Any], wrong: list[str]
) -> None:
    told = await alice.refused(upload(GOOD[:1], **fields))
    assert told.code is grpc.StatusCode.INVALID_ARGUMENT
    assert sorted(told.fields) == sorted(wrong)
    assert alice.left_behind() == []


async def test_hostile_pictures_are_refused_by_name(alice: Caller) -> None:
    told = await alice.refused(upload([png(), b"GIF89a" + b"\0" * 100, png()[:60]]))
    assert told.code is grpc.StatusCode.INVALID_ARGUMENT
    assert told.reason == "PICTURE_INVALID"
    assert told.fields == ["pictures[1]", "pictures[2]"]
    assert alice.left_behind() == []


async def test_a_repetition_returns_the_first_job(alice: Caller) -> None:
    first = await alice.create(upload(GOOD, idempotency_key="once"))
    for other in range(2):
        await alice.queue(adapter_id=f"other-{other}")
    # The quota is used up, but this queues nothing; other chunks of the same bytes are the same request.
    again = await alice.create(upload(GOOD, size=37, idempotency_key="once"))
    assert (first.replayed, again.replayed) == (False, True)
    assert again.fine_tune == first.fine_tune
    told = await alice.refused(upload([png(99), GOOD[1]], idempotency_key="once"))
    assert (told.code, told.reason) == (grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT")
    assert len(alice.left_behind()) == 3


async def test_the_same_request_twice_at_once_queues_one_job(alice: Caller) -> None:
    answers = await asyncio.gather(*(alice.create(upload(GOOD, idempotency_key="once")) for _ in range(3)))
    assert len({answer.fine_tune.name for answer in answers}) == 1
    assert sorted(answer.replayed for answer in answers) == [False, True, True]
    assert len(alice.left_behind()) == 1


async def test_the_quota_is_told_with_its_numbers(alice: Caller) -> None:
    jobs = [await alice.queue(adapter_id=f"a-{number}") for number in range(3)]
    told = await alice.refused(upload(GOOD))
    assert (told.code, told.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_QUOTA")
    assert told.metadata["limit"] == "3"
    assert told.retry_seconds
    bob = Caller(alice.live, await alice.live.caller("bob"), "bob")
    await bob.queue()
    await alice.call("CancelFineTune", pb.CancelFineTuneRequest(name=jobs[0].name))
    await alice.queue()


async def test_cancelling_a_queued_job_removes_its_pictures(alice: Caller) -> None:
    job = await alice.queue()
    for _ in range(2):
        answer = await alice.call("CancelFineTune", pb.CancelFineTuneRequest(name=job.name))
        assert answer.fine_tune.state == pb.FINE_TUNE_STATE_CANCELLED
    assert answer.fine_tune.HasField("end_time")
    assert alice.left_behind() == []
    assert [event.state_change.state for event in await alice.watch(job.name)] == [
        pb.FINE_TUNE_STATE_QUEUED,
        pb.FINE_TUNE_STATE_CANCELLED,
    ]


async def test_watching_shows_everything_as_it_happens_and_ends(alice: Caller) -> None:
    job = await alice.queue(adapter_id="fox")
    watching = asyncio.create_task(alice.watch(job.name))
    claimed = alice.claim()
    jobs, lease = alice.live.stores.jobs, claimed.lease
    jobs.progress(lease, 3, 0.5, 0.25)
    await asyncio.sleep(0.4)
    assert not watching.done()
    jobs.sample(lease, 3, "a prompt", png())
    scores = {"clip_i": 0.5, "clip_t": 0.25, "clip_i_base": 0.125}
    jobs.publish(lease, alice.live.stores.adapters, b"file", SMALL_ADAPTER, scores)
    events = await asyncio.wait_for(watching, 10)
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert [event.WhichOneof("event") for event in events] == [
        "state_change",
        "state_change",
        "progress",
        "sample",
        "state_change",
    ]
    queued, running, progress, sample, ended = events
    # Each state event shows the job as it stood then, not as it stands now.
    assert queued.state_change == job
    assert (running.state_change.attempt, running.state_change.revision) == (1, 0)
    assert (progress.progress.step, progress.progress.loss, progress.progress.seconds_per_step) == (3, 0.5, 0.25)
    assert (sample.sample.step, sample.sample.prompt, sample.sample.data) == (3, "a prompt", png())
    assert ended.state_change == (await alice.call("GetFineTune", pb.GetFineTuneRequest(name=job.name))).fine_tune
    assert ended.state_change.revision == 1
    assert ended.state_change.scores.clip_i_base == 0.125
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await alice.watch(job.name, 6)
    assert refusal(caught.value).fields == ["after_sequence"]
    assert "0 to 5, the number of the job's newest event" in refusal(caught.value).message
    # A watcher who comes back goes on where it was, also when everything is over.
    for after in range(6):
        assert await alice.watch(job.name, after) == events[after:]


async def test_a_failed_job_says_why(alice: Caller) -> None:
    job = await alice.queue()
    alice.live.stores.jobs.fail(alice.claim().lease, "TRAINING_DIVERGED", "lower the learning rate")
    failed = (await alice.call("GetFineTune", pb.GetFineTuneRequest(name=job.name))).fine_tune
    assert failed.state == pb.FINE_TUNE_STATE_FAILED
    assert (failed.error.reason, failed.error.message) == ("TRAINING_DIVERGED", "lower the learning rate")


async def test_pages_and_filters(alice: Caller) -> None:
    names = [(await alice.queue(adapter_id=f"a-{number}")).name for number in range(3)]
    await alice.call("CancelFineTune", pb.CancelFineTuneRequest(name=names[1]))
    seen, token = [], ""
    while True:
        page = await alice.call("ListFineTunes", pb.ListFineTunesRequest(page_size=2, page_token=token))
        seen += [job.name for job in page.fine_tunes]
        token = page.next_page_token
        if not token:
            break
    assert seen == names[::-1]
    queued = await alice.call("ListFineTunes", pb.ListFineTunesRequest(states=[pb.FINE_TUNE_STATE_QUEUED]))
    assert [job.name for job in queued.fine_tunes] == [names[2], names[0]]
    for request, field in (
        (pb.ListFineTunesRequest(page_size=501), "page_size"),
        (pb.ListFineTunesRequest(page_token="x"), "page_token"),
        (pb.ListFineTunesRequest(states=[pb.FINE_TUNE_STATE_UNSPECIFIED]), "states[0]"),
        # More than a query of any database may name.
        (pb.ListFineTunesRequest(states=[pb.FINE_TUNE_STATE_QUEUED] * 40_000), "states"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await alice.call("ListFineTunes", request)
        assert refusal(caught.value).fields == [field]


async def test_a_caller_who_leaves_in_the_middle_leaves_nothing(alice: Caller) -> None:
    sent = asyncio.Event()

    async def slowly() -> AsyncIterator[Message]:
        yield spec_of(GOOD)
        yield chunk(0, GOOD[0][:20])
        sent.set()
        await asyncio.sleep(60)

    call = alice.stubs.finetunes.CreateFineTune(slowly(), metadata=alice.stubs.metadata)
    await sent.wait()
    async with asyncio.timeout(10):
        while not alice.left_behind():  # noqa: ASYNC110 (a folder cannot set an event)
            await asyncio.sleep(0.02)
        call.cancel()
        while alice.left_behind():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert alice.live.stores.jobs.open_jobs() == set()


async def test_a_failed_job_is_retried_and_counted(alice: Caller) -> None:
    job = await alice.queue()
    request = pb.RetryFineTuneRequest(name=job.name, idempotency_key="once")
    alice.live.stores.jobs.fail(alice.claim().lease, "JOB_TIME_LIMIT", "too long")
    for replayed in (False, True):
        answer = await alice.call("RetryFineTune", request)
        assert (answer.fine_tune.state, answer.replayed) == (pb.FINE_TUNE_STATE_QUEUED, replayed)
    assert not answer.fine_tune.HasField("error")
    assert alice.live.frame.metrics.registry.get_sample_value("hueshift_job_retries_total") == 1
    await alice.call("CancelFineTune", pb.CancelFineTuneRequest(name=job.name))
    # The failure stays in the stream, and ends it no longer.
    states = [event.state_change.state for event in await alice.watch(job.name)]
    assert states[-3:] == [pb.FINE_TUNE_STATE_FAILED, pb.FINE_TUNE_STATE_QUEUED, pb.FINE_TUNE_STATE_CANCELLED]


async def test_cancelling_a_failed_job_leaves_it_as_it_is(alice: Caller) -> None:
    job = await alice.queue()
    alice.live.stores.jobs.fail(alice.claim().lease, "JOB_TIME_LIMIT", "too long")
    answer = await alice.call("CancelFineTune", pb.CancelFineTuneRequest(name=job.name))
    assert answer.fine_tune.state == pb.FINE_TUNE_STATE_FAILED
    retried = await alice.call("RetryFineTune", pb.RetryFineTuneRequest(name=job.name))
    assert retried.fine_tune.state == pb.FINE_TUNE_STATE_QUEUED
    assert alice.live.stores.folders.holds_inputs(job.name.rpartition("/")[2], 1)


async def test_a_failed_job_without_pictures_is_not_retried(alice: Caller) -> None:
    job = await alice.queue()
    alice.live.stores.jobs.fail(alice.claim().lease, "JOB_TIME_LIMIT", "too long")
    alice.live.stores.folders.pictures(job.name.rpartition("/")[2])[0].unlink()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await alice.call("RetryFineTune", pb.RetryFineTuneRequest(name=job.name))
    told = refusal(caught.value)
    assert (told.code, told.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_NOT_RETRYABLE")
    assert "pictures are gone" in told.message
