"""Real Ray clusters of several nodes on this machine, over a real Postgres: nodes, drivers and replicas are killed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from PIL import Image, ImageDraw
from postgres import fresh_database
from small_jobs import small_spec
from whole_server import RpcStubs

from hueshift.server.clock import SystemClock
from hueshift.server.cluster.build import build_front_end
from hueshift.server.frame import Frame
from hueshift.server.settings import Settings, load_settings
from hueshift.server.store.job_records import EventKind, JobRecord, JobState, NewJob
from hueshift.server.store.replicas import ReplicaStore
from hueshift.server.store.stores import Stores, open_stores

# Ray's own code warns, and leaves files open until its processes end.
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),
]
PROGRAM = (sys.executable, "-P", "-m", "hueshift.server.cli.main", "cluster")
STEPS, CHECKPOINT_EVERY = 80, 10
# On a machine that is busy with other things too.
PATIENCE = 250.0


class House:
    """A cluster, a database, and what an operator does with them."""

    def __init__(self, cluster: Any, database: str, folder: Path, cache: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.sections: dict[str, dict[str, Any]] = {
            "store": {"path": str(folder / "store"), "cache_path": str(cache), "database_url": database},
            "server": {"port": 0, "metrics_port": 0, "drain_seconds": 20},
            "training": {"threads": 1, "lease_seconds": 3, "poll_seconds": 0.1},
            "engine": {"threads": 1, "max_batch": 2},
            "cluster": {"ray_address": cluster.address, "heartbeat_seconds": 0.5, "actor_cpus": 1},
        }
        self.stores: Stores = open_stores(self.settings(), SystemClock())
        self.drivers: list[subprocess.Popen[bytes]] = []

    def settings(self, **cluster: int) -> Settings:
        return load_settings(None, **{**self.sections, "cluster": {**self.sections["cluster"], **cluster}})

    def environment(self, **cluster: int) -> dict[str, str]:
        found = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        for section, values in self.sections.items():
            for name, value in {**values, **(cluster if section == "cluster" else {})}.items():
                found[f"HUESHIFT_{section.upper()}__{name.upper()}"] = str(value)
        return found

    def drive(self, **cluster: int) -> "subprocess.Popen[bytes]":
        """Start a driver that wants so many replicas and workers."""
        log = (self.folder / f"driver-{len(self.drivers)}.log").open("wb")
        self.drivers.append(
            subprocess.Popen([*PROGRAM, "run"], env=self.environment(**cluster), stdout=log, stderr=log)
        )
        log.close()
        return self.drivers[-1]

    def ask(self, command: str) -> Any:
        """Run another command of the driver and return its JSON."""
        done = subprocess.run(
            [*PROGRAM, command, "--json"], env=self.environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def reconciled(self) -> list[dict[str, Any]]:
        """What the newest driver said of its work."""
        text = (self.folder / f"driver-{len(self.drivers) - 1}.log").read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == "cluster.reconciled"]

    def queue(self) -> None:
        spec = small_spec(steps=STEPS, batch_size=1, checkpoint_interval=CHECKPOINT_EVERY)
        staged = self.stores.folders.stage()
        picture = Image.new("RGB", (128, 128), (250, 240, 220))
        ImageDraw.Draw(picture).ellipse((20, 30, 100, 110), fill=(210, 90, 20))
        picture.save(self.stores.folders.staged_file(staged, 0).target)
        self.stores.folders.adopt(staged, "ft-1")
        self.stores.jobs.create(NewJob("ft-1", "local", spec, "fox", "Fox", {}), tenant_limit=1)

    def job(self) -> JobRecord:
        return self.stores.jobs.get("local", "ft-1")

    def kill_node_of(self, owner: str) -> None:
        """Make a node vanish with all that runs on it."""
        node = next(node for node in self.cluster.worker_nodes if node.node_id[:8] == owner.split("-")[-2])
        # Its child first, or it would put its job back in good order, as no dead machine does.
        for process in psutil.process_iter(["cmdline"]):
            if owner in (process.info["cmdline"] or ()):
                process.kill()
        self.cluster.remove_node(node, allow_graceful=False)


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs nothing, a node to serve, two to fine-tune."""
    pytest.importorskip("ray", reason="ray is not installed (pip install 'hueshift[ray]')")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # A node counts as dead after a second; Ray's own fifteen would be most of this test.
    noticed = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 2}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": noticed}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for pool in ("serve", "finetune", "finetune"):
        cluster.add_node(num_cpus=2, labels={"hueshift-pool": pool})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def house(cluster: Any, postgres_server: str, tmp_path: Path, cache_dir: Path) -> Iterator[House]:
    house = House(cluster, fresh_database(postgres_server, "cluster"), tmp_path, cache_dir)
    yield house
    for driver in house.drivers:
        driver.kill()
        driver.wait()
    house.ask("down")
    house.stores.close()


def test_a_job_survives_its_node_and_the_driver(house: House) -> None:
    house.queue()
    first = house.drive(workers=1)
    until(lambda: house.job().checkpoint and house.job().step > CHECKPOINT_EVERY)
    assert first.poll() is None
    (actor,) = house.ask("status")
    owner = str(house.job().lease_owner)
    assert owner.startswith(actor["name"])
    assert actor["node"][:8] == owner.split("-")[-2]

    first.send_signal(signal.SIGKILL)
    first.wait()
    assert house.job().state is JobState.RUNNING
    house.kill_node_of(owner)
    # Nobody drives: Ray itself brings the actor up on the other node of its pool, and the lease runs out.
    until(lambda: house.job().state is JobState.RUNNING and house.job().fencing_token == 2)
    assert str(house.job().lease_owner).split("-")[-2] != owner.split("-")[-2]

    # A driver that comes back finds what it left.
    house.drive(workers=1)
    until(house.reconciled)
    assert [(done["adopted"], done["created"], done["leaving"]) for done in house.reconciled()] == [(1, 0, 0)]
    until(lambda: house.job().state.ended)
    job = house.job()
    assert (job.state, job.attempt, job.revision) == (JobState.SUCCEEDED, 2, 1), job.failures
    assert [failure["cause"] for failure in job.failures] == ["its worker went silent"]
    assert house.stores.adapters.get("local", "fox").revision == 1
    attempts: list[list[int]] = []
    for event in house.stores.jobs.events("ft-1", limit=10_000):
        if event.kind is EventKind.STATE and event.payload["state"] == "running":
            attempts.append([])
        elif event.kind is EventKind.PROGRESS:
            attempts[-1].append(event.payload["step"])
    # It went on from a checkpoint, not from the beginning.
    assert attempts[1][0] > CHECKPOINT_EVERY
    assert attempts[1][0] <= attempts[0][-1] + CHECKPOINT_EVERY


async def test_a_replica_is_placed_found_and_replaced(house: House) -> None:
    table = ReplicaStore(house.stores.database)
    house.drive(replicas=1)
    until(lambda: table.read()[0])
    (before,) = table.read()[0]
    settings = house.settings()
    settings = settings.model_copy(
        update={"cluster": settings.cluster.model_copy(update={"role": "frontend"})},
    )
    stores = open_stores(settings, SystemClock())
    frame = Frame(settings, stores, SystemClock())
    address = (await frame.start()).grpc
    await frame.open(build_front_end(settings, stores, frame.metrics, SystemClock(), lambda *_: None))
    async with grpc.aio.insecure_channel(address) as channel:
        caller = RpcStubs(channel)
        drawn = await caller.images(seeds=[7])
        assert drawn[0].startswith(b"\x89PNG")
        (actor,) = house.ask("status")
        assert (actor["starts"], psutil.pid_exists(actor["pid"])) == (1, True)
        psutil.Process(actor["pid"]).kill()
        until(lambda: [record for record in table.read()[0] if record != before])
        # The front end learns of it by the table alone, at its next look.
        await asyncio.sleep(3 * settings.cluster.heartbeat_seconds)
        assert await caller.images(seeds=[7]) == drawn
    await frame.close(1.0)
    stores.close()
