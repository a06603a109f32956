"""Fine-tuning jobs: their record and events, and the calls of FineTuneService."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias, TypedDict, Unpack

from hueshift.client.calls import Page, Paged, Unary, Upload
from hueshift.client.choices import JobState, Method, Priority, Subject
from hueshift.client.errors import CorruptAnswer
from hueshift.client.job_spec import Setting, make_spec
from hueshift.client.uploads import Source, chunks, new_key, read_source
from hueshift.client.wire import from_enum, known_enums, optional, to_datetime, to_enum
from hueshift.v1 import finetune_pb2 as pb
from hueshift.v1 import generation_pb2


@dataclass(frozen=True, slots=True)
class LearnedSubject:
    """One more thing that a job learns: its word, the noun of what it is, known words that the word starts from."""

    identifier: str
    class_noun: str = ""
    identifier_init: Sequence[str] = ()


class FineTuneOptions(TypedDict, total=False):
    """Options of a fine-tuning job; what is absent takes the method's default, which `model()` lists.

    `captions`: one per picture, with the identifier where the learned word belongs. `identifier_init`: known words the
    identifier starts from. `settings` in the contract's words (FineTuneSettings): steps, learning_rate, rank, ...;
    choices as `linear`, lists as sequences. `more_subjects` follow the first one, and `picture_subjects` tells which of
    them each picture shows, 0 being the first. `masks` are picture files by the index of the picture they mask.
    `priority` orders the tenant's own waiting jobs. With `validate_only` nothing is queued: the answer has no name, and
    its `cost` where that is known. `allow_unserved` takes an adapter that the server can make but not draw with.
    """

    captions: Sequence[str]
    subject: Subject
    method: Method
    identifier: str
    class_noun: str
    learn_identifier: bool
    identifier_init: Sequence[str]
    settings: Mapping[str, Setting]
    more_subjects: Sequence["LearnedSubject"]
    picture_subjects: Sequence[int]
    picture_repeats: Sequence[int]
    masks: Mapping[int, Source]
    validate_only: bool
    allow_unserved: bool
    priority: Priority
    sample_prompts: Sequence[str]
    adapter_id: str
    display_name: str
    labels: Mapping[str, str]
    idempotency_key: str


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed: a stable reason and a sentence."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Scores:
    """CLIP scores of a job's samples: against the pictures, against their prompts, and the base model's own.

    `prior_kept` is how much other things look as before, 1 being all; `diversity` how much pictures of one prompt
    differ. None where the server did not measure them. Edits tell how far their picture is off after inversion and the
    way back, with the adapter and with the base model; without a CLIP the cosines are 0.
    """

    clip_i: float
    clip_t: float
    clip_i_base: float
    prior_kept: float | None = None
    diversity: float | None = None
    inversion_error: float | None = None
    inversion_error_base: float | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a job takes of the training device, as measured over `measured_steps` of jobs of its kind."""

    gpu_seconds: float
    seconds_per_step: float
    measured_steps: int


@dataclass(frozen=True, slots=True)
class FineTune:
    """A fine-tuning job. `loss` is None before its first step, times are None before they come.

    One that succeeded with `step` below `steps` stopped early. `device_seconds` are those it has used. `cost` is None
    until a job of its kind was measured, `kept_energy` where the adapter was not compressed, `priority` from a server
    that is too old to tell it, or so new that this client does not know the word.
    """

    name: str
    state: JobState
    method: Method
    subject: Subject
    step: int
    steps: int
    loss: float | None
    adapter: str
    revision: int
    attempt: int
    error: JobError | None
    created: datetime
    started: datetime | None
    ended: datetime | None
    sequence: int
    scores: Scores | None
    cost: Cost | None = None
    kept_energy: float | None = None
    device_seconds: float = 0.0
    priority: Priority | None = None

    @property
    def id(self) -> str:
        """The bare id, the last part of the name."""
        return self.name.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The job's state changed; `job` is the job after it."""

    sequence: int
    time: datetime
    job: FineTune


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """`step` of `steps` are done; loss and seconds per step are means since the last such event."""

    sequence: int
    time: datetime
    step: int
    steps: int
    loss: float
    seconds_per_step: float


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """A sample picture, as PNG."""

    sequence: int
    time: datetime
    step: int
    prompt: str
    data: bytes


@dataclass(frozen=True, slots=True)
class DeletedJob:
    """What a delete removed: events, and bytes of training pictures that the server still kept."""

    events: int
    picture_bytes: int


JobEvent: TypeAlias = StateChanged | TrainingProgress | TrainingSample


class FineTuneFailed(Exception):
    """The job ended without an adapter; `job` says how."""

    def __init__(self, job: FineTune) -> None:
        cause = f": {job.error.message} ({job.error.reason})" if job.error else ""
        super().__init__(f"{job.name} ended {job.state.value}{cause}")
        self.job = job


def create_call(
    pictures: Sequence[Source], **options: Unpack[FineTuneOptions]
) -> Upload[pb.CreateFineTuneRequest, pb.CreateFineTuneResponse, FineTune]:
    """Queue a job, reading its files. Repeats of this one call, retries included, queue it once.

    Raises ValueError where captions, subjects, repeats or masks do not match the pictures, or a setting or one of its
    choices is unknown, and OSError where a file cannot be read.
    """
    shown = [read_source(picture) for picture in pictures]
    masks = {index: read_source(mask) for index, mask in options.get("masks", {}).items()}
    spec = make_spec(shown, masks, options)

    def messages() -> Iterator[pb.CreateFineTuneRequest]:
        yield pb.CreateFineTuneRequest(spec=spec)
        for index, picture in enumerate(() if spec.validate_only else shown):
            for chunk in chunks(picture):
                yield pb.CreateFineTuneRequest(chunk=pb.PictureChunk(index=index, data=chunk))
            for chunk in chunks(masks.get(index, b"")):
                yield pb.CreateFineTuneRequest(chunk=pb.PictureChunk(index=index, data=chunk, mask=True))

    return Upload(lambda s: s.finetune.CreateFineTune, messages, lambda r: read_job(r.fine_tune))


def get_call(name: str) -> Unary[pb.GetFineTuneRequest, pb.GetFineTuneResponse, FineTune]:
    """Return one job."""
    request = pb.GetFineTuneRequest(name=name)
    return Unary(lambda s: s.finetune.GetFineTune, request, lambda r: read_job(r.fine_tune))


def list_call(states: Sequence[JobState], page_size: int) -> Paged[FineTune]:
    """Return the jobs page by page."""
    numbers = [to_enum(pb.FineTuneState, "FINE_TUNE_STATE", state) for state in states]

    def page(token: str) -> Unary[Any, Any, Page[FineTune]]:
        request = pb.ListFineTunesRequest(page_size=page_size, page_token=token, states=numbers)
        return Unary(lambda s: s.finetune.ListFineTunes, request, _read_page)

    return page


def cancel_call(name: str) -> Unary[pb.CancelFineTuneRequest, pb.CancelFineTuneResponse, FineTune]:
    """Ask a job to stop."""
    request = pb.CancelFineTuneRequest(name=name)
    return Unary(lambda s: s.finetune.CancelFineTune, request, lambda r: read_job(r.fine_tune))


def retry_call(name: str) -> Unary[pb.RetryFineTuneRequest, pb.RetryFineTuneResponse, FineTune]:
    """Queue a failed job again. Repeats of this one call queue it once."""
    request = pb.RetryFineTuneRequest(name=name, idempotency_key=new_key())
    return Unary(lambda s: s.finetune.RetryFineTune, request, lambda r: read_job(r.fine_tune))


def delete_call(name: str) -> Unary[pb.DeleteFineTuneRequest, pb.DeleteFineTuneResponse, DeletedJob]:
    """Remove a job with its pictures."""
    request = pb.DeleteFineTuneRequest(name=name, idempotency_key=new_key())
    return Unary(lambda s: s.finetune.DeleteFineTune, request, lambda r: DeletedJob(r.events, r.picture_bytes))


def name_of(job: str | FineTune) -> str:
    """Return the name of a job given as record or name."""
    return job.name if isinstance(job, FineTune) else job


def succeeded(job: FineTune) -> FineTune:
    """Return the job. Raises FineTuneFailed unless it succeeded."""
    if job.state is not JobState.SUCCEEDED:
        raise FineTuneFailed(job)
    return job


def watch_ended_early(name: str) -> CorruptAnswer:
    """Build the error of a server that keeps ending a watch before the job has ended."""
    return CorruptAnswer.because(f"the server ends the watch of {name} again and again although the job goes on")


class WatchCursor:
    """Where a watch stands: which event came last, and whether it was the job's last one."""

    def __init__(self, name: str, after_sequence: int) -> None:
        self._name = name
        self._sequence = after_sequence
        self.ended = False

    def request(self) -> pb.WatchFineTuneRequest:
        """Return the request that goes on from here."""
        return pb.WatchFineTuneRequest(name=self._name, after_sequence=self._sequence)

    def take(self, message: pb.WatchFineTuneResponse) -> JobEvent | None:
        """Return the event; None if it was seen before or is of a kind newer than this client."""
        if message.sequence <= self._sequence:
            return None
        self._sequence = message.sequence
        event = _read_job_event(message)
        self.ended = isinstance(event, StateChanged) and event.job.state.ended
        return event


def read_job(message: pb.FineTune) -> FineTune:
    """Return the record of a message."""
    return FineTune(
        name=message.name,
        state=from_enum(pb.FineTuneState, "FINE_TUNE_STATE", JobState, message.state, JobState.UNKNOWN),
        method=from_enum(pb.FineTuneMethod, "FINE_TUNE_METHOD", Method, message.method, Method.UNKNOWN),
        subject=from_enum(pb.FineTuneSubject, "FINE_TUNE_SUBJECT", Subject, message.subject, Subject.UNKNOWN),
        step=message.step,
        steps=message.steps,
        loss=optional(message.HasField("loss"), lambda: message.loss),
        adapter=message.adapter,
        revision=message.revision,
        attempt=message.attempt,
        error=optional(message.HasField("error"), lambda: JobError(message.error.reason, message.error.message)),
        created=to_datetime(message.create_time),
        started=optional(message.HasField("start_time"), lambda: to_datetime(message.start_time)),
        ended=optional(message.HasField("end_time"), lambda: to_datetime(message.end_time)),
        sequence=message.sequence,
        scores=optional(
            message.HasField("scores"),
            lambda: _read_scores(message.scores),
        ),
        cost=optional(
            message.HasField("cost"),
            lambda: Cost(message.cost.gpu_seconds, message.cost.seconds_per_step, message.cost.measured_steps),
        ),
        kept_energy=optional(message.HasField("kept_energy"), lambda: message.kept_energy),
        device_seconds=message.device_seconds,
        priority=next(iter(known_enums(generation_pb2.Priority, "PRIORITY", Priority, [message.priority])), None),
    )


def _read_scores(message: pb.FineTuneScores) -> Scores:
    return Scores(
        message.clip_i,
        message.clip_t,
        message.clip_i_base,
        optional(message.HasField("prior_kept"), lambda: message.prior_kept),
        optional(message.HasField("diversity"), lambda: message.diversity),
        optional(message.HasField("inversion_error"), lambda: message.inversion_error),
        optional(message.HasField("inversion_error_base"), lambda: message.inversion_error_base),
    )


def _read_job_event(message: pb.WatchFineTuneResponse) -> JobEvent | None:
    sequence, time = message.sequence, to_datetime(message.time)
    match message.WhichOneof("event"):
        case "state_change":
            return StateChanged(sequence, time, read_job(message.state_change))
        case "progress":
            p = message.progress
            return TrainingProgress(sequence, time, p.step, p.steps, p.loss, p.seconds_per_step)
        case "sample":
            return TrainingSample(sequence, time, message.sample.step, message.sample.prompt, message.sample.data)
    return None


def _read_page(message: pb.ListFineTunesResponse) -> Page[FineTune]:
    return Page(tuple(read_job(job) for job in message.fine_tunes), message.next_page_token)
