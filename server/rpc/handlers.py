"""What interceptors stand on: every kind of RPC seen as one coroutine, and a table of services that fills up later.

grpc.aio runs a streaming handler as an async generator and drops it when the call ends early, so its `finally` blocks
run at some later time in some other task. Here the generator is driven by a coroutine that closes it at once: a
cancelled call frees its place in the batch immediately, and context variables set for the call hold throughout.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from hueshift.adapters.errors import Reason, Unimplemented
from hueshift.server.rpc.crowding import Shape, counted, shape_of

Context = grpc.aio.ServicerContext[Any, Any]
Proceed = Callable[[Any], Awaitable[Any]]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]


@dataclass(frozen=True, slots=True)
class Call:
    """One call as interceptors see it. `method` is `package.Service/Method`, without a leading slash."""

    method: str
    request_streaming: bool
    response_streaming: bool
    metadata: tuple[tuple[str, str | bytes], ...]
    context: Context

    @property
    def is_ours(self) -> bool:
        """False for health and reflection, which need no credential, deadline or gate."""
        return not self.method.startswith(("grpc.health.", "grpc.reflection."))

    def metadata_values(self, key: str) -> list[str]:
        """Return the text values of a metadata key, in order."""
        return [value for name, value in self.metadata if name == key and isinstance(value, str)]


class Interceptor(grpc.aio.ServerInterceptor, ABC):
    """An interceptor as one coroutine around the call, whatever the kind of RPC.

    `run` receives the request (a message, or an async iterator of them) and calls `proceed(request)` to go on inwards.
    It returns the response message, or None for streams, which are written as they come.
    """

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap the handler that the inner interceptors return."""
        handler = await continuation(handler_call_details)
        return None if handler is None else _wrap(handler, handler_call_details, self.run)

    @abstractmethod
    async def run(self, call: Call, request: Any, proceed: Proceed) -> Any:
        """Handle one call."""


class ServiceTable(grpc.GenericRpcHandler):
    """All services of the server. The port opens while it is empty; services are added once they are warm.

    It stands in for `grpc.aio.Server` in the generated `add_...Servicer_to_server` functions. `files` are the
    descriptors of the contract's files (protobuf has several types for them).
    """

    def __init__(self, files: Iterable[Any]) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []
        known: dict[str, Shape] = {}
        self._shapes = {
            f"{service.full_name}/{method.name}": shape_of(method.input_type, known)
            for file in files
            for service in file.services_by_name.values()
            for method in service.methods
        }
        self._unknown: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(_refuse_unknown)

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Add services. Called by generated code."""
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, object]) -> None:
        """Do nothing: the generic handlers of the same methods were added. Called by generated code."""

    def label(self, method: str) -> str:
        """Return the metric label of a method: itself if the contract has it, else `unknown`."""
        return method if method in self._shapes else "unknown"

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        """Find the handler of a call; an unknown method gets one that refuses, so that interceptors see it too."""
        for handler in self._handlers:
            found = handler.service(handler_call_details)
            if found is not None:
                shape = self._shapes.get(handler_call_details.method.removeprefix("/"))
                return found if shape is None else _count(found, shape)
        return self._unknown


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Stands for a request that could not be parsed."""

    error: DecodeError


async def _refuse_unknown(_request: Any, context: Context) -> None:
    raise Unimplemented(Reason.METHOD_NOT_FOUND, "the server has no such method; server reflection lists those it has")


def _wrap(
    handler: "grpc.RpcMethodHandler[Any, Any]",
    details: grpc.HandlerCallDetails,
    run: Callable[[Call, Any, Proceed], Awaitable[Any]],
) -> "grpc.RpcMethodHandler[Any, Any]":
    inner = _as_coroutine(handler)
    method = details.method.removeprefix("/")
    metadata = tuple(details.invocation_metadata or ())

    async def behavior(request: Any, context: Context) -> Any:
        call = Call(method, handler.request_streaming, handler.response_streaming, metadata, context)

        async def proceed(passed: Any) -> Any:
            # grpc parses a unary request before the handler runs, where no interceptor could map the failure.
            if isinstance(passed, _Malformed):
                raise passed.error
            return await inner(passed, context)

        return await run(call, request, proceed)

    deserializer = handler.request_deserializer
    if deserializer is not None and not handler.request_streaming:
        deserializer = _tolerant(deserializer)
    return _rebuild(handler, behavior, deserializer)


def _count(handler: "grpc.RpcMethodHandler[Any, Any]", shape: Shape) -> "grpc.RpcMethodHandler[Any, Any]":
    return _rebuild(handler, _behavior(handler), counted(handler.request_deserializer, shape))


def _rebuild(
    handler: "grpc.RpcMethodHandler[Any, Any]",
    behavior: Callable[..., Any],
    deserializer: Callable[[bytes], Any] | None,
) -> "grpc.RpcMethodHandler[Any, Any]":
    make: Callable[..., Any] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    rebuilt: grpc.RpcMethodHandler[Any, Any] = make(behavior, deserializer, handler.response_serializer)
    return rebuilt


def _behavior(handler: "grpc.RpcMethodHandler[Any, Any]") -> Any:
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def _as_coroutine(handler: "grpc.RpcMethodHandler[Any, Any]") -> Callable[[Any, Context], Awaitable[Any]]:
    inner = _behavior(handler)
    if inspect.iscoroutinefunction(inner):
        coroutine: Callable[[Any, Context], Awaitable[Any]] = inner
        return coroutine
    if not inspect.isasyncgenfunction(inner):
        # What generated code puts where a service leaves a method of the contract out.
        return _refuse_unknown

    async def drive(request: Any, context: Context) -> None:
        async with aclosing(inner(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return drive


def _tolerant(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError as error:
            return _Malformed(error)

    return parse
