"""A real worker training a real job is killed at each failpoint: the job ends succeeded once, with one revision."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from postgres import fresh_database
from pydantic import SecretStr
from small_jobs import small_spec

from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import load_factors
from hueshift.server.base_trainer import BaseTrainer
from hueshift.server.clock import SystemClock
from hueshift.server.failpoints import NAMES, Failpoint
from hueshift.server.settings import ModelSettings, Settings, StoreSettings, TrainingSettings
from hueshift.server.stop import StopFlag
from hueshift.server.store.job_records import EventKind, JobState, NewJob
from hueshift.server.store.stores import Stores, open_stores
from hueshift.server.worker import Worker
from hueshift.training.cost import open_speeds

STEPS, CHECKPOINT_EVERY = 4, 2
# Where the second attempt must begin: without a checkpoint at step 1, else after the last one; None: nothing is left.
RESUMES_AT = {"claimed": 1, "mid-step": 3, "checkpoint-written": 3, "before-publish": None, "after-publish": None}
START_SECONDS = 120


class Bench:
    """A store with one queued job, and ways to work on it."""

    def __init__(self, folder: Path, cache: Path, trainer: BaseTrainer, steps: int = STEPS, database: str = "") -> None:
        self.settings = Settings(
            store=StoreSettings(path=folder, cache_path=cache, database_url=SecretStr(database)),
            model=ModelSettings(clip_path=None),
            training=TrainingSettings(threads=1, lease_seconds=300, poll_seconds=0.05),
        )
        self.stores: Stores = open_stores(self.settings, SystemClock())
        self.trainer = trainer
        spec = small_spec(steps=steps, batch_size=1, checkpoint_interval=CHECKPOINT_EVERY)
        staged = self.stores.folders.stage()
        picture = Image.new("RGB", (128, 128), (250, 240, 220))
        ImageDraw.Draw(picture).ellipse((20, 30, 100, 110), fill=(210, 90, 20))
        picture.save(self.stores.folders.staged_file(staged, 0).target)
        self.stores.folders.adopt(staged, "ft-1")
        self.stores.jobs.create(NewJob("ft-1", "alice", spec, "fox", "Fox", {}), tenant_limit=1)

    def spawn(self, owner: str, failpoint: str = "") -> "subprocess.Popen[str]":
        """Start a worker as the supervisor does; its standard input stays open."""
        command = [sys.executable, "-P", "-m", "hueshift.server.cli.worker", "--supervised", "--owner", owner]
        child = subprocess.Popen([*command, "--failpoint", failpoint], stdin=subprocess.PIPE, text=True)
        assert child.stdin is not None
        child.stdin.write(self.settings.model_dump_json() + "\n")
        child.stdin.flush()
        return child

    def work_here(self) -> None:
        """Do what a second worker would do, in this process, which has the base model loaded already."""
        claimed = self.stores.jobs.claim("second", 300.0)
        if claimed is None:
            return
        Worker(
            owner="second",
            jobs=self.stores.jobs,
            adapters=self.stores.adapters,
            folders=self.stores.folders,
            trainer=self.trainer,
            settings=self.settings.training,
            clock=SystemClock(),
            stop=StopFlag(),
            failpoint=Failpoint(),
        ).work(claimed)

    def attempts(self) -> list[list[int]]:
        """Steps told by each attempt, in order."""
        found: list[list[int]] = []
        for event in self.stores.jobs.events("ft-1", limit=1000):
            if event.kind is EventKind.STATE and event.payload["state"] == "running":
                found.append([])
            elif event.kind is EventKind.PROGRESS:
                found[-1].append(event.payload["step"])
        return found

    def ended_well(self) -> str:
        """Check that the job succeeded once with one revision and left no pictures; return the adapter's hash."""
        job = self.stores.jobs.get("alice", "ft-1")
        assert (job.state, job.step, job.revision) == (JobState.SUCCEEDED, job.steps, 1)
        states = [
            event.payload["state"]
            for event in self.stores.jobs.events("ft-1", limit=1000)
            if event.kind is EventKind.STATE
        ]
        assert states.count("succeeded") == 1
        assert states[-1] == "succeeded"
        record = self.stores.adapters.get("alice", "fox")
        assert record.revision == 1
        self.stores.folders.sweep(self.stores.jobs.open_jobs(), 0.0)
        assert self.stores.folders.pictures("ft-1") == []
        return record.newest.content_hash


@pytest.fixture(scope="module")
def trainer(base_model: BaseModel, cache_dir: Path) -> Iterator[BaseTrainer]:
    """A trainer in this process with as many threads as the workers have: the bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield BaseTrainer(base_model, load_factors(base_model, cache_dir), None, cache_dir, open_speeds(cache_dir))
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, trainer: BaseTrainer) -> str:
    """Hash of the adapter that the job gives when nobody is killed."""
    bench = Bench(tmp_path_factory.mktemp("undisturbed"), cache_dir, trainer)
    bench.work_here()
    assert bench.attempts()[0][0] == 1
    content_hash = bench.ended_well()
    bench.stores.close()
    return content_hash


@pytest.fixture(params=["sqlite", "postgres"])
def bench(request: pytest.FixtureRequest, tmp_path: Path, cache_dir: Path, trainer: BaseTrainer) -> Iterator[Bench]:
    database = ""
    if request.param == "postgres":
        database = fresh_database(request.getfixturevalue("postgres_server"), "kills")
    bench = Bench(tmp_path, cache_dir, trainer, database=database)
    yield bench
    bench.stores.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_job_survives_its_worker(name: str, bench: Bench, undisturbed: str) -> None:
    # The third passage of mid-step lies after the checkpoint of step 2.
    child = bench.spawn("first", f"{name}:3" if name == "mid-step" else name)
    with child:
        assert child.wait(START_SECONDS) == -signal.SIGKILL
    job = bench.stores.jobs.get("alice", "ft-1")
    assert job.state is (JobState.SUCCEEDED if name == "after-publish" else JobState.RUNNING)
    bench.stores.jobs.expire_leases("first")
    bench.work_here()
    # The same bits as if nothing had happened.
    assert bench.ended_well() == undisturbed
    attempts = bench.attempts()
    assert len(attempts) == (1 if name == "after-publish" else 2)
    if RESUMES_AT[name] is not None:
        assert attempts[1][0] == RESUMES_AT[name]
    elif len(attempts) == 2:
        assert attempts[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["signal", "server gone"])
def test_a_worker_that_must_stop_puts_its_job_back(
    how: str, tmp_path: Path, cache_dir: Path, trainer: BaseTrainer
) -> None:
    bench = Bench(tmp_path, cache_dir, trainer, steps=500)
    child = bench.spawn("first")
    with child:
        deadline = time.monotonic() + START_SECONDS
        while bench.stores.jobs.get("alice", "ft-1").step < 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert child.stdin is not None
        if how == "signal":
            child.send_signal(signal.SIGTERM)
        else:
            # What the kernel does for a server that is killed.
            child.stdin.close()
        assert child.wait(START_SECONDS) == 0
    job = bench.stores.jobs.get("alice", "ft-1")
    assert (job.state, job.attempt, job.leases_lost) == (JobState.QUEUED, 0, 0)
    assert (bench.stores.folders.work("ft-1") / "checkpoint.safetensors").exists()
    bench.stores.close()


def test_a_worker_that_cannot_load_its_base_says_so(tmp_path: Path) -> None:
    settings = Settings(store=StoreSettings(path=tmp_path), model=ModelSettings(path=tmp_path / "absent"))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "hueshift.server.cli.worker", "--supervised"],
        input=json.dumps(settings.model_dump(mode="json")) + "\n",
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        env={**os.environ, "TERM": "dumb"},
        check=False,
    )
    assert done.returncode == 1
    assert "no model_index.json" in done.stderr
    assert "Traceback" not in done.stderr
