"""Errors as statuses: code, details, bounds, and nothing of a foreign exception's text."""

from collections.abc import Sequence

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import (
    BadRequest,
    ErrorInfo,
    PreconditionFailure,
    QuotaFailure,
    ResourceInfo,
    RetryInfo,
)
from structlog.testing import capture_logs

from hueshift.adapters import errors
from hueshift.adapters.errors import FieldViolation, HueshiftError, Reason, ResourceRef
from hueshift.server.rpc.status import as_hueshift_error, code_name, is_retryable, to_status


def find(packed: Sequence[AnyMessage], wanted: Message) -> bool:
    """Unpack the detail of `wanted`'s type into it; False if there is none."""
    return any(detail.Unpack(wanted) for detail in packed)


@pytest.mark.parametrize("kind", HueshiftError.__subclasses__())
def test_every_error_type_has_a_code_and_error_info(kind: type[HueshiftError]) -> None:
    status = to_status(kind(Reason.INVALID_FIELD, "what happened", metadata={"key": "value"}))
    info = ErrorInfo()
    assert status.code is not grpc.StatusCode.UNKNOWN
    assert status.proto.code == status.code.value[0]
    assert find(status.proto.details, info)
    assert (info.reason, info.domain, info.metadata["key"]) == ("INVALID_FIELD", "hueshift", "value")
    assert info.metadata["retryable"] == "false"


def test_violations_become_a_bad_request_with_field_paths() -> None:
    error = errors.InvalidArgument(
        Reason.INVALID_FIELD,
        "two fields",
        violations=[FieldViolation("steps", "0 given"), FieldViolation("adapters[1].weight", "nan given")],
    )
    bad = BadRequest()
    assert find(to_status(error).proto.details, bad)
    assert [(v.field, v.description) for v in bad.field_violations] == [
        ("steps", "0 given"),
        ("adapters[1].weight", "nan given"),
    ]


def test_quota_retry_resource_and_precondition_details() -> None:
    quota, retry = QuotaFailure(), RetryInfo()
    proto = to_status(errors.ResourceExhausted(Reason.TENANT_QUOTA, "too many", retry_after=1.5)).proto
    assert find(proto.details, quota)
    assert find(proto.details, retry)
    assert quota.violations[0].subject == "tenant"
    assert retry.retry_delay.ToMilliseconds() == 1500

    resource, precondition = ResourceInfo(), PreconditionFailure()
    reference = ResourceRef("hueshift.v1/adapters", "tenants/a/adapters/x")
    proto = to_status(errors.FailedPrecondition(Reason.ADAPTER_BASE_MISMATCH, "another base", resource=reference)).proto
    assert find(proto.details, resource)
    assert find(proto.details, precondition)
    assert resource.resource_name == "tenants/a/adapters/x"
    assert (precondition.violations[0].type, precondition.violations[0].subject) == (
        "ADAPTER_BASE_MISMATCH",
        "tenants/a/adapters/x",
    )


def test_size_stays_below_what_clients_accept() -> None:
    violations = [FieldViolation("é" * 5000, "ü" * 5000) for _ in range(500)]
    status = to_status(
        errors.InvalidArgument(
            Reason.INVALID_FIELD,
            "\ud800" + "漢" * 100_000,
            violations=violations,
            metadata={str(i): "x" * 4000 for i in range(3)},
        )
    )
    bad = BadRequest()
    assert find(status.proto.details, bad)
    assert len(bad.field_violations) > 1
    assert len(status.message.encode()) <= 600
    assert len(status.trailer[1]) <= 3600
    assert status.message.endswith("...")


def test_a_foreign_exception_leaves_only_an_incident_id() -> None:
    with capture_logs() as logs:
        error = as_hueshift_error(RuntimeError("the password is swordfish"))
    status = to_status(error)
    incident = error.metadata["incident"]
    assert status.code is grpc.StatusCode.INTERNAL
    assert b"swordfish" not in status.trailer[1]
    assert incident in status.message
    assert logs[0]["incident"] == incident
    assert str(logs[0]["exc_info"]) == "the password is swordfish"


def test_malformed_protobuf_is_the_callers_fault() -> None:
    error = as_hueshift_error(DecodeError("bytes"))
    assert error.reason is Reason.MESSAGE_MALFORMED
    assert code_name(error) == code_name(DecodeError()) == "INVALID_ARGUMENT"


def test_only_waiting_reasons_are_retryable() -> None:
    retryable = {reason for reason in Reason if is_retryable(reason)}
    assert {Reason.QUEUE_FULL, Reason.DRAINING, Reason.WARMING_UP, Reason.TENANT_QUOTA} <= retryable
    assert not retryable & {Reason.INVALID_FIELD, Reason.ADAPTER_NOT_FOUND, Reason.INTERNAL, Reason.DEADLINE_PASSED}
