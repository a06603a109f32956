"""Job records and events as messages of the contract, and the spec message as a checked training spec."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from hueshift.adapters.errors import InvalidArgument
from hueshift.server.rpc.checker import Checker
from hueshift.server.rpc.finetune_settings import read_settings
from hueshift.server.rpc.names import adapter_name, fine_tune_name
from hueshift.server.rpc.priorities import PRIORITIES, tell_priority
from hueshift.server.store.job_records import EventKind, JobEvent, JobRecord, JobState
from hueshift.training.cost import Cost
from hueshift.training.defaults import complete_spec
from hueshift.training.spec import Method, Subject, SubjectKind, TrainingSpec
from hueshift.v1 import finetune_pb2 as pb

_METHODS: Mapping["pb.FineTuneMethod.ValueType", Method] = {
    pb.FINE_TUNE_METHOD_UNSPECIFIED: Method.SVDIFF,
    pb.FINE_TUNE_METHOD_SVDIFF: Method.SVDIFF,
    pb.FINE_TUNE_METHOD_RESIDUALS: Method.RESIDUALS,
    pb.FINE_TUNE_METHOD_LORA: Method.LORA,
    pb.FINE_TUNE_METHOD_TEXTUAL_INVERSION: Method.TEXTUAL_INVERSION,
    pb.FINE_TUNE_METHOD_CUSTOM_DIFFUSION: Method.CUSTOM_DIFFUSION,
    pb.FINE_TUNE_METHOD_DREAMBOOTH: Method.DREAMBOOTH,
}
_SUBJECTS: Mapping["pb.FineTuneSubject.ValueType", SubjectKind] = {
    pb.FINE_TUNE_SUBJECT_UNSPECIFIED: SubjectKind.SUBJECT,
    pb.FINE_TUNE_SUBJECT_SUBJECT: SubjectKind.SUBJECT,
    pb.FINE_TUNE_SUBJECT_STYLE: SubjectKind.STYLE,
    pb.FINE_TUNE_SUBJECT_EDIT: SubjectKind.EDIT,
}
_STATES: Mapping["pb.FineTuneState.ValueType", JobState] = {
    pb.FINE_TUNE_STATE_QUEUED: JobState.QUEUED,
    pb.FINE_TUNE_STATE_RUNNING: JobState.RUNNING,
    pb.FINE_TUNE_STATE_SUCCEEDED: JobState.SUCCEEDED,
    pb.FINE_TUNE_STATE_FAILED: JobState.FAILED,
    pb.FINE_TUNE_STATE_CANCELLED: JobState.CANCELLED,
}
_STATE_NUMBERS = {state: number for number, state in _STATES.items()}
METHOD_NUMBERS = {method: number for number, method in _METHODS.items() if number}
_SUBJECT_NUMBERS = {kind: number for number, kind in _SUBJECTS.items() if number}


def read_spec(spec: pb.FineTuneSpec, default_identifier: str) -> TrainingSpec:
    """Return the complete training spec. Raises InvalidArgument naming every wrong field."""
    if spec.method not in _METHODS:
        raise InvalidArgument.for_field("method", f"{spec.method} given; allowed: {_names(pb.FineTuneMethod)}")
    if spec.subject not in _SUBJECTS:
        raise InvalidArgument.for_field("subject", f"{spec.subject} given; allowed: {_names(pb.FineTuneSubject)}")
    return complete_spec(
        method=_METHODS[spec.method],
        subject_kind=_SUBJECTS[spec.subject],
        captions=[picture.caption for picture in spec.pictures],
        identifier=spec.identifier or ("" if spec.subject == pb.FINE_TUNE_SUBJECT_EDIT else default_identifier),
        class_noun=spec.class_noun,
        learn_identifier=spec.learn_identifier if spec.HasField("learn_identifier") else None,
        identifier_init=list(spec.identifier_init),
        sample_prompts=list(spec.sample_prompts),
        more_subjects=[
            Subject(
                identifier=subject.identifier,
                class_noun=subject.class_noun,
                identifier_init=tuple(subject.identifier_init),
            )
            for subject in spec.more_subjects
        ],
        picture_subjects=[picture.subject for picture in spec.pictures],
        picture_repeats=[picture.repeats or 1 for picture in spec.pictures],
        masked_pictures=[index for index, picture in enumerate(spec.pictures) if picture.mask_size_bytes],
        **read_settings(spec.settings),
    )


def read_priority(spec: pb.FineTuneSpec) -> int:
    """Return the place among the tenant's own jobs, larger first. Raises InvalidArgument on an unknown value."""
    check = Checker()
    priority = check.choice("priority", spec.priority, PRIORITIES, "Priority")
    check.done()
    return priority


def read_states(states: "Sequence[pb.FineTuneState.ValueType]") -> list[JobState]:
    """Return the states of a filter, each once. Raises InvalidArgument on an unknown one, or on too many."""
    if len(states) > len(_STATES):
        raise InvalidArgument.for_field("states", f"{len(states)} given; allowed: at most {len(_STATES)}, each once")
    for index, state in enumerate(states):
        if state not in _STATES:
            raise InvalidArgument.for_field(f"states[{index}]", f"{state} given; allowed: {_names(pb.FineTuneState)}")
    return [_STATES[state] for state in dict.fromkeys(states)]


def to_message(job: JobRecord, cost: Cost | None = None) -> pb.FineTune:
    """Return the message of a job, with what it costs where that is known."""
    message = pb.FineTune(
        name=fine_tune_name(job.tenant, job.job_id),
        state=_STATE_NUMBERS[job.state],
        method=METHOD_NUMBERS[job.spec.method],
        subject=_SUBJECT_NUMBERS[job.spec.subject_kind],
        step=job.step,
        steps=job.steps,
        loss=job.loss,
        adapter=adapter_name(job.tenant, job.adapter_id),
        revision=job.revision,
        attempt=job.attempt,
        create_time=_timestamp(job.created),
        start_time=_timestamp(job.started),
        end_time=_timestamp(job.ended),
        sequence=job.sequence,
        device_seconds=job.device_seconds,
        priority=tell_priority(job.priority),
    )
    if job.error_reason is not None:
        message.error.reason = job.error_reason
        message.error.message = job.error_message or ""
    scores = job.scores or {}
    if "clip_i" in scores or "inversion_error" in scores:
        names = pb.FineTuneScores.DESCRIPTOR.fields_by_name
        message.scores.CopyFrom(pb.FineTuneScores(**{name: scores[name] for name in names if name in scores}))
    if "kept_energy" in scores:
        message.kept_energy = scores["kept_energy"]
    _write_cost(message, cost)
    return message


def to_plan(spec: TrainingSpec, adapter: str, cost: Cost | None, priority: int) -> pb.FineTune:
    """Return the message of a job that was checked but not queued: it has no name and no state."""
    message = pb.FineTune(
        method=METHOD_NUMBERS[spec.method],
        subject=_SUBJECT_NUMBERS[spec.subject_kind],
        steps=spec.steps,
        adapter=adapter,
        priority=tell_priority(priority),
    )
    _write_cost(message, cost)
    return message


def to_event(job: JobRecord, event: JobEvent) -> pb.WatchFineTuneResponse:
    """Return the message of an event of `job`; a state event shows the job as it stood then."""
    message = pb.WatchFineTuneResponse(sequence=event.sequence, time=_timestamp(event.time))
    if event.kind is EventKind.STATE:
        then: dict[str, Any] = {**event.payload, "state": JobState(event.payload["state"])}
        message.state_change.CopyFrom(to_message(replace(job, **then)))
    elif event.kind is EventKind.PROGRESS:
        message.progress.CopyFrom(pb.FineTuneProgress(**event.payload))
    else:
        message.sample.CopyFrom(pb.FineTuneSample(**event.payload, data=event.data or b""))
    return message


def _write_cost(message: pb.FineTune, cost: Cost | None) -> None:
    if cost is not None:
        message.cost.gpu_seconds = cost.seconds
        message.cost.seconds_per_step = cost.seconds_per_step
        message.cost.measured_steps = cost.measured_steps


def _names(enum: Any) -> str:
    return ", ".join(enum.keys())


def _timestamp(seconds: float | None) -> Timestamp | None:
    if seconds is None:
        return None
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp
