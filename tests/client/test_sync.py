"""The blocking client against a server that fails on command."""

import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import grpc
import pytest
from fake_service import Failure, FakeServer, State, job_events, job_message, png
from grpc_health.v1 import health_pb2

from hueshift.client import errors
from hueshift.client.adapters import StorageUse
from hueshift.client.choices import AdapterKind, JobState, Method, Priority, Sampler, Subject
from hueshift.client.combination import AdapterRef, BlockMix, Interpolation, Sum
from hueshift.client.generation import AdapterUse, Finished, Picture, Progress, Queued
from hueshift.client.jobs import FineTuneFailed, LearnedSubject, StateChanged, TrainingSample
from hueshift.client.model import EngineCapacity, SizeCapacity
from hueshift.client.retry import RetryPolicy
from hueshift.client.sync import Client
from hueshift.v1 import generation_pb2

BUSY = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", "QUEUE_FULL", retryable=True, retry_after=0.02)


@pytest.fixture
def client(fake: FakeServer, quick: RetryPolicy) -> Iterator[Client]:
    with Client(fake.address, api_key="hs_key", retry=quick) as client:
        yield client


def test_generate_yields_typed_events(fake: FakeServer, client: Client) -> None:
    kinds = [type(event) for event in client.generate("a fox", count=2, seeds=[7])]
    assert kinds == [Queued, Progress, Progress, Picture, Picture, Finished]
    assert fake.service.metadata[0]["authorization"] == "Bearer hs_key"


def test_generate_sends_what_was_given_and_nothing_else(fake: FakeServer, client: Client) -> None:
    uses: list[str | AdapterUse] = [AdapterUse("fox", 0.5, revision=3), "style"]
    client.generate_images("a fox", adapters=uses, guidance_scale=1.5, sampler=Sampler.DPMPP_2M, steps=4)
    (request,) = fake.service.seen["Generate"]
    assert [(use.adapter, use.weight, use.revision) for use in request.adapters] == [("fox", 0.5, 3), ("style", 1, 0)]
    assert (request.guidance_scale, request.sampler, request.steps) == (1.5, 3, 4)
    client.generate_images("a fox", adapters={"fox": 0.0})
    bare = fake.service.seen["Generate"][1]
    assert bare.adapters[0].HasField("weight")
    assert not bare.HasField("guidance_scale")
    assert bare.sampler == 0


def test_a_lone_name_is_refused(client: Client) -> None:
    with pytest.raises(TypeError, match=r"adapters=\['fox'\]"):
        client.generate_images("a fox", adapters="fox")


def test_pictures_come_in_order(client: Client) -> None:
    pictures = client.generate_images("a fox", count=3, seeds=[5])
    assert [(picture.index, picture.seed) for picture in pictures] == [(0, 5), (1, 6), (2, 7)]
    assert pictures[0].timings.denoise == 1.5


def test_generate_is_repeated_before_its_first_event(fake: FakeServer, client: Client) -> None:
    fake.service.fail("Generate", BUSY, BUSY)
    begun = time.monotonic()
    assert len(client.generate_images("a fox")) == 1
    assert time.monotonic() - begun > 2 * 0.02
    assert len(fake.service.seen["Generate"]) == 3


def test_generate_is_not_repeated_after_it(fake: FakeServer, client: Client) -> None:
    fake.service.fail("Generate", Failure(grpc.StatusCode.UNAVAILABLE, retryable=True, after=2))
    seen: list[object] = []
    with pytest.raises(errors.Unavailable):
        seen.extend(client.generate("a fox"))
    assert len(fake.service.seen["Generate"]) == 1


def test_an_unmarked_error_is_not_repeated(fake: FakeServer, client: Client) -> None:
    fake.service.fail("GetModel", Failure(grpc.StatusCode.UNAVAILABLE, bare=True))
    with pytest.raises(errors.Unavailable) as caught:
        client.model()
    assert len(fake.service.seen["GetModel"]) == 1
    assert caught.value.reason == ""


def test_attempts_end(fake: FakeServer, client: Client) -> None:
    fake.service.fail("GetModel", BUSY, BUSY, BUSY, BUSY)
    with pytest.raises(errors.ResourceExhausted):
        client.model()
    assert len(fake.service.seen["GetModel"]) == 3


def test_waits_stay_within_the_calls_own_time(fake: FakeServer, client: Client) -> None:
    slow = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, retryable=True, retry_after=30.0)
    fake.service.fail("Generate", slow)
    begun = time.monotonic()
    with pytest.raises(errors.ResourceExhausted):
        client.generate_images("a fox", timeout=2.0)
    assert time.monotonic() - begun < 1.0


def test_closing_the_events_cancels_the_call(fake: FakeServer, client: Client) -> None:
    fake.service.hang_generate = True
    events = client.generate("a fox")
    assert isinstance(next(events), Queued)
    events.close()
    assert fake.service.cancelled.wait(5)


def test_errors_carry_what_the_server_says(fake: FakeServer, client: Client) -> None:
    fake.service.fail(
        "GetAdapter",
        Failure(
            grpc.StatusCode.INVALID_ARGUMENT,
            "name: bad",
            "INVALID_FIELD",
            fields={"name": "bad"},
            resource="x",
            metadata={"allowed": "a-z"},
        ),
        Failure(grpc.StatusCode.INTERNAL, "internal error", "INTERNAL", metadata={"incident": "inc-12"}),
    )
    with pytest.raises(errors.InvalidRequest, match="name: bad") as caught:
        client.get_adapter("?")
    error = caught.value
    assert (error.code, error.reason, error.retryable) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        False,
    )
    assert error.violations == (errors.FieldViolation("name", "bad"),)
    assert (error.facts.resource, (error.facts.metadata or {})["allowed"]) == ("x", "a-z")
    with pytest.raises(errors.ServerFault) as fault:
        client.get_adapter("?")
    assert fault.value.incident_id == "inc-12"


def test_unreadable_details_are_left_out() -> None:
    facts = errors.read_facts(grpc.StatusCode.INTERNAL, "no", [("grpc-status-details-bin", b"\xff\xff"), ("x", "y")])
    assert facts.reason == ""
    assert facts.message == "no"


def test_import_and_export_keep_every_byte(fake: FakeServer, client: Client, tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(data)
    adapter = client.import_adapter(path, adapter_id="fox", labels={"team": "red"})
    assert (adapter.id, adapter.kind, adapter.size_bytes) == ("fox", AdapterKind.SPECTRAL, len(data))
    assert adapter.content_hash == sha256(data).hexdigest()
    (messages,) = fake.service.seen["ImportAdapter"]
    assert [len(message.chunk) for message in messages[1:]] == [1_048_576, 1_048_576, 462_848]
    exported = client.export_adapter("fox")
    assert exported.data == data


def test_a_damaged_export_is_noticed(fake: FakeServer, client: Client) -> None:
    client.import_adapter(b"x" * 1001, adapter_id="fox")
    fake.service.corrupt_exports = True
    with pytest.raises(errors.CorruptAnswer, match="hash"):
        client.export_adapter("fox")


def test_a_repeated_upload_carries_the_same_key_and_all_bytes(fake: FakeServer, client: Client) -> None:
    fake.service.fail("ImportAdapter", BUSY)
    client.import_adapter(b"y" * 3000, adapter_id="fox")
    client.import_adapter(b"y" * 3000, adapter_id="fox")
    first, again, other = fake.service.seen["ImportAdapter"]
    assert first == again
    assert first[0].spec.idempotency_key
    assert other[0].spec.idempotency_key != first[0].spec.idempotency_key


def test_lists_fetch_their_pages(fake: FakeServer, client: Client) -> None:
    for number in range(5):
        client.import_adapter(b"z", adapter_id=f"a{number}")
    assert [adapter.id for adapter in client.list_adapters(page_size=2)] == ["a0", "a1", "a2", "a3", "a4"]
    assert [request.page_token for request in fake.service.seen["ListAdapters"]] == ["", "2", "4"]


def test_update_changes_only_what_is_named(client: Client) -> None:
    client.import_adapter(b"z", adapter_id="fox", display_name="Fox", labels={"a": "1"})
    changed = client.update_adapter("tenants/local/adapters/fox", display_name="Reynard")
    assert (changed.display_name, changed.labels) == ("Reynard", {"a": "1"})


def test_warm_delete_and_not_found(client: Client) -> None:
    client.import_adapter(b"z", adapter_id="fox")
    assert client.warm_adapter("fox", pin=True).loaded
    again = client.warm_adapter("fox")
    assert (again.loaded, again.adapter.pinned) == (False, True)
    assert client.delete_adapter("fox").bytes == 1
    with pytest.raises(errors.NotFound) as caught:
        client.get_adapter("fox")
    assert caught.value.reason == "ADAPTER_NOT_FOUND"


def test_storage_is_told(fake: FakeServer, client: Client) -> None:
    client.import_adapter(b"zzz", adapter_id="fox")
    assert client.storage() == StorageUse(3, 7, 1024 * 1024)


def test_combinations_are_sent_as_asked(fake: FakeServer, client: Client) -> None:
    weighted = AdapterUse("ink", 0.5, block_weights={"structure": 1.0})
    made = client.combine_adapters(Sum(["fox", weighted]), adapter_id="both", labels={"a": "b"})
    assert (made.id, made.kind, made.method, made.labels) == ("both", AdapterKind.KV, "combine", {"a": "b"})
    assert made.notes == ("its rank is not served",)
    client.combine_adapters(Interpolation("fox", AdapterRef("ink", 3), 0.25))
    client.combine_adapters(BlockMix("fox", "ink", ["mid_block"]), idempotency_key="mine")
    added, between, mixed = fake.service.seen["CombineAdapters"]
    assert [(u.adapter, u.weight, dict(u.block_weights)) for u in added.sum.parts] == [
        ("fox", 1.0, {}),
        ("ink", 0.5, {"structure": 1.0}),
    ]
    assert (between.interpolation.second.revision, between.interpolation.position) == (3, 0.25)
    assert (mixed.block_mix.structure.adapter, list(mixed.block_mix.blocks)) == ("fox", ["mid_block"])
    assert mixed.idempotency_key == "mine"
    assert added.idempotency_key
    assert added.idempotency_key != between.idempotency_key


def test_fine_tune_sends_spec_and_pictures(fake: FakeServer, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(png())
    big = b"p" * (1024 * 1024 + 5)
    job = client.fine_tune(
        [path, big],
        captions=["a sks", "b sks"],
        subject=Subject.STYLE,
        method=Method.SVDIFF,
        settings={"steps": 4, "learning_rate": 0.5},
        adapter_id="style-1",
        priority=Priority.HIGH,
    )
    assert (job.id, job.state, job.method) == ("job-1", JobState.QUEUED, Method.SVDIFF)
    # A server that does not know priorities tells none.
    assert job.priority is None
    (messages,) = fake.service.seen["CreateFineTune"]
    spec = messages[0].spec
    assert [(p.caption, p.size_bytes) for p in spec.pictures] == [("a sks", len(png())), ("b sks", len(big))]
    assert (spec.settings.steps, spec.settings.learning_rate) == (4, 0.5)
    assert spec.priority == generation_pb2.PRIORITY_HIGH
    assert not spec.settings.HasField("batch_size")
    assert not spec.HasField("learn_identifier")
    assert [(m.chunk.index, len(m.chunk.data)) for m in messages[1:]] == [(0, len(png())), (1, 1024 * 1024), (1, 5)]


def test_fine_tune_sends_what_every_method_takes(fake: FakeServer, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_bytes(png())
    fake.service.job.kept_energy = 0.5
    fake.service.job.cost.gpu_seconds = 12.0
    job = client.fine_tune(
        [b"one", b"two"],
        method=Method.CUSTOM_DIFFUSION,
        class_noun="cat",
        more_subjects=[LearnedSubject("idk", "dog", ["old"])],
        picture_subjects=[0, 1],
        picture_repeats=[2, 1],
        masks={1: path},
        settings={"rate_schedule": "constant", "unmix_layers": ["up_blocks"], "mirror": True, "precision": "fp32"},
    )
    assert job.kept_energy == 0.5
    assert job.cost is not None
    assert job.cost.gpu_seconds == 12.0
    (messages,) = fake.service.seen["CreateFineTune"]
    spec = messages[0].spec
    assert (spec.method, spec.settings.rate_schedule, spec.settings.precision) == (5, 2, 2)
    assert list(spec.settings.unmix_layers) == ["up_blocks"]
    assert [(p.subject, p.repeats, p.mask_size_bytes) for p in spec.pictures] == [(0, 2, 0), (1, 1, len(png()))]
    assert [(s.identifier, s.class_noun, list(s.identifier_init)) for s in spec.more_subjects] == [
        ("idk", "dog", ["old"])
    ]
    assert [(m.chunk.index, m.chunk.mask, m.chunk.data) for m in messages[1:]] == [
        (0, False, b"one"),
        (1, False, b"two"),
        (1, True, png()),
    ]


def test_fine_tune_refuses_what_cannot_be_meant(client: Client) -> None:
    with pytest.raises(ValueError, match="allowed are linear, constant, cosine"):
        client.fine_tune([b"a"], settings={"rate_schedule": "wild"})
    with pytest.raises(ValueError, match="1 picture_subjects for 2 pictures"):
        client.fine_tune([b"a", b"b"], picture_subjects=[0])
    with pytest.raises(ValueError, match="a mask of picture 2"):
        client.fine_tune([b"a", b"b"], masks={2: b"m"})
    with pytest.raises(ValueError, match="1 captions for 2 pictures"):
        client.fine_tune([b"a", b"b"], captions=["one"])
    with pytest.raises(ValueError, match="no setting 'stepz'"):
        client.fine_tune([b"a"], settings={"stepz": 3})
    with pytest.raises(ValueError, match="cannot be asked for"):
        client.fine_tune([b"a"], method=Method.UNKNOWN)


def test_a_watch_survives_lost_connections_and_servers_that_stop(fake: FakeServer, client: Client) -> None:
    fake.service.events = job_events()
    fake.service.watch_limit.extend([2, 1])
    fake.service.fail(
        "WatchFineTune",
        Failure(grpc.StatusCode.UNAVAILABLE, bare=True, after=1),
        Failure(grpc.StatusCode.UNAVAILABLE, "draining", "DRAINING", retryable=True, after=1),
    )
    events = list(client.watch("job-1"))
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert [request.after_sequence for request in fake.service.seen["WatchFineTune"]] == [0, 1, 2]
    last = events[-1]
    assert isinstance(last, StateChanged)
    assert last.job.scores is not None
    assert last.job.scores.clip_i == 0.75


def test_a_watch_begins_where_it_is_told(fake: FakeServer, client: Client) -> None:
    fake.service.events = job_events()
    events = list(client.watch("job-1", after_sequence=3))
    assert isinstance(events[0], TrainingSample)
    assert len(events) == 2


def test_a_watch_gives_up_on_what_will_not_pass(fake: FakeServer, client: Client) -> None:
    fake.service.fail("WatchFineTune", Failure(grpc.StatusCode.NOT_FOUND, reason="FINE_TUNE_NOT_FOUND"))
    with pytest.raises(errors.NotFound):
        list(client.watch("job-9"))


def test_a_watch_that_never_gets_further_ends(fake: FakeServer) -> None:
    impatient = RetryPolicy(first_delay=0.01, longest_delay=0.01, patience=0.1)
    with Client(fake.address, retry=impatient) as client, pytest.raises(errors.CorruptAnswer, match="job goes on"):
        list(client.watch("job-1"))


def test_waiting_for_a_job(fake: FakeServer, client: Client) -> None:
    fake.service.events = job_events(State.FINE_TUNE_STATE_FAILED)
    fake.service.job = job_message(State.FINE_TUNE_STATE_FAILED)
    seen: list[object] = []
    with pytest.raises(FineTuneFailed, match="the loss is not finite") as caught:
        client.wait_for_job("job-1", on_event=seen.append)
    assert len(seen) == 5
    assert caught.value.job.state is JobState.FAILED
    fake.service.job = job_message(State.FINE_TUNE_STATE_SUCCEEDED)
    assert client.wait_for_job("job-1").revision == 1


def test_jobs_are_listed_cancelled_and_retried(fake: FakeServer, client: Client) -> None:
    assert [job.id for job in client.list_jobs([JobState.QUEUED])] == ["job-1"]
    assert client.cancel_job(next(client.list_jobs())).state is JobState.CANCELLED
    assert client.retry_job(next(client.list_jobs())).state is JobState.QUEUED
    assert client.delete_job("job-1").events == 5
    assert fake.service.seen["DeleteFineTune"][0].idempotency_key
    (request,) = fake.service.seen["RetryFineTune"]
    assert (request.name, len(request.idempotency_key)) == ("tenants/local/fineTunes/job-1", 32)
    client.cancel_job("job-1")
    assert list(client.list_jobs([JobState.RUNNING])) == []


def test_the_model_and_what_is_newer_than_the_client(client: Client) -> None:
    model = client.model()
    assert model.samplers == (Sampler.DDIM,)
    assert model.methods[0].subject_defaults == {"steps": 150, "learning_rate": 0.5}
    assert model.capacity == EngineCapacity(16, 63, 2, (8, 16), (SizeCapacity(768, 512, 12),))
    assert [found.name for found in client.list_models()] == ["models/emoji-128"]


def test_unknown_states_do_not_break_a_client(fake: FakeServer, client: Client) -> None:
    fake.service.job.state = 42  # type: ignore[assignment]
    assert client.get_job("job-1").state is JobState.UNKNOWN


def test_waiting_until_ready(fake: FakeServer, client: Client) -> None:
    client.wait_until_ready(5)
    fake.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    with pytest.raises(errors.Unavailable, match=r"not ready after 0\.3 s.*NOT_SERVING"):
        client.wait_until_ready(0.3)


def test_a_server_that_is_not_there(quick: RetryPolicy) -> None:
    with Client("127.0.0.1:1", retry=quick) as client:
        with pytest.raises(errors.Unavailable, match="not ready"):
            client.wait_until_ready(0.3)
        with pytest.raises(errors.Unavailable):
            client.model()
