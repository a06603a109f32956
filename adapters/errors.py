"""The errors of Hueshift: few types, one per kind of answer, each carrying a stable reason.

A reason is part of the contract: callers branch on it, and it never changes meaning. The server maps types to gRPC
codes in one place (server/rpc/status.py); nothing else knows about gRPC.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Stable, machine-readable causes. README's error table is generated from this enum and the comments beside it."""

    # The caller's input.
    INVALID_FIELD = "INVALID_FIELD"
    MESSAGE_MALFORMED = "MESSAGE_MALFORMED"
    MESSAGE_OUT_OF_ORDER = "MESSAGE_OUT_OF_ORDER"
    UPLOAD_SIZE_MISMATCH = "UPLOAD_SIZE_MISMATCH"
    UPLOAD_TOO_LARGE = "UPLOAD_TOO_LARGE"
    ADAPTER_FILE_INVALID = "ADAPTER_FILE_INVALID"
    ADAPTER_FILE_UNSAFE = "ADAPTER_FILE_UNSAFE"
    ADAPTER_TENSOR_UNKNOWN = "ADAPTER_TENSOR_UNKNOWN"
    ADAPTER_SHAPE_MISMATCH = "ADAPTER_SHAPE_MISMATCH"
    ADAPTER_DTYPE_UNSUPPORTED = "ADAPTER_DTYPE_UNSUPPORTED"
    ADAPTER_NOT_FINITE = "ADAPTER_NOT_FINITE"
    ADAPTER_RANK_TOO_LARGE = "ADAPTER_RANK_TOO_LARGE"
    ADAPTER_TARGET_UNSUPPORTED = "ADAPTER_TARGET_UNSUPPORTED"
    ADAPTER_BASE_MISMATCH = "ADAPTER_BASE_MISMATCH"
    ADAPTERS_INCOMPATIBLE = "ADAPTERS_INCOMPATIBLE"
    PICTURE_INVALID = "PICTURE_INVALID"
    PICTURE_TOO_LARGE = "PICTURE_TOO_LARGE"
    PAGE_TOKEN_INVALID = "PAGE_TOKEN_INVALID"
    # The settings and files of the operator.
    SETTINGS_INVALID = "SETTINGS_INVALID"
    MODEL_UNSUPPORTED = "MODEL_UNSUPPORTED"
    MODEL_FILE_INVALID = "MODEL_FILE_INVALID"
    ENGINE_UNAVAILABLE = "ENGINE_UNAVAILABLE"
    ENGINE_PARITY = "ENGINE_PARITY"
    PLAN_UNAVAILABLE = "PLAN_UNAVAILABLE"
    STORE_SCHEMA = "STORE_SCHEMA"
    RAY_UNAVAILABLE = "RAY_UNAVAILABLE"
    # What is, or is not, there.
    ADAPTER_NOT_FOUND = "ADAPTER_NOT_FOUND"
    ADAPTER_REVISION_NOT_FOUND = "ADAPTER_REVISION_NOT_FOUND"
    ADAPTER_DELETED = "ADAPTER_DELETED"
    FINE_TUNE_NOT_FOUND = "FINE_TUNE_NOT_FOUND"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    METHOD_NOT_FOUND = "METHOD_NOT_FOUND"
    IDEMPOTENCY_CONFLICT = "IDEMPOTENCY_CONFLICT"
    # Who asks.
    CREDENTIAL_MISSING = "CREDENTIAL_MISSING"
    CREDENTIAL_INVALID = "CREDENTIAL_INVALID"
    # What there is room and time for.
    QUEUE_FULL = "QUEUE_FULL"
    TOO_MANY_CALLS = "TOO_MANY_CALLS"
    TENANT_QUOTA = "TENANT_QUOTA"
    TENANT_STORAGE = "TENANT_STORAGE"
    SLOTS_EXHAUSTED = "SLOTS_EXHAUSTED"
    DEVICE_MEMORY = "DEVICE_MEMORY"
    DEVICE_LOST = "DEVICE_LOST"
    DEADLINE_TOO_SHORT = "DEADLINE_TOO_SHORT"
    DEADLINE_PASSED = "DEADLINE_PASSED"
    CANCELLED = "CANCELLED"
    DRAINING = "DRAINING"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    NO_REPLICA = "NO_REPLICA"
    STORE_FULL = "STORE_FULL"
    WARMING_UP = "WARMING_UP"
    # Training.
    TRAINING_DIVERGED = "TRAINING_DIVERGED"
    ATTEMPTS_EXHAUSTED = "ATTEMPTS_EXHAUSTED"
    JOB_TIME_LIMIT = "JOB_TIME_LIMIT"
    JOB_MEMORY_LIMIT = "JOB_MEMORY_LIMIT"
    JOB_NOT_RETRYABLE = "JOB_NOT_RETRYABLE"
    FINE_TUNE_RUNNING = "FINE_TUNE_RUNNING"
    LEASE_LOST = "LEASE_LOST"
    # Ours.
    STORE_DAMAGED = "STORE_DAMAGED"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field: its path in the request (`adapters[0].weight`) and what was given, allowed and to be done."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class ResourceRef:
    """The resource an error is about, for google.rpc.ResourceInfo."""

    type: str
    name: str


class HueshiftError(Exception):
    """Base of all our errors. `message` is written for the caller and may be sent to them."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        violations: Sequence[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
        resource: ResourceRef | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
        self.resource = resource


class InvalidArgument(HueshiftError):
    """The input is wrong whatever the state of the server."""

    @classmethod
    def for_field(cls, field: str, description: str, reason: Reason = Reason.INVALID_FIELD) -> "InvalidArgument":
        """Build the error for one wrong field."""
        return cls(reason, f"{field}: {description}", violations=[FieldViolation(field, description)])


class NotFound(HueshiftError):
    """The named thing does not exist for this caller."""


class Unimplemented(HueshiftError):
    """The server has no such method."""


class AlreadyExists(HueshiftError):
    """The thing to be made exists, or the idempotency key was used for something else."""


class FailedPrecondition(HueshiftError):
    """The state of the system must change before the call can succeed."""


class ResourceExhausted(HueshiftError):
    """A queue, quota or memory budget is full. Carries `retry_after` where waiting helps."""


class Unavailable(HueshiftError):
    """The server cannot answer now; another try later, or elsewhere, may succeed."""


class Unauthenticated(HueshiftError):
    """The caller's credential is missing or wrong."""


class DeadlineExceeded(HueshiftError):
    """The call's time is over."""


class Cancelled(HueshiftError):
    """The caller gave up."""


class Internal(HueshiftError):
    """A defect or a failure of ours."""
