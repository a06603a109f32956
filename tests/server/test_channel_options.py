"""gRPC ignores an option whose name it does not know; each of ours must be in its library, and do what it is for."""

import asyncio
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc

from hueshift.client.connection import Connection
from hueshift.server.frame import _channel_options
from hueshift.server.settings import ServerSettings


def test_grpc_knows_every_channel_option() -> None:
    spec = find_spec("grpc._cython.cygrpc")
    assert spec is not None
    assert spec.origin is not None
    library = Path(spec.origin).read_bytes()
    names = {name for name, _ in _channel_options(ServerSettings(max_connection_age_seconds=60))}
    names |= {name for name, _ in Connection("127.0.0.1:1")._options()}
    assert "grpc.max_connection_age_ms" in names
    assert "grpc.keepalive_permit_without_calls" in names
    assert [name for name in sorted(names) if name.encode() not in library] == []


async def test_a_caller_that_is_gone_without_a_word_is_noticed() -> None:
    ended, gone = asyncio.Event(), asyncio.Event()

    async def watch(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"begun"
            await asyncio.Event().wait()
        finally:
            ended.set()

    # Seconds in place of minutes.
    long = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    server = grpc.aio.server(
        options=[(name, 1000 if name in long else value) for name, value in _channel_options(ServerSettings())]
    )
    handlers: dict[str, Any] = {"Watch": grpc.unary_stream_rpc_method_handler(watch)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            if gone.is_set():
                # The network takes everything and brings nothing.
                continue
            target.write(data)
            await target.drain()

    ends: list[asyncio.StreamWriter] = []
    connections: list[asyncio.Task[None]] = []

    async def connect(near: asyncio.StreamReader, near_end: asyncio.StreamWriter) -> None:
        far, far_end = await asyncio.open_connection("127.0.0.1", port)
        ends.extend((near_end, far_end))
        task = asyncio.current_task()
        assert task is not None
        connections.append(task)
        await asyncio.gather(carry(near, far_end), carry(far, near_end), return_exceptions=True)

    network = await asyncio.start_server(connect, "127.0.0.1", 0)
    address = f"127.0.0.1:{network.sockets[0].getsockname()[1]}"
    async with grpc.aio.insecure_channel(address) as channel:
        method: Any = channel.unary_stream("/test.Test/Watch")
        call = method(b"")
        assert await call.read() == b"begun"
        gone.set()
        await asyncio.wait_for(ended.wait(), 20)
        call.cancel()
    await server.stop(0)
    network.close()
    for end in ends:
        end.close()
    await asyncio.gather(*connections, *(end.wait_closed() for end in ends), return_exceptions=True)
