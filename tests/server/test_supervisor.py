"""The supervisor with workers of a few lines: restarts, settings, leases of the dead, metrics, stopping."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import CollectorRegistry
from small_jobs import small_spec

from hueshift.server.clock import SystemClock
from hueshift.server.metrics import Metrics
from hueshift.server.settings import Settings, StoreSettings, TrainingSettings
from hueshift.server.store.job_records import JobState, NewJob
from hueshift.server.store.stores import Stores, open_stores
from hueshift.server.supervisor import Supervisor

# Each start writes `<pid> <owner>` and the settings it was given into a folder named on the command line.
NOTE = """
import json, os, pathlib, signal, sys, time
folder, owner = pathlib.Path(sys.argv[1]), sys.argv[3]
settings = json.loads(sys.stdin.readline())
(folder / f"{os.getpid()}.tmp").write_text(json.dumps({"owner": owner, "settings": settings,
    "waiting": os.environ.get("OMP_WAIT_POLICY")}))
(folder / f"{os.getpid()}.tmp").rename(folder / f"{os.getpid()}.json")
"""
IDLE = NOTE + "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nwhile sys.stdin.read(1): pass\n"
STUBBORN = NOTE + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)\n"
CRASHES = NOTE + "sys.exit(3)\n"


class Bench:
    """A supervisor whose workers run a script."""

    def __init__(self, folder: Path, script: str, workers: int = 1) -> None:
        self.notes = folder / "notes"
        self.notes.mkdir()
        self.settings = Settings(
            store=StoreSettings(path=folder / "store"),
            training=TrainingSettings(workers=workers, lease_seconds=60, nice=7),
        )
        self.stores: Stores = open_stores(self.settings, SystemClock())
        self.metrics = Metrics(CollectorRegistry())
        self.supervisor = Supervisor(
            self.settings,
            jobs=self.stores.jobs,
            folders=self.stores.folders,
            metrics=self.metrics,
            clock=SystemClock(),
            command=[sys.executable, "-P", "-c", script, str(self.notes)],
        )

    def started(self) -> dict[int, str]:
        """Owner names of all starts so far, by process id."""
        return {int(path.stem): json.loads(path.read_text())["owner"] for path in self.notes.glob("*.json")}

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (the condition is in another process)
            await asyncio.sleep(0.02)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(script: str, workers: int = 1) -> Bench:
        made.append(Bench(tmp_path, script, workers))
        return made[-1]

    yield make
    for each in made:
        await each.supervisor.stop(0.0)
        each.stores.close()


async def test_workers_get_the_settings_and_end_with_the_server(bench: Callable[..., Bench]) -> None:
    house = bench(IDLE, workers=2)
    await house.supervisor.start()
    await until(lambda: len(house.started()) == 2)
    assert house.sample("hueshift_workers") == 2
    note = next(house.notes.glob("*.json"))
    told = json.loads(note.read_text())
    assert Settings.model_validate(told["settings"]) == house.settings
    assert told["waiting"] == os.environ.get("OMP_WAIT_POLICY", "passive")
    assert len(set(house.started().values())) == 2
    await house.supervisor.stop(20.0)
    assert house.sample("hueshift_workers") == 0
    assert not [pid for pid in house.started() if psutil.pid_exists(pid)]


async def test_a_killed_worker_is_replaced_and_its_job_put_back(bench: Callable[..., Bench]) -> None:
    house = bench(IDLE)
    house.stores.jobs.create(NewJob("ft-1", "alice", small_spec(), "fox", "Fox", {}), tenant_limit=1)
    await house.supervisor.start()
    await until(house.started)
    ((pid, owner),) = house.started().items()
    assert house.stores.jobs.claim(owner, 60.0) is not None
    psutil.Process(pid).send_signal(signal.SIGKILL)
    # Long before the lease of a minute would have run out.
    await until(lambda: house.stores.jobs.get("alice", "ft-1").state is JobState.QUEUED)
    await until(lambda: len(house.started()) == 2)
    await until(lambda: house.sample("hueshift_job_leases_lost_total") == 1)
    assert house.sample("hueshift_jobs", state="queued") == 1
    assert house.sample("hueshift_jobs", state="running") == 0
    assert house.sample("hueshift_job_steps_left") == small_spec().steps


async def test_a_worker_that_cannot_start_is_tried_ever_more_slowly(bench: Callable[..., Bench]) -> None:
    house = bench(CRASHES)
    begun = SystemClock().monotonic()
    await house.supervisor.start()
    await until(lambda: len(house.started()) == 3)
    # Pauses of 0.5 and 1 second lie between three starts.
    assert SystemClock().monotonic() - begun >= 1.5
    # A pause does not hold up the end.
    begun = SystemClock().monotonic()
    await house.supervisor.stop(20.0)
    assert SystemClock().monotonic() - begun < 2.0


async def test_a_process_that_cannot_be_made_is_tried_again(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = bench(IDLE)
    make, refused = asyncio.create_subprocess_exec, 0

    async def scarce(*command: Any, **options: Any) -> asyncio.subprocess.Process:
        nonlocal refused
        refused += 1
        if refused == 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return await make(*command, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", scarce)
    await house.supervisor.start()
    await until(house.started)
    assert house.sample("hueshift_background_failures_total", task="worker") == 1


async def test_a_stubborn_worker_is_killed_after_the_grace(bench: Callable[..., Bench]) -> None:
    house = bench(STUBBORN)
    await house.supervisor.start()
    await until(house.started)
    await house.supervisor.stop(0.3)
    (pid,) = house.started()
    assert not psutil.pid_exists(pid)


async def test_leases_of_workers_elsewhere_expire_too(bench: Callable[..., Bench]) -> None:
    house = bench(IDLE, workers=0)
    house.stores.jobs.create(NewJob("ft-1", "alice", small_spec(), "fox", "Fox", {}), tenant_limit=1)
    assert house.stores.jobs.claim("elsewhere", 0.2) is not None
    await house.supervisor.start()
    await until(lambda: house.sample("hueshift_job_leases_lost_total") == 1)
    assert house.sample("hueshift_jobs", state="queued") == 1


SERVER = """
import asyncio, sys
from pathlib import Path
from prometheus_client import CollectorRegistry
from hueshift.server.clock import SystemClock
from hueshift.server.metrics import Metrics
from hueshift.server.settings import Settings, StoreSettings
from hueshift.server.store.stores import open_stores
from hueshift.server.supervisor import Supervisor

async def main():
    settings = Settings(store=StoreSettings(path=Path(sys.argv[1])))
    stores = open_stores(settings, SystemClock())
    command = [sys.executable, "-P", "-c", sys.argv[2], sys.argv[3]]
    await Supervisor(settings, jobs=stores.jobs, folders=stores.folders, metrics=Metrics(CollectorRegistry()),
                     clock=SystemClock(), command=command).start()
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_killed_server_takes_its_workers_along(tmp_path: Path) -> None:
    # The worker ignores SIGTERM: only the closed pipe can tell it. StopFlag is what the real one uses.
    script = NOTE + (
        "from hueshift.server.stop import StopFlag\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "stop = StopFlag()\nstop.on_closed(sys.stdin.fileno())\n"
        "while not stop.requested: time.sleep(0.02)\n"
        "(folder / 'ended').touch()\n"
    )
    command = [sys.executable, "-P", "-c", SERVER, str(tmp_path / "store"), script, str(tmp_path)]
    server = await asyncio.create_subprocess_exec(*command)
    try:
        await until(lambda: list(tmp_path.glob("*.json")), 60.0)
        assert not (tmp_path / "ended").exists()
    finally:
        server.kill()
        await server.wait()
    await until((tmp_path / "ended").exists)
