"""What FineTuneService makes of every method and setting: specs, masks, targets that can be served, costs."""

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from PIL import Image
from whole_server import BoundedFakeEngine, LiveServer, Refusal, RpcStubs, fake_parts, live_server, refusal

from hueshift.engines.base_model import BaseModel
from hueshift.server.rpc.finetune_messages import METHOD_NUMBERS, read_spec
from hueshift.server.rpc.finetune_settings import read_settings, write_settings
from hueshift.training.cost import open_speeds
from hueshift.training.defaults import DREAMBOOTH_FEW_RATE, method_defaults
from hueshift.training.spec import Method, SubjectKind, TrainingSpec
from hueshift.v1 import finetune_pb2 as pb
from hueshift.v1 import model_pb2

Message = pb.CreateFineTuneRequest
WHOLE = pb.FineTuneSettings(rank=0)
UNKNOWN_SCHEDULE = pb.FineTuneSettings(rate_schedule=9)  # type: ignore[arg-type]  # of a newer client


def png(size: tuple[int, int] = (64, 48), colour: int = 200) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", size, (colour, 90, 20)).save(target, "PNG")
    return target.getvalue()


class Caller:
    """One tenant's CreateFineTune, with whatever spec and parts."""

    def __init__(self, live: LiveServer, stubs: RpcStubs) -> None:
        self.live, self.stubs = live, stubs

    async def create(self, spec: pb.FineTuneSpec, *chunks: pb.PictureChunk) -> pb.FineTune:
        messages = [Message(spec=spec), *(Message(chunk=chunk) for chunk in chunks)]
        call = self.stubs.finetunes.CreateFineTune(iter(messages), metadata=self.stubs.metadata, timeout=30)
        answer: pb.CreateFineTuneResponse = await call
        return answer.fine_tune

    async def refused(self, spec: pb.FineTuneSpec, *chunks: pb.PictureChunk) -> Refusal:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.create(spec, *chunks)
        return refusal(caught.value)

    def stored(self, job: pb.FineTune) -> TrainingSpec:
        return self.live.stores.jobs.get("alice", job.name.rpartition("/")[2]).spec


@pytest_asyncio.fixture
async def alice(base_model: BaseModel, tmp_path: Path) -> AsyncIterator[Caller]:
    async with live_server(tmp_path, fake_parts(base_model)) as live:
        yield Caller(live, await live.caller("alice"))


def one(**fields: Any) -> pb.FineTuneSpec:
    return pb.FineTuneSpec(
        **{"class_noun": "animal", "pictures": [pb.PictureSpec(size_bytes=len(png()))], "validate_only": True, **fields}
    )


@pytest.mark.parametrize("kind", SubjectKind)
@pytest.mark.parametrize("method", Method)
def test_defaults_survive_the_contract(method: Method, kind: SubjectKind) -> None:
    defaults = method_defaults(method, kind)
    message = pb.FineTuneSettings.FromString(write_settings(defaults).SerializeToString())
    told = read_settings(message)
    for name, value in defaults.items():
        if value != ():
            assert told[name] == (pytest.approx(value) if isinstance(value, float) else value), name


def test_every_setting_of_training_can_be_asked_for() -> None:
    fields = set(pb.FineTuneSettings.DESCRIPTOR.fields_by_name)
    assert fields == set(method_defaults(Method.LORA, SubjectKind.SUBJECT))


def test_a_spec_is_read_in_full() -> None:
    message = pb.FineTuneSpec(
        method=pb.FINE_TUNE_METHOD_LORA,
        class_noun="cat",
        more_subjects=[pb.FineTuneSubjectSpec(identifier="idk", class_noun="dog", identifier_init=["old"])],
        pictures=[
            pb.PictureSpec(size_bytes=1, repeats=3),
            pb.PictureSpec(size_bytes=1, subject=1, mask_size_bytes=5),
        ],
        settings=pb.FineTuneSettings(
            rank=4,
            targets=["attn2.to_k", "proj_out"],
            rate_schedule=pb.FINE_TUNE_SCHEDULE_COSINE,
            lora_init=pb.FINE_TUNE_LORA_INIT_PISSA,
            precision=pb.FINE_TUNE_PRECISION_BF16,
            mirror=True,
            per_layer=False,
        ),
    )
    spec = read_spec(message, "sks")
    assert spec.captions == ("a sks cat", "a idk dog")
    assert (spec.picture_subjects, spec.picture_repeats, spec.masked_pictures) == ((0, 1), (3, 1), (1,))
    assert spec.subjects[1].identifier_init == ("old",)
    assert (spec.method, spec.rank, spec.alpha, spec.targets) == (Method.LORA, 4, 4.0, ("attn2.to_k", "proj_out"))
    assert (spec.rate_schedule, spec.lora_init, spec.precision) == ("cosine", "pissa", "bf16")
    assert (spec.mirror, spec.per_layer) == (True, False)


async def test_a_dry_run_tells_the_cost_and_queues_nothing(alice: Caller, base_model: BaseModel) -> None:
    unknown = await alice.create(one())
    assert (unknown.name, unknown.state, unknown.steps) == ("", pb.FINE_TUNE_STATE_UNSPECIFIED, 120)
    assert not unknown.HasField("cost")
    speeds = open_speeds(alice.live.settings.store.cache_path)
    speeds.record(base_model.base_hash, read_spec(one(), "sks"), 20, 5.0)
    plan = await alice.create(one(adapter_id="fox", settings=pb.FineTuneSettings(steps=40)))
    assert plan.adapter == "tenants/alice/adapters/fox"
    assert (plan.cost.gpu_seconds, plan.cost.seconds_per_step, plan.cost.measured_steps) == (10.0, 0.25, 20)
    assert alice.live.stores.jobs.open_jobs() == set()
    # Wrong specs are refused all the same.
    told = await alice.refused(one(settings=pb.FineTuneSettings(steps=0)))
    assert told.fields == ["settings.steps"]
    job = await alice.create(one(validate_only=False), pb.PictureChunk(index=0, data=png()))
    assert job.cost.gpu_seconds == 30.0
    assert job.state == pb.FINE_TUNE_STATE_QUEUED


@pytest.mark.parametrize(
    ("fields", "wrong", "text"),
    [
        ({"settings": UNKNOWN_SCHEDULE}, "settings.rate_schedule", "FINE_TUNE_SCHEDULE_COSINE"),
        ({"settings": pb.FineTuneSettings(targets=["to_q"])}, "settings.targets", "chooses its layers itself"),
        (
            {"method": pb.FINE_TUNE_METHOD_LORA, "settings": pb.FineTuneSettings(targets=["to_q"])},
            "settings.targets",
            "engine.lowrank_targets",
        ),
        (
            {"method": pb.FINE_TUNE_METHOD_LORA, "settings": pb.FineTuneSettings(targets=["proj_out"], rank=17)},
            "settings.rank",
            "at most 16",
        ),
        (
            {
                "method": pb.FINE_TUNE_METHOD_LORA,
                "settings": pb.FineTuneSettings(targets=["proj_out"], rank=9, lora_init=pb.FINE_TUNE_LORA_INIT_PISSA),
            },
            "settings.rank",
            "rank 18",
        ),
        (
            {"method": pb.FINE_TUNE_METHOD_DREAMBOOTH, "settings": pb.FineTuneSettings(targets=["nowhere"])},
            "settings.targets",
            "fits no layer",
        ),
        (
            {"more_subjects": [pb.FineTuneSubjectSpec(identifier="extraordinarily-long", class_noun="dog")]},
            "pictures",
            "none shows subject 1",
        ),
        (
            {
                "more_subjects": [pb.FineTuneSubjectSpec(identifier="extraordinarily-long", class_noun="dog")],
                "pictures": [pb.PictureSpec(size_bytes=1), pb.PictureSpec(size_bytes=1, subject=1)],
            },
            "more_subjects[0].identifier",
            "exactly one ordinary token",
        ),
        (
            {"pictures": [pb.PictureSpec(size_bytes=1, mask_size_bytes=-1)]},
            "pictures[0].mask_size_bytes",
            "0 (no mask)",
        ),
    ],
)
async def test_what_cannot_be_is_refused_by_its_field(
    alice: Caller, fields: dict[str, Any], wrong: str, text: str
) -> None:
    told = await alice.refused(one(**fields))
    assert told.code is grpc.StatusCode.INVALID_ARGUMENT
    assert told.fields == [wrong]
    assert text in told.message


async def test_targets_are_those_that_this_server_serves(alice: Caller) -> None:
    served = ("attn2.to_k", "attn2.to_v", "proj_out")
    for method in (pb.FINE_TUNE_METHOD_LORA, pb.FINE_TUNE_METHOD_DREAMBOOTH):
        job = await alice.create(one(method=method, validate_only=False), pb.PictureChunk(index=0, data=png()))
        assert alice.stored(job).targets == served
    asked = pb.FineTuneSettings(targets=["attn2.to_v"], rank=64)
    job = await alice.create(
        one(method=pb.FINE_TUNE_METHOD_LORA, settings=asked, validate_only=False),
        pb.PictureChunk(index=0, data=png()),
    )
    # Keys and values are read from the prompt with any rank.
    assert (alice.stored(job).targets, alice.stored(job).rank) == (("attn2.to_v",), 64)


@pytest.mark.parametrize(("asked", "rate"), [(None, DREAMBOOTH_FEW_RATE), (1e-5, 1e-5)])
async def test_few_layers_of_dreambooth_learn_faster_unless_a_rate_is_asked_for(
    alice: Caller, asked: float | None, rate: float
) -> None:
    spec = one(
        method=pb.FINE_TUNE_METHOD_DREAMBOOTH,
        settings=pb.FineTuneSettings(learning_rate=asked),
        validate_only=False,
    )
    job = await alice.create(spec, pb.PictureChunk(index=0, data=png()))
    assert alice.stored(job).learning_rate == pytest.approx(rate)
    request = model_pb2.GetModelRequest()
    model = (await alice.stubs.models.GetModel(request, metadata=alice.stubs.metadata)).model
    [told] = [info for info in model.methods if info.method == pb.FINE_TUNE_METHOD_DREAMBOOTH]
    # What a job that asks for nothing gets on this server.
    assert told.subject_defaults.learning_rate == pytest.approx(DREAMBOOTH_FEW_RATE)


async def test_whole_changes_are_asked_for_where_they_are_served(base_model: BaseModel, tmp_path: Path) -> None:
    engine = BoundedFakeEngine()
    engine.dense_slots = 2
    async with live_server(tmp_path, fake_parts(base_model, engine)) as live:
        caller = Caller(live, await live.caller("alice"))
        spec = one(method=pb.FINE_TUNE_METHOD_DREAMBOOTH, settings=WHOLE, validate_only=False)
        stored = caller.stored(await caller.create(spec, pb.PictureChunk(index=0, data=png())))
        # Every layer, at the rate that suits every layer.
        assert (stored.rank, stored.targets, stored.learning_rate) == (0, (), 1e-4)
        spec = one(method=pb.FINE_TUNE_METHOD_DREAMBOOTH, validate_only=False)
        by_default = caller.stored(await caller.create(spec, pb.PictureChunk(index=0, data=png())))
        assert (by_default.rank, by_default.targets) == (16, ("attn2.to_k", "attn2.to_v", "proj_out"))


async def test_whole_changes_that_nothing_here_draws_with_are_made_for_their_file_alone(alice: Caller) -> None:
    told = await alice.refused(one(method=pb.FINE_TUNE_METHOD_DREAMBOOTH, settings=WHOLE))
    assert told.fields == ["settings.rank"]
    assert "allow_unserved" in told.message
    some = pb.FineTuneSettings(rank=0, targets=["attn2.to_v", "conv_in"])
    assert (await alice.refused(one(method=pb.FINE_TUNE_METHOD_DREAMBOOTH, settings=some))).fields == ["settings.rank"]
    spec = one(method=pb.FINE_TUNE_METHOD_DREAMBOOTH, settings=WHOLE, allow_unserved=True, validate_only=False)
    stored = alice.stored(await alice.create(spec, pb.PictureChunk(index=0, data=png())))
    assert (stored.rank, stored.targets) == (0, ())
    # Keys and values are read from the prompt, whole too.
    some = pb.FineTuneSettings(rank=0, targets=["attn2.to_v"])
    assert (await alice.create(one(method=pb.FINE_TUNE_METHOD_DREAMBOOTH, settings=some))).steps == 120


async def test_what_is_not_served_can_be_made_by_any_method_but_not_of_layers_there_are_not(alice: Caller) -> None:
    lora = pb.FINE_TUNE_METHOD_LORA
    asked = pb.FineTuneSettings(targets=["attn1.to_q"], rank=17)
    assert (await alice.refused(one(method=lora, settings=asked))).fields == ["settings.targets"]
    spec = one(method=lora, settings=asked, allow_unserved=True, validate_only=False)
    stored = alice.stored(await alice.create(spec, pb.PictureChunk(index=0, data=png())))
    assert (stored.targets, stored.rank) == (("attn1.to_q",), 17)
    nowhere = pb.FineTuneSettings(targets=["nowhere"])
    for method in (lora, pb.FINE_TUNE_METHOD_DREAMBOOTH):
        told = await alice.refused(one(method=method, settings=nowhere, allow_unserved=True))
        assert (told.fields, "fits no layer" in told.message) == (["settings.targets"], True)
    told = await alice.refused(one(method=lora, settings=pb.FineTuneSettings(rank=0)))
    assert told.fields[0] == "settings.rank"


@pytest.mark.parametrize("method", [number for method, number in METHOD_NUMBERS.items()])
async def test_every_method_passes_with_its_defaults(alice: Caller, method: "pb.FineTuneMethod.ValueType") -> None:
    assert (await alice.create(one(method=method))).method == method


async def test_masks_follow_their_pictures_and_are_kept_with_the_job(alice: Caller) -> None:
    picture, mask = png(), png(colour=255)
    spec = pb.FineTuneSpec(
        class_noun="animal",
        pictures=[
            pb.PictureSpec(size_bytes=len(picture)),
            pb.PictureSpec(size_bytes=len(picture), mask_size_bytes=len(mask)),
        ],
    )
    job = await alice.create(
        spec,
        pb.PictureChunk(index=0, data=picture),
        pb.PictureChunk(index=1, data=picture),
        pb.PictureChunk(index=1, data=mask[:40], mask=True),
        pb.PictureChunk(index=1, data=mask[40:], mask=True),
    )
    folders, job_id = alice.live.stores.folders, job.name.rpartition("/")[2]
    assert alice.stored(job).masked_pictures == (1,)
    assert len(folders.pictures(job_id)) == 2
    (place,) = folders.masks(job_id).values()
    with Image.open(place) as kept:
        assert (kept.format, kept.size) == ("PNG", (64, 48))
    assert list(folders.masks(job_id)) == [1]


@pytest.mark.parametrize(
    ("mask", "chunks", "reason", "field"),
    [
        (png((64, 49)), None, "PICTURE_INVALID", "pictures[0].mask"),
        (b"GIF89a" + b"\0" * 50, None, "PICTURE_INVALID", "pictures[0].mask"),
        (png(), [], "UPLOAD_SIZE_MISMATCH", "pictures[0].mask_size_bytes"),
        (png(), [pb.PictureChunk(index=0, data=b"x")], "MESSAGE_OUT_OF_ORDER", None),
    ],
)
async def test_masks_that_do_not_fit_are_named(
    alice: Caller, mask: bytes, chunks: list[pb.PictureChunk] | None, reason: str, field: str | None
) -> None:
    picture = png()
    sizes = pb.PictureSpec(size_bytes=len(picture), mask_size_bytes=len(mask))
    parts = [pb.PictureChunk(index=0, data=mask, mask=True)] if chunks is None else chunks
    told = await alice.refused(
        pb.FineTuneSpec(class_noun="animal", pictures=[sizes]), pb.PictureChunk(index=0, data=picture), *parts
    )
    assert told.reason == reason
    assert told.fields == ([] if field is None else [field])
    assert alice.live.stores.jobs.open_jobs() == set()


async def test_the_text_names_the_picture_whose_mask_is_wrong(alice: Caller) -> None:
    picture, mask = png(), b"GIF89a" + b"\0" * 50
    specs = [
        pb.PictureSpec(size_bytes=len(picture)),
        pb.PictureSpec(size_bytes=len(picture), mask_size_bytes=len(mask)),
    ]
    parts = [pb.PictureChunk(index=index, data=picture) for index in range(2)]
    told = await alice.refused(
        pb.FineTuneSpec(class_noun="animal", pictures=specs), *parts, pb.PictureChunk(index=1, data=mask, mask=True)
    )
    assert told.fields == ["pictures[1].mask"]
    assert told.message.startswith("pictures[1].mask: ")


async def test_the_text_encoder_learns_where_svdiff_is_asked_to(alice: Caller) -> None:
    settings = pb.FineTuneSettings(train_text_encoder=True, text_encoder_learning_rate=0.25)
    job = await alice.create(one(settings=settings, validate_only=False), pb.PictureChunk(index=0, data=png()))
    spec = alice.stored(job)
    assert (spec.method, spec.train_text_encoder, spec.text_encoder_learning_rate) == (Method.SVDIFF, True, 0.25)
    assert not read_spec(one(), "sks").train_text_encoder
    told = await alice.refused(one(method=pb.FINE_TUNE_METHOD_LORA, settings=settings))
    assert told.fields == ["settings.train_text_encoder"]
