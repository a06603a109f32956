"""Readiness, through the standard gRPC health service."""

import grpc
from grpc_health.v1 import health_pb2

from hueshift.client.errors import ErrorFacts, Unavailable

_PATH = "/grpc.health.v1.Health/Check"
_CHECK_SECONDS = 5.0


def check_ready(channel: grpc.Channel, service: str, metadata: tuple[tuple[str, str], ...], left: float | None) -> str:
    """Return "" if the server serves `service`, else why not, for people."""
    check = channel.unary_unary(
        _PATH, health_pb2.HealthCheckRequest.SerializeToString, health_pb2.HealthCheckResponse.FromString
    )
    try:
        answer = check(check_request(service), timeout=check_seconds(left), metadata=metadata)
    except grpc.RpcError as error:
        return read_failure(error)
    return read_answer(answer)


async def check_ready_async(
    channel: grpc.aio.Channel, service: str, metadata: tuple[tuple[str, str], ...], left: float | None
) -> str:
    """As `check_ready`, on an asyncio channel."""
    check = channel.unary_unary(
        _PATH, health_pb2.HealthCheckRequest.SerializeToString, health_pb2.HealthCheckResponse.FromString
    )
    try:
        answer = await check(check_request(service), timeout=check_seconds(left), metadata=metadata)
    except grpc.RpcError as error:
        return read_failure(error)
    return read_answer(answer)


def check_request(service: str) -> health_pb2.HealthCheckRequest:
    """Return the request."""
    return health_pb2.HealthCheckRequest(service=service)


def check_seconds(left: float | None) -> float:
    """Return the time one check gets: a short one, so that a hung server does not use up the whole wait."""
    return _CHECK_SECONDS if left is None else min(_CHECK_SECONDS, left)


def read_answer(answer: health_pb2.HealthCheckResponse) -> str:
    """Return "" for SERVING, else the state's name."""
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"it answers {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


def read_failure(error: grpc.RpcError) -> str:
    """Return why a check failed, for people."""
    return f"{error.code().name}: {error.details() or 'no details'}"


def not_ready(seconds: float, last: str) -> Unavailable:
    """Build the error of a server that did not become ready."""
    cause = f"; last: {last}" if last else ""
    return Unavailable(ErrorFacts(grpc.StatusCode.UNAVAILABLE, f"the server was not ready after {seconds:g} s{cause}"))
