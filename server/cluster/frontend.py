"""A server without an engine: it checks who calls, then passes the call on to a replica, message by message.

Nothing is parsed on the way but the adapters of a Generate and a WarmAdapter call, which choose the replica. Deadline,
cancellation, request id, credential, errors with their details and the order of messages pass through unchanged. A
replica that does not answer is passed by, and the call is tried once more elsewhere if nothing of an answer was seen
and the call may be repeated.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from hueshift.adapters.errors import Reason, Unavailable
from hueshift.server.clock import Clock
from hueshift.server.cluster.affinity import affinity_key
from hueshift.server.cluster.pool import Replica, ReplicaPool
from hueshift.server.rpc.call import current_call
from hueshift.server.rpc.handlers import ServiceTable
from hueshift.server.rpc.status import DETAILS_KEY
from hueshift.v1 import adapters_pb2, generation_pb2

_LOG = structlog.get_logger()
Context = grpc.aio.ServicerContext[Any, Any]
GENERATE = "hueshift.v1.GenerationService/Generate"
WARM = "hueshift.v1.AdapterService/WarmAdapter"
# They change nothing, or say the same when said twice. The others may have been done by the replica that fell silent;
# their callers repeat them with their idempotency key.
_REPEATABLE = ("Generate", "Get", "List", "Watch", "Export", "Warm")
_TRIES = 2


@dataclass(frozen=True, slots=True)
class Route:
    """Where a call should go: the affinity key ("" goes anywhere) and the pictures it draws."""

    key: str
    cost: int


def route(method: str, request: bytes | None, tenant: str) -> Route:
    """Read what chooses the replica. What cannot be parsed is left for the replica to refuse."""
    with suppress(DecodeError):
        if method == GENERATE and request is not None:
            wanted = generation_pb2.GenerateRequest.FromString(request)
            return Route(affinity_key(tenant, [use.adapter for use in wanted.adapters]), max(1, wanted.count))
        if method == WARM and request is not None:
            return Route(affinity_key(tenant, [adapters_pb2.WarmAdapterRequest.FromString(request).name]), 0)
    return Route("", 0)


class FrontEnd:
    """The services of a front end (`hueshift.server.frame.Services`). `files` are the contract's descriptors."""

    def __init__(self, pool: ReplicaPool, files: Iterable[Any], clock: Clock, routed: Any) -> None:
        self._pool = pool
        self._files = tuple(files)
        self._clock = clock
        self._routed = routed
        self._refreshing: asyncio.Task[None] | None = None

    def register(self, table: ServiceTable) -> None:
        """Add a handler for every method of the contract."""
        for service in (service for file in self._files for service in file.services_by_name.values()):
            handlers = {
                method.name: self._handler(f"{service.full_name}/{method.name}", method) for method in service.methods
            }
            table.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))

    async def start(self) -> None:
        """Find the replicas and keep track of them."""
        await self._pool.refresh()
        self._refreshing = asyncio.create_task(self._pool.keep_fresh(), name="replicas")

    async def stop_workers(self, grace: float) -> None:
        """Do nothing: a front end has no workers."""

    async def close(self) -> None:
        """Close the channels."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        await self._pool.close()

    def _handler(self, method: str, described: Any) -> "grpc.RpcMethodHandler[Any, Any]":
        if described.client_streaming:

            async def upload(request: AsyncIterator[bytes], context: Context) -> bytes:
                return await self._upload(method, request, context)

            return grpc.stream_unary_rpc_method_handler(upload)
        if described.server_streaming:

            async def stream(request: bytes, context: Context) -> AsyncIterator[bytes]:
                async with aclosing(self._answers(method, request, True, context)) as answers:
                    async for answer in answers:
                        yield answer

            return grpc.unary_stream_rpc_method_handler(stream)

        async def unary(request: bytes, context: Context) -> bytes:
            async with aclosing(self._answers(method, request, False, context)) as answers:
                return await anext(answers)

        return grpc.unary_unary_rpc_method_handler(unary)

    async def _answers(
        self, method: str, request: bytes, streams: bool, context: Context
    ) -> AsyncGenerator[bytes, None]:
        """Yield the answers of the first replica that gives any."""
        chosen = route(method, request, current_call().tenant)
        tried: list[Replica] = []
        while True:
            replica = self._pick(chosen, tried)
            seen = False
            try:
                with replica.carrying(chosen.cost):
                    async for answer in _call(replica, method, request, streams, self._remaining()):
                        seen = True
                        yield answer
                return
            except grpc.aio.AioRpcError as error:
                again = not seen and len(tried) < _TRIES and method.rpartition("/")[2].startswith(_REPEATABLE)
                await self._failed(replica, error, context, again)

    async def _upload(self, method: str, requests: AsyncIterator[bytes], context: Context) -> bytes:
        replica = self._pick(Route("", 0), [])
        call: Any = _method(replica, method, "stream_unary")(timeout=self._remaining(), metadata=_metadata())
        with replica.watching(call):
            try:
                with suppress(asyncio.InvalidStateError):
                    # A replica that has refused already takes no more; its answer is read below.
                    async for message in requests:
                        await call.write(message)
                    await call.done_writing()
                answer: bytes = await call
                return answer
            except grpc.aio.AioRpcError as error:
                await self._failed(replica, error, context, again=False)
            except asyncio.CancelledError:
                _raise_if_lost(replica)
                raise
        raise _lost()

    def _pick(self, chosen: Route, tried: list[Replica]) -> Replica:
        key = chosen.key or current_call().request_id
        replica = self._pool.pick(key, chosen.cost, tried)
        if tried:
            outcome = "retried"
        elif not chosen.key:
            outcome = "any"
        else:
            outcome = "affine" if replica is self._pool.affine(key) else "spread"
        self._routed.labels(outcome).inc()
        tried.append(replica)
        return replica

    async def _failed(self, replica: Replica, error: grpc.aio.AioRpcError, context: Context, again: bool) -> None:
        """Return if the call may be tried elsewhere; else end it as the replica did."""
        trailers = error.trailing_metadata() or ()
        explained = any(key == DETAILS_KEY for key, _ in trailers)
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            self._pool.suspect(replica)
            _LOG.warning("replica.unavailable", replica=replica.record.replica_id, again=again, told=explained)
            if again:
                return
            if not explained:
                # gRPC's own words for a broken connection; ours carry a reason.
                self._routed.labels("lost").inc()
                raise _lost() from error
        kept: list[tuple[str, str | bytes]] = [(key, value) for key, value in trailers if key == DETAILS_KEY]
        kept.append(("x-request-id", current_call().request_id))
        await context.abort(error.code(), error.details() or "", tuple(kept))

    def _remaining(self) -> float | None:
        deadline = current_call().deadline
        return None if deadline is None else max(0.001, deadline - self._clock.monotonic())


async def _call(
    replica: Replica, method: str, request: bytes, streams: bool, seconds: float | None
) -> AsyncGenerator[bytes, None]:
    make = _method(replica, method, "unary_stream" if streams else "unary_unary")
    call: Any = make(request, timeout=seconds, metadata=_metadata())
    with replica.watching(call):
        try:
            if streams:
                async for answer in call:
                    yield answer
            else:
                yield await call
        except asyncio.CancelledError:
            _raise_if_lost(replica)
            raise


def _raise_if_lost(replica: Replica) -> None:
    """Tell the cut of a lost replica's call from our own caller's leaving."""
    task = asyncio.current_task()
    if replica.lost and not (task is not None and task.cancelling()):
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "the replica went silent"
        ) from None


def _method(replica: Replica, method: str, kind: str) -> Any:
    return getattr(replica.channel, kind)(f"/{method}")


def _metadata() -> tuple[tuple[str, str], ...]:
    call = current_call()
    credential = (("authorization", call.credential),) if call.credential else ()
    return (("x-request-id", call.request_id), *credential)


def _lost() -> Unavailable:
    return Unavailable(
        Reason.NO_REPLICA, "the replica was lost before it had answered in full; try again", retry_after=1.0
    )
