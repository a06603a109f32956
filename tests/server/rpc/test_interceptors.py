"""The interceptors around all four kinds of RPC, on a real grpc.aio server with toy methods."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from prometheus_client import CollectorRegistry

from hueshift.adapters.errors import NotFound, Reason
from hueshift.server.auth import Authenticator
from hueshift.server.clock import SystemClock
from hueshift.server.metrics import Metrics
from hueshift.server.rpc.call import CallInfo, current_call
from hueshift.server.rpc.gate import Gate
from hueshift.server.rpc.handlers import ServiceTable
from hueshift.server.rpc.interceptors import GENERATE, REQUEST_ID_KEY, WATCH, make_interceptors
from hueshift.server.settings import ServerSettings
from hueshift.v1 import finetune_pb2, generation_pb2, model_pb2

UNARY = "hueshift.v1.ModelService/GetModel"
UPLOAD = "hueshift.v1.FineTuneService/CreateFineTune"
CHAT = "hueshift.v1.Toy/Chat"
KINDS = (UNARY, GENERATE, UPLOAD, CHAT)
Behavior = Callable[[str], AsyncIterator[str]]


class OneKey:
    """A store with one key."""

    def verify(self, secret: str) -> str | None:
        return "acme" if secret == "hs_a" else None

    def any(self) -> bool:
        return True


@dataclass
class Toy:
    """A server whose methods all run `behavior`, and what was seen of the calls."""

    target: str
    channel: grpc.aio.Channel
    gate: Gate
    metrics: Metrics
    calls: list[CallInfo] = field(default_factory=list)
    behavior: Behavior | None = None

    async def call(
        self, method: str, request: bytes = b"", *, key: str | None = "hs_a", seconds: float | None = 10, **more: str
    ) -> tuple[list[str], dict[str, Any]]:
        """Call a method of any kind; return the answers and the trailers."""
        metadata = [(name.replace("_", "-"), value) for name, value in more.items()]
        if key is not None:
            metadata.append(("authorization", f"Bearer {key}"))
        if method not in (UNARY, GENERATE, WATCH):
            return await asyncio.to_thread(self._call_streaming, method, request, tuple(metadata), seconds)
        multi: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self.channel.unary_stream(f"/{method}")
        call = multi(request, timeout=seconds, metadata=tuple(metadata))
        answers = [StringValue.FromString(answer).value async for answer in call]
        return answers, dict(await call.trailing_metadata())

    def _call_streaming(
        self, method: str, request: bytes, metadata: tuple[tuple[str, str], ...], seconds: float | None
    ) -> tuple[list[str], dict[str, Any]]:
        # With the blocking client: when a server ends a call before it was sent a message, grpc.aio's client may tell
        # of an INTERNAL failure to write instead of the server's status.
        with grpc.insecure_channel(self.target) as channel:
            multi: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{method}")
            call = multi(iter([request]), timeout=seconds, metadata=metadata)
            answers = [StringValue.FromString(answer).value for answer in call]
            return answers, dict(call.trailing_metadata())


@asynccontextmanager
async def toy_server(behavior: Behavior, **settings: float) -> AsyncIterator[Toy]:
    metrics, gate, clock = Metrics(CollectorRegistry()), Gate({WATCH}), SystemClock()
    table = ServiceTable([generation_pb2.DESCRIPTOR, finetune_pb2.DESCRIPTOR, model_pb2.DESCRIPTOR])
    calls: list[CallInfo] = []

    async def unary(request: StringValue, _context: object) -> StringValue:
        calls.append(current_call())
        return StringValue(value="".join([part async for part in behavior(request.value)]))

    async def stream(request: StringValue, _context: object) -> AsyncIterator[StringValue]:
        calls.append(current_call())
        async for part in behavior(request.value):
            yield StringValue(value=part)

    async def upload(requests: AsyncIterator[StringValue], _context: object) -> StringValue:
        calls.append(current_call())
        text = "".join([request.value async for request in requests])
        return StringValue(value="".join([part async for part in behavior(text)]))

    async def chat(requests: AsyncIterator[StringValue], _context: object) -> AsyncIterator[StringValue]:
        calls.append(current_call())
        async for request in requests:
            async for part in behavior(request.value):
                yield StringValue(value=part)

    codec: Any = (StringValue.FromString, StringValue.SerializeToString)
    make: dict[str, Any] = {
        UNARY: grpc.unary_unary_rpc_method_handler(unary, *codec),
        GENERATE: grpc.unary_stream_rpc_method_handler(stream, *codec),
        WATCH: grpc.unary_stream_rpc_method_handler(stream, *codec),
        UPLOAD: grpc.stream_unary_rpc_method_handler(upload, *codec),
        CHAT: grpc.stream_stream_rpc_method_handler(chat, *codec),
    }
    for method, handler in make.items():
        service, _, name = method.partition("/")
        table.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {name: handler})])
    interceptors = make_interceptors(
        settings=ServerSettings(**settings),
        metrics=metrics,
        authenticator=Authenticator(OneKey(), clock, default_tenant="local", required=False),
        gate=gate,
        clock=clock,
        label=table.label,
    )
    server = grpc.aio.server(handlers=[table], interceptors=interceptors)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gate.open()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Toy(f"127.0.0.1:{port}", channel, gate, metrics, calls)
    await server.stop(None)


def trailers_of(error: Any) -> dict[str, Any]:
    """Return the trailers of a failed call."""
    return dict(error.trailing_metadata())


def error_info(error: grpc.RpcError) -> tuple[ErrorInfo, Status]:
    """Return the ErrorInfo and the whole status of a failed call."""
    status = Status.FromString(trailers_of(error)["grpc-status-details-bin"])
    info = ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return info, status


async def until(condition: Callable[[], bool]) -> None:
    """Wait up to five seconds for a condition."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("the condition did not come true within 5 s")


async def echo(text: str) -> AsyncIterator[str]:
    yield text
    yield "!"


@pytest.mark.parametrize("method", KINDS)
async def test_a_call_passes_with_id_tenant_and_metrics(method: str) -> None:
    async with toy_server(echo) as toy:
        answers, trailers = await toy.call(method, StringValue(value="a").SerializeToString(), x_request_id="my-id-123")
    assert "".join(answers) == "a!"
    assert trailers[REQUEST_ID_KEY] == "my-id-123"
    assert (toy.calls[0].tenant, toy.calls[0].request_id) == ("acme", "my-id-123")
    label = "unknown" if method == CHAT else method
    sample = toy.metrics.registry.get_sample_value
    assert sample("hueshift_requests_total", {"method": label, "code": "OK"}) == 1
    assert sample("hueshift_requests_in_flight", {"method": label}) == 0
    assert sample("hueshift_request_seconds_count", {"method": label}) == 1


@pytest.mark.parametrize("method", KINDS)
async def test_errors_carry_details_and_the_request_id(method: str) -> None:
    async def fail(text: str) -> AsyncIterator[str]:
        if text == "":
            raise NotFound(Reason.ADAPTER_NOT_FOUND, "there is no adapter 'x'")
        yield text

    async with toy_server(fail) as toy:
        with pytest.raises(grpc.RpcError) as caught:
            await toy.call(method)
    info, status = error_info(caught.value)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert info.reason == "ADAPTER_NOT_FOUND"
    assert status.message == caught.value.details() == "there is no adapter 'x'"
    assert len(trailers_of(caught.value)[REQUEST_ID_KEY]) == 16


@pytest.mark.parametrize("method", KINDS)
async def test_an_unknown_exception_is_internal_without_its_text(method: str) -> None:
    async def fail(_text: str) -> AsyncIterator[str]:
        yield "first"
        raise RuntimeError("swordfish")

    async with toy_server(fail) as toy:
        with pytest.raises(grpc.RpcError) as caught:
            await toy.call(method)
    info, status = error_info(caught.value)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert info.metadata["incident"] in (caught.value.details() or "")
    assert "swordfish" not in f"{caught.value.details()}{status}"
    assert toy.metrics.registry.get_sample_value("hueshift_internal_errors_total") == 1


@pytest.mark.parametrize("method", KINDS)
async def test_malformed_protobuf_is_invalid_argument(method: str) -> None:
    async with toy_server(echo) as toy:
        with pytest.raises(grpc.RpcError) as caught:
            await toy.call(method, b"\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(caught.value)[0].reason == "MESSAGE_MALFORMED"


@pytest.mark.parametrize(("key", "reason"), [(None, "CREDENTIAL_MISSING"), ("hs_b", "CREDENTIAL_INVALID")])
@pytest.mark.parametrize("method", [*KINDS, "no.such.Service/Method"])
async def test_strangers_are_refused_everywhere(method: str, key: str | None, reason: str) -> None:
    async with toy_server(echo) as toy:
        with pytest.raises(grpc.RpcError) as caught:
            await toy.call(method, key=key)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert error_info(caught.value)[0].reason == reason


async def test_unknown_methods_and_insane_request_ids() -> None:
    async with toy_server(echo) as toy:
        with pytest.raises(grpc.RpcError) as caught:
            await toy.call("no.such.Service/Method", x_request_id="x" * 100)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert error_info(caught.value)[0].reason == "METHOD_NOT_FOUND"
    assert len(trailers_of(caught.value)[REQUEST_ID_KEY]) == 16
    count = toy.metrics.registry.get_sample_value
    assert count("hueshift_requests_total", {"method": "unknown", "code": "UNIMPLEMENTED"}) == 1


async def test_default_and_maximum_deadlines() -> None:
    async def sleep(_text: str) -> AsyncIterator[str]:
        await asyncio.sleep(30)
        yield "late"

    async with toy_server(sleep, default_deadline_seconds=0.1, max_deadline_seconds=0.2) as toy:
        for method, timeout in ((UNARY, None), (GENERATE, None), (GENERATE, 25.0)):
            with pytest.raises(grpc.RpcError) as caught:
                await toy.call(method, seconds=timeout)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert error_info(caught.value)[0].reason == "DEADLINE_PASSED"
    async with toy_server(sleep) as toy:
        with pytest.raises(grpc.RpcError):
            await toy.call(UNARY, seconds=0.1)
        await asyncio.sleep(0.2)
        count = toy.metrics.registry.get_sample_value
        assert count("hueshift_requests_total", {"method": UNARY, "code": "DEADLINE_EXCEEDED"}) == 1


async def test_watch_and_uploads_have_no_deadline_of_ours_but_silence_ends_an_upload() -> None:
    async def slow(_text: str) -> AsyncIterator[str]:
        await asyncio.sleep(0.3)
        yield "done"

    async def silence() -> AsyncIterator[bytes]:
        yield b""
        await asyncio.sleep(30)

    async with toy_server(slow, default_deadline_seconds=0.1, max_deadline_seconds=0.1, upload_idle_seconds=0.4) as toy:
        assert (await toy.call(WATCH, seconds=None))[0] == ["done"]
        assert (await toy.call(UPLOAD, seconds=None))[0] == ["done"]
        assert [call.deadline for call in toy.calls] == [None, None]
        upload: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = toy.channel.stream_unary(f"/{UPLOAD}")
        with pytest.raises(grpc.RpcError) as caught:
            await upload(silence(), metadata=(("authorization", "Bearer hs_a"),))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "sent nothing" in (caught.value.details() or "")


@pytest.mark.parametrize("method", [GENERATE, UNARY])
async def test_a_cancelled_call_closes_its_generator_at_once(method: str) -> None:
    started, closed = asyncio.Event(), asyncio.Event()

    async def forever(_text: str) -> AsyncIterator[str]:
        try:
            started.set()
            while True:
                await asyncio.sleep(0.01)
                yield "tick"
        finally:
            closed.set()

    async with toy_server(forever) as toy:
        task = asyncio.create_task(toy.call(method))
        await started.wait()
        task.cancel()
        await asyncio.wait_for(closed.wait(), 2)
        await asyncio.sleep(0.05)
        count = toy.metrics.registry.get_sample_value
        assert count("hueshift_requests_total", {"method": method, "code": "CANCELLED"}) == 1
        assert count("hueshift_internal_errors_total") == 0
        assert toy.gate.inside == 0


async def test_drain_ends_watches_at_once_and_lets_the_others_finish() -> None:
    release = asyncio.Event()

    async def wait(_text: str) -> AsyncIterator[str]:
        yield "began"
        await release.wait()
        yield "done"

    async with toy_server(wait) as toy:
        generate = asyncio.create_task(toy.call(GENERATE))
        watch = asyncio.create_task(toy.call(WATCH))
        await until(lambda: toy.gate.inside == 2)
        drain = asyncio.create_task(toy.gate.drain(20))
        with pytest.raises(grpc.RpcError) as watched:
            await watch
        with pytest.raises(grpc.RpcError) as refused:
            await toy.call(UNARY)
        release.set()
        assert (await generate)[0] == ["began", "done"]
        assert await drain == 0
    for error in (watched.value, refused.value):
        info, status = error_info(error)
        retry = RetryInfo()
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert (info.reason, info.metadata["retryable"]) == ("DRAINING", "true")
        assert any(detail.Unpack(retry) for detail in status.details)
        assert retry.retry_delay.seconds == 1


async def test_drain_cuts_off_what_does_not_finish() -> None:
    async def forever(_text: str) -> AsyncIterator[str]:
        await asyncio.sleep(60)
        yield ""

    async with toy_server(forever) as toy:
        task = asyncio.create_task(toy.call(GENERATE))
        await until(lambda: toy.gate.inside == 1)
        assert await toy.gate.drain(0.1) == 1
        with pytest.raises(grpc.RpcError) as caught:
            await task
    assert error_info(caught.value)[0].reason == "DRAINING"


async def test_nothing_passes_before_warm_up_has_ended() -> None:
    async with toy_server(echo) as toy:
        toy.gate.state = type(toy.gate.state).WARMING
        with pytest.raises(grpc.RpcError) as caught:
            await toy.call(UNARY)
        assert error_info(caught.value)[0].reason == "WARMING_UP"
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


_REFUSED_CLIENT = """
import asyncio, sys
import grpc

async def chunks():
    for _ in range(20):
        yield b"x" * 50_000

async def main(target):
    codes = set()
    async with grpc.aio.insecure_channel(target) as channel:
        upload = channel.stream_stream("/hueshift.v1.Toy/Chat")
        for _ in range(100):
            try:
                async for _ in upload(chunks(), metadata=(("authorization", "Bearer wrong"),)):
                    pass
            except grpc.aio.AioRpcError as error:
                codes.add(error.code().name)
    print(sorted(codes))

asyncio.run(main(sys.argv[1]))
"""


async def test_refused_callers_that_still_send_learn_why() -> None:
    """In another process, or the two loops take turns: without the listening one refusal in five becomes INTERNAL."""
    async with toy_server(echo) as toy:
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-c", _REFUSED_CLIENT, toy.target, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await asyncio.wait_for(client.communicate(), 60)
    assert out.decode().strip() == "['UNAUTHENTICATED']"
