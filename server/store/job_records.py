"""What the job table holds, as frozen records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from sqlalchemy import Row

from hueshift.training.spec import TrainingSpec


class JobState(StrEnum):
    """Where a job stands. queued -> running -> an ended state, and back to queued when a worker is lost or
    a failed job is retried.
    """

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """True for the states a job never leaves by itself; a failed one may be queued again by its tenant."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


class EventKind(StrEnum):
    """What an event tells."""

    STATE = "state"
    PROGRESS = "progress"
    SAMPLE = "sample"


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to be queued. Larger `priority` goes first. `picture_bytes`: of its stored pictures and masks."""

    job_id: str
    tenant: str
    spec: TrainingSpec
    adapter_id: str
    display_name: str
    labels: Mapping[str, str]
    priority: int = 0
    picture_bytes: int = 0

    def first_row(self, now: float) -> dict[str, Any]:
        """Return the values of its row when it is queued; the other columns have defaults."""
        return {
            "job_id": self.job_id,
            "tenant": self.tenant,
            "state": JobState.QUEUED.value,
            "priority": self.priority,
            "spec": self.spec.to_json(),
            "adapter_id": self.adapter_id,
            "display_name": self.display_name,
            "labels": dict(self.labels),
            "steps": self.spec.steps,
            "sequence": 1,
            "created": now,
            "picture_bytes": self.picture_bytes,
        }


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One row of the job table. Times are seconds since the epoch."""

    job_id: str
    tenant: str
    state: JobState
    priority: int
    spec: TrainingSpec
    adapter_id: str
    display_name: str
    labels: Mapping[str, str]
    step: int
    steps: int
    loss: float | None
    attempt: int
    lease_owner: str | None
    lease_expires: float | None
    leases_lost: int
    not_before: float
    fencing_token: int
    cancel_requested: bool
    checkpoint: str | None
    revision: int
    scores: Mapping[str, float] | None
    error_reason: str | None
    error_message: str | None
    sequence: int
    created: float
    started: float | None
    ended: float | None
    device_seconds: float
    charged: float | None
    failures: Sequence[Mapping[str, Any]]
    picture_bytes: int = 0

    @classmethod
    def from_row(cls, row: Row[Any]) -> Self:
        """Read a row with all columns."""
        values = dict(row._mapping)
        values["state"] = JobState(values["state"])
        values["spec"] = TrainingSpec.from_json(values["spec"])
        values["failures"] = values["failures"] or []
        return cls(**values)

    def snapshot(self) -> dict[str, Any]:
        """Return what may change during a job's life, as plain data for a state event."""
        return {
            "state": self.state.value,
            "step": self.step,
            "loss": self.loss,
            "attempt": self.attempt,
            "revision": self.revision,
            "scores": dict(self.scores) if self.scores is not None else None,
            "error_reason": self.error_reason,
            "error_message": self.error_message,
            "sequence": self.sequence,
            "started": self.started,
            "ended": self.ended,
            "device_seconds": self.device_seconds,
        }


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's right to a job: valid while the job runs under the same fencing token."""

    job_id: str
    token: int


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job and the lease it was taken under."""

    job: JobRecord
    lease: Lease


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One event. `data` is the PNG of a sample; old samples lose it, see `job_events.KEPT_SAMPLES`."""

    sequence: int
    time: float
    kind: EventKind
    payload: Mapping[str, Any]
    data: bytes | None
