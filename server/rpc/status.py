"""The one place where our errors become gRPC: a code, a message, and google.rpc details.

Every error carries ErrorInfo, whose metadata says whether a retry can help (`retryable`), so that a client needs no
table of its own. An exception that is not ours becomes INTERNAL with an incident id; its text goes to the log only.
"""

import asyncio
import secrets
from dataclasses import dataclass

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import (
    BadRequest,
    ErrorInfo,
    PreconditionFailure,
    QuotaFailure,
    ResourceInfo,
    RetryInfo,
)
from google.rpc.status_pb2 import Status

from hueshift.adapters import errors
from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.server.rpc.crowding import MAX_VALUES, CrowdedMessage

DOMAIN = "hueshift"
DETAILS_KEY = "grpc-status-details-bin"

# Clients drop calls whose trailers pass 8 KiB (gRPC's default max_metadata_size). The details grow by a third in base64
# and the message, percent-encoded, up to three times: these caps keep both below that together.
MAX_MESSAGE_BYTES = 600
MAX_DESCRIPTION_BYTES = 240
MAX_DETAILS_BYTES = 3600

_CODES: dict[type[HueshiftError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Internal: grpc.StatusCode.INTERNAL,
}

_RETRYABLE = frozenset(
    {
        Reason.QUEUE_FULL,
        Reason.TOO_MANY_CALLS,
        Reason.TENANT_QUOTA,
        Reason.SLOTS_EXHAUSTED,
        Reason.DEVICE_MEMORY,
        Reason.DEVICE_LOST,
        Reason.STORE_UNAVAILABLE,
        Reason.NO_REPLICA,
        Reason.DRAINING,
        Reason.WARMING_UP,
    }
)


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """What a caller gets: a code, a message, and the serialised google.rpc.Status with the details."""

    code: grpc.StatusCode
    message: str
    proto: Status

    @property
    def trailer(self) -> tuple[str, bytes]:
        """The trailing metadata entry that carries the details."""
        return DETAILS_KEY, self.proto.SerializeToString()


def is_retryable(reason: Reason) -> bool:
    """True if the same call may succeed a little later without any change by the caller."""
    return reason in _RETRYABLE


def grpc_code(error: HueshiftError) -> grpc.StatusCode:
    """Return the code of an error of ours."""
    return next(code for kind, code in _CODES.items() if isinstance(error, kind))


def as_hueshift_error(error: Exception) -> HueshiftError:
    """Return `error` if it is ours, else the error that stands for it.

    A message that cannot be parsed is the caller's; everything else unknown is logged with an incident id and stands as
    Internal with that id alone.
    """
    if isinstance(error, HueshiftError) and not isinstance(error, errors.Internal):
        return error
    if isinstance(error, CrowdedMessage):
        return errors.InvalidArgument.for_field(
            error.field, f"the message has more than {MAX_VALUES} values up to here; allowed: {MAX_VALUES}. Send fewer."
        )
    if isinstance(error, DecodeError):
        return errors.InvalidArgument(
            Reason.MESSAGE_MALFORMED, "a message is not valid protobuf of the method's request type"
        )
    incident = f"inc-{secrets.token_hex(6)}"
    structlog.get_logger().error("internal error", incident=incident, exc_info=error)
    return errors.Internal(
        Reason.INTERNAL,
        f"internal error, incident {incident}; the operator finds the cause in the server's log under this id",
        metadata={"incident": incident},
    )


def to_status(error: HueshiftError) -> RpcStatus:
    """Build the status of an error of ours, bounded in size."""
    code = grpc_code(error)
    message = _cut(error.message, MAX_MESSAGE_BYTES)
    number: int = code.value[0]
    status = Status(code=number, message=message)
    for detail in _details(error, message):
        packed = AnyMessage()
        packed.Pack(detail)
        if status.ByteSize() + packed.ByteSize() <= MAX_DETAILS_BYTES:
            status.details.append(packed)
    return RpcStatus(code, message, status)


def code_name(error: BaseException) -> str:
    """Return the code a call ends with after `error`, for metrics and logs."""
    if isinstance(error, HueshiftError):
        return grpc_code(error).name
    if isinstance(error, DecodeError):
        return grpc.StatusCode.INVALID_ARGUMENT.name
    if isinstance(error, asyncio.CancelledError):
        return grpc.StatusCode.CANCELLED.name
    return grpc.StatusCode.INTERNAL.name


def _details(error: HueshiftError, message: str) -> list[Message]:
    retryable = "true" if is_retryable(error.reason) else "false"
    metadata = {key: _cut(value, MAX_DESCRIPTION_BYTES) for key, value in error.metadata.items()}
    found: list[Message] = [
        ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata={**metadata, "retryable": retryable})
    ]
    if error.retry_after is not None:
        delay = Duration()
        delay.FromMilliseconds(max(0, round(error.retry_after * 1000)))
        found.append(RetryInfo(retry_delay=delay))
    if error.resource is not None:
        name = _cut(error.resource.name, MAX_DESCRIPTION_BYTES)
        found.append(ResourceInfo(resource_type=error.resource.type, resource_name=name, description=message))
    if error.reason in (Reason.TENANT_QUOTA, Reason.TENANT_STORAGE):
        quota = QuotaFailure.Violation(subject="tenant", description=message)
        found.append(QuotaFailure(violations=[quota]))
    if isinstance(error, errors.FailedPrecondition):
        subject = _cut(error.resource.name, MAX_DESCRIPTION_BYTES) if error.resource is not None else ""
        violation = PreconditionFailure.Violation(type=error.reason.value, subject=subject, description=message)
        found.append(PreconditionFailure(violations=[violation]))
    if error.violations:
        found.append(_bad_request(error))
    return found


def _bad_request(error: HueshiftError) -> BadRequest:
    """List the wrong fields, as many as fit beside the other details; the message tells the number left out."""
    request = BadRequest()
    room = MAX_DETAILS_BYTES - 2 * MAX_MESSAGE_BYTES
    for violation in error.violations:
        field = _cut(violation.field, MAX_DESCRIPTION_BYTES)
        description = _cut(violation.description, MAX_DESCRIPTION_BYTES)
        entry = BadRequest.FieldViolation(field=field, description=description)
        if request.ByteSize() + entry.ByteSize() > room:
            break
        request.field_violations.append(entry)
    return request


def _cut(text: str, limit: int) -> str:
    """Return `text` in at most `limit` UTF-8 bytes, as valid Unicode whatever was given."""
    data = text.encode(errors="replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode(errors="ignore") + "..."
