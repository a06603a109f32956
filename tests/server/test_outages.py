"""An outage: pauses that grow, few words in the log, a metric, and all as before when it is over."""

import asyncio

import pytest
from fake_clock import FakeClock
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from hueshift.server.metrics import Metrics
from hueshift.server.outages import Outage
from hueshift.server.rounds import keep_doing, try_once


def sample(metrics: Metrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(f"hueshift_background_{name}", {"task": "jobs"})


def test_the_log_hears_of_an_outage_once_a_minute() -> None:
    clock, metrics = FakeClock(), Metrics(CollectorRegistry())
    outage = Outage("jobs", clock=clock, observer=metrics)
    with capture_logs() as logs:
        for _ in range(151):
            outage.failed(OSError("no route"))
            clock.advance(1)
        assert (sample(metrics, "failures_total"), sample(metrics, "failing")) == (151, 1)
        outage.worked()
        outage.worked()
    first, second, third, last = logs
    assert isinstance(first["exc_info"], OSError)
    assert first["event"] == "background.failed"
    short = {"task": "jobs", "log_level": "warning"}
    assert second == {
        "event": "background.still_failing",
        "failures": 61,
        "seconds": 60.0,
        "error": "OSError",
        **short,
    }
    assert (third["failures"], third["seconds"], "exc_info" in third) == (121, 120.0, False)
    assert last == {"event": "background.recovered", "failures": 151, "seconds": 151.0, **short}
    assert sample(metrics, "failing") == 0
    with capture_logs() as logs:
        outage.failed(OSError("again"))
    # The next outage is told from its beginning.
    assert "exc_info" in logs[0]


@pytest.mark.parametrize(("drawn", "share"), [(0.0, 0.5), (1.0, 1.0)])
def test_pauses_grow_to_the_longest_and_differ_by_chance(drawn: float, share: float) -> None:
    outage = Outage("jobs", clock=FakeClock(), longest=10.0, draw=lambda: drawn)
    pauses = []
    for _ in range(6):
        pauses.append(outage.pause(1.0))
        outage.failed(OSError())
    assert pauses == [1.0, *(share * pause for pause in (2.0, 4.0, 8.0, 10.0, 10.0))]
    for _ in range(2000):
        outage.failed(OSError())
    assert outage.pause(1.0) == share * 10
    # One that comes round seldom anyway is not tried more often than half as early.
    assert outage.pause(3600.0) == share * 3600
    outage.worked()
    assert outage.pause(1.0) == 1.0


async def test_rounds_go_on_at_the_pauses_of_the_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slept = FakeClock(), list[float]()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.advance(seconds)
        if len(slept) == 8:
            raise asyncio.CancelledError

    async def work() -> None:
        if 1010.0 < clock.now < 1020.0:
            raise RuntimeError("away")

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await keep_doing("jobs", 4.0, work, Metrics(CollectorRegistry()), clock=clock, longest=6.0)
    # At 0, 4, 8 all is well; at 12 it fails and is tried 3 to 6 seconds later, until it is over.
    assert slept[:3] == [4.0] * 3
    assert 3.0 <= slept[3] <= 6.0
    assert slept[-1] == 4.0


async def test_a_single_try_is_told_with_its_traceback() -> None:
    metrics = Metrics(CollectorRegistry())

    async def work() -> None:
        raise RuntimeError("away")

    with capture_logs() as logs:
        await try_once("jobs", work, metrics)
    assert [entry["event"] for entry in logs] == ["background.failed"]
    # Nobody would ever say that it is over.
    assert (sample(metrics, "failures_total"), sample(metrics, "failing")) == (1, None)
