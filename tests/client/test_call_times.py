"""How long calls may take: the caller's choice, of either client."""

from typing import Any

import pytest
from fake_service import FakeServer, png

from hueshift.client.aio import AsyncClient
from hueshift.client.calls import CallTimes
from hueshift.client.sync import Client


@pytest.mark.parametrize(
    ("given", "unary", "files"),
    [({}, 30, 600), ({"timeout": 7.0, "file_timeout": 90.0}, 7, 90), ({"timeout": 9}, 9, 600)],
)
async def test_calls_have_the_time_that_the_client_was_given(
    fake: FakeServer, given: dict[str, Any], unary: float, files: float
) -> None:
    with Client(fake.address, **given) as client:
        list(client.list_jobs())
        client.fine_tune([png()])
        client.import_adapter(b"file", adapter_id="fox")
        client.export_adapter("fox")
    async with AsyncClient(fake.address, **given) as other:
        assert [job async for job in other.list_jobs()]
        await other.fine_tune([png()])
        await other.import_adapter(b"file", adapter_id="fox")
        await other.export_adapter("fox")
    # gRPC rounds up on the wire, to a second for long times.
    assert fake.service.times == pytest.approx(2 * [unary, *[files] * 3], abs=2)


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_times_that_are_none_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"^timeout"):
        Client(timeout=seconds)
    with pytest.raises(ValueError, match=r"^file_timeout"):
        CallTimes(files=seconds)
