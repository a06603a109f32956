"""What can go wrong with a call, as one exception type per kind of answer, read from google.rpc details."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

M = TypeVar("M", bound=Message)

_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of the request and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """Everything an answer says about a failure. `retry_after` is in seconds."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    violations: tuple[FieldViolation, ...] = ()
    metadata: Mapping[str, str] | None = None
    retry_after: float | None = None
    resource: str = ""


class HueshiftClientError(Exception):
    """Base of all errors of calls. `str(error)` is the server's own sentence."""

    def __init__(self, facts: ErrorFacts) -> None:
        super().__init__(facts.message)
        self.facts = facts

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code."""
        return self.facts.code

    @property
    def message(self) -> str:
        """The server's sentence for people."""
        return self.facts.message

    @property
    def reason(self) -> str:
        """The server's stable reason, for example `QUEUE_FULL`; empty if the answer did not come from the server."""
        return self.facts.reason

    @property
    def violations(self) -> tuple[FieldViolation, ...]:
        """The wrong fields, if fields were wrong."""
        return self.facts.violations

    @property
    def retry_after(self) -> float | None:
        """Seconds the server asks to wait before another try; None if it asks for none."""
        return self.facts.retry_after

    @property
    def incident_id(self) -> str:
        """What to quote when reporting a failure of the server; empty for other errors."""
        return (self.facts.metadata or {}).get("incident", "")

    @property
    def retryable(self) -> bool:
        """True if the server says that the same call may succeed later."""
        return self.retry_after is not None or (self.facts.metadata or {}).get("retryable") == "true"


class InvalidRequest(HueshiftClientError):
    """The request is wrong, whatever the state of the server."""


class Unauthenticated(HueshiftClientError):
    """The API key is missing or wrong."""


class PermissionDenied(HueshiftClientError):
    """The caller may not do this."""


class NotFound(HueshiftClientError):
    """There is no such thing for this caller."""


class Conflict(HueshiftClientError):
    """The thing exists already, or the idempotency key was used for another request."""


class PreconditionFailed(HueshiftClientError):
    """The state of the system must change first."""


class ResourceExhausted(HueshiftClientError):
    """A queue, quota or limit is full."""


class DeadlineExceeded(HueshiftClientError):
    """The time of the call was over."""


class Cancelled(HueshiftClientError):
    """The call was given up."""


class Unavailable(HueshiftClientError):
    """The server cannot be reached or cannot answer now."""


class ServerFault(HueshiftClientError):
    """A failure of the server; `incident_id` names it in the server's log."""


class CorruptAnswer(HueshiftClientError):
    """An answer broke the contract: bytes missing, a hash that does not match."""

    @classmethod
    def because(cls, message: str) -> "CorruptAnswer":
        """Build the error; it is found on this side of the wire, so it has no reason."""
        return cls(ErrorFacts(grpc.StatusCode.DATA_LOSS, message))


_TYPES: dict[grpc.StatusCode, type[HueshiftClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionFailed,
    grpc.StatusCode.ABORTED: PreconditionFailed,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


def from_rpc_error(error: grpc.RpcError) -> HueshiftClientError:
    """Turn the error of a call, sync or async, into ours. Codes without a type of their own become ServerFault."""
    code = error.code()
    trailers = cast(Iterable[tuple[str, str | bytes]], error.trailing_metadata() or ())
    facts = read_facts(code, error.details() or "", trailers)
    return _TYPES.get(code, ServerFault)(facts)


def read_facts(code: grpc.StatusCode, message: str, trailers: Iterable[tuple[str, str | bytes]]) -> ErrorFacts:
    """Read the google.rpc details out of trailing metadata; unreadable or foreign details are left out."""
    reason, resource, retry_after = "", "", None
    metadata: dict[str, str] = {}
    violations: tuple[FieldViolation, ...] = ()
    for detail in _details(trailers):
        if (info := _unpack(detail, error_details_pb2.ErrorInfo)) is not None:
            reason, metadata = info.reason, dict(info.metadata)
        elif (bad := _unpack(detail, error_details_pb2.BadRequest)) is not None:
            violations = tuple(FieldViolation(v.field, v.description) for v in bad.field_violations)
        elif (retry := _unpack(detail, error_details_pb2.RetryInfo)) is not None:
            retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif (about := _unpack(detail, error_details_pb2.ResourceInfo)) is not None:
            resource = about.resource_name
    return ErrorFacts(code, message, reason, violations, metadata, retry_after, resource)


def _unpack(detail: any_pb2.Any, kind: type[M]) -> M | None:
    message = kind()
    try:
        return message if detail.Unpack(message) else None
    except DecodeError:
        return None


def _details(trailers: Iterable[tuple[str, str | bytes]]) -> list[any_pb2.Any]:
    for key, value in trailers:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return []
