"""The gate: no more calls inside than the server takes; health is never refused."""

import asyncio
from typing import Any, cast

import grpc
import pytest

from hueshift.adapters.errors import Reason, ResourceExhausted
from hueshift.server.rpc.call import CURRENT_CALL, CallInfo
from hueshift.server.rpc.gate import Gate
from hueshift.server.rpc.handlers import Call
from hueshift.server.rpc.status import grpc_code, is_retryable

CALL = Call("hueshift.v1.ModelService/GetModel", False, False, (), cast(Any, None))
WATCHING = Call("hueshift.v1.FineTuneService/WatchFineTune", False, True, (), cast(Any, None))
HEALTH = Call("grpc.health.v1.Health/Check", False, False, (), cast(Any, None))


async def test_no_more_calls_are_inside_than_the_server_takes() -> None:
    gate, release = Gate((), most=2), asyncio.Event()
    gate.open()

    async def wait(_request: Any) -> str:
        await release.wait()
        return "done"

    async def answer(request: Any) -> Any:
        return request

    inside = [asyncio.create_task(gate.run(CALL, None, wait)) for _ in range(2)]
    await asyncio.sleep(0)
    assert gate.inside == 2
    with pytest.raises(ResourceExhausted, match=r"server\.max_calls") as refused:
        await gate.run(CALL, None, answer)
    assert (refused.value.reason, grpc_code(refused.value)) == (
        Reason.TOO_MANY_CALLS,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
    assert is_retryable(Reason.TOO_MANY_CALLS)
    assert refused.value.retry_after
    assert await gate.run(HEALTH, "healthy", answer) == "healthy"
    release.set()
    assert await asyncio.gather(*inside) == ["done", "done"]
    # A place that became free is there for the next.
    assert await gate.run(CALL, "passed", answer) == "passed"


async def test_without_a_limit_all_pass() -> None:
    gate, release = Gate(()), asyncio.Event()
    gate.open()

    async def wait(_request: Any) -> None:
        await release.wait()

    inside = [asyncio.create_task(gate.run(CALL, None, wait)) for _ in range(50)]
    await asyncio.sleep(0)
    assert gate.inside == 50
    release.set()
    await asyncio.gather(*inside)


async def test_a_stream_has_its_place_until_it_ends_however_that_is() -> None:
    gate = Gate((), most=1)
    gate.open()

    async def stream(_request: Any) -> None:
        await asyncio.Event().wait()

    async def broken(_request: Any) -> None:
        raise ValueError("no answer today")

    streaming = asyncio.create_task(gate.run(WATCHING, None, stream))
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted):
        await gate.run(CALL, None, stream)
    streaming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await streaming
    for _ in range(2):
        with pytest.raises(ValueError, match="today"):
            await gate.run(WATCHING, None, broken)
    assert gate.inside == 0


async def test_one_tenant_cannot_take_every_place() -> None:
    gate, release = Gate((), most=4, each=2), asyncio.Event()
    gate.open()

    async def wait(_request: Any) -> None:
        await release.wait()

    async def call(tenant: str) -> None:
        CURRENT_CALL.set(CallInfo(WATCHING.method, "request", tenant, None))
        await gate.run(WATCHING, None, wait)

    greedy = [asyncio.create_task(call("a")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match=r"server\.tenant_calls") as refused:
        await asyncio.create_task(call("a"))
    assert (refused.value.reason, refused.value.metadata["quota"]) == (Reason.TENANT_QUOTA, "tenant_calls")
    other = asyncio.create_task(call("b"))
    await asyncio.sleep(0)
    assert gate.inside == 3
    greedy[0].cancel()
    await asyncio.gather(greedy[0], return_exceptions=True)
    # A place that became free is there for the same tenant too.
    again = asyncio.create_task(call("a"))
    await asyncio.sleep(0)
    assert gate.inside == 3
    release.set()
    await asyncio.gather(greedy[1], other, again)
    assert not gate._of
