"""A worker with several places: who is taken beside whom, and that each job's end is its own."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_jobs import SMALL_ADAPTER, small_spec

from hueshift.adapters.errors import Cancelled, InvalidArgument, Reason
from hueshift.server.clock import SystemClock
from hueshift.server.failpoints import Failpoint
from hueshift.server.job_run import JobRun
from hueshift.server.settings import Settings, StoreSettings, TrainingSettings
from hueshift.server.stop import StopFlag
from hueshift.server.store.job_records import JobState, NewJob
from hueshift.server.store.stores import Stores, open_stores
from hueshift.server.worker import Trained, Worker
from hueshift.training.spec import Method, TrainingSpec

LIMIT = 20.0


@dataclass
class GatedTrainer:
    """Holds every job until the test lets it end, or until it is asked to stop."""

    gates: dict[int, threading.Event] = field(default_factory=dict)
    working: set[int] = field(default_factory=set)
    fail: frozenset[int] = frozenset()

    def train(
        self,
        spec: TrainingSpec,
        pictures: Sequence[Image.Image],
        masks: Mapping[int, Image.Image],
        work: Path,
        run: JobRun,
    ) -> Trained:
        self.working.add(spec.seed)
        try:
            while not self.gates.setdefault(spec.seed, threading.Event()).wait(0.01):
                if run.should_stop():
                    raise Cancelled(Reason.CANCELLED, "asked to stop")
            if spec.seed in self.fail:
                raise InvalidArgument(Reason.TRAINING_DIVERGED, "diverged")
            return Trained(SMALL_ADAPTER, None)
        finally:
            self.working.discard(spec.seed)

    def end(self, seed: int) -> None:
        self.gates.setdefault(seed, threading.Event()).set()


class House:
    """Stores in a folder, and one worker of three places in a thread."""

    def __init__(self, folder: Path) -> None:
        training = TrainingSettings(lease_seconds=30, poll_seconds=0.01, jobs_per_worker=3)
        self.stores: Stores = open_stores(Settings(store=StoreSettings(path=folder), training=training), SystemClock())
        self.stop = StopFlag()
        self.trainer = GatedTrainer()
        self.worker = Worker(
            owner="w",
            jobs=self.stores.jobs,
            adapters=self.stores.adapters,
            folders=self.stores.folders,
            trainer=self.trainer,
            settings=training,
            clock=SystemClock(),
            stop=self.stop,
            failpoint=Failpoint(),
        )
        self.thread = threading.Thread(target=self.worker.run)

    def queue(self, seed: int, **given: Any) -> None:
        staged = self.stores.folders.stage()
        Image.new("RGB", (40, 40)).save(self.stores.folders.staged_file(staged, 0).target)
        self.stores.folders.adopt(staged, f"ft-{seed}")
        spec = replace(small_spec(seed=seed), **given)
        self.stores.jobs.create(NewJob(f"ft-{seed}", "alice", spec, f"fox-{seed}", "Fox", {}), tenant_limit=9)

    def state(self, seed: int) -> JobState:
        return self.stores.jobs.get("alice", f"ft-{seed}").state

    def close(self) -> None:
        self.stop.request()
        if self.thread.ident is not None:
            self.thread.join(LIMIT)
        self.stores.close()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.close()


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_places_fill_in_the_order_of_the_line_and_nobody_is_passed_by(house: House) -> None:
    for seed in (1, 2):
        house.queue(seed)
    house.queue(3, gradient_checkpointing=True)
    house.queue(4)
    house.thread.start()
    trainer = house.trainer
    until(lambda: trainer.working == {1, 2})
    time.sleep(0.1)
    # The fourth would fit, but the third is before it.
    assert trainer.working == {1, 2}
    trainer.end(1)
    until(lambda: house.state(1) is JobState.SUCCEEDED)
    time.sleep(0.1)
    assert trainer.working == {2}
    trainer.end(2)
    until(lambda: trainer.working == {3})
    trainer.end(3)
    until(lambda: trainer.working == {4})
    trainer.end(4)
    until(lambda: house.state(4) is JobState.SUCCEEDED)


def test_no_more_jobs_than_places(house: House) -> None:
    for seed in range(5):
        house.queue(seed)
    house.thread.start()
    trainer = house.trainer
    until(lambda: trainer.working == {0, 1, 2})
    time.sleep(0.1)
    assert trainer.working == {0, 1, 2}
    trainer.end(1)
    until(lambda: trainer.working == {0, 2, 3})


def test_a_method_that_does_not_share_is_alone(house: House) -> None:
    house.queue(1, method=Method.DREAMBOOTH)
    house.queue(2, method=Method.DREAMBOOTH)
    house.thread.start()
    until(lambda: house.trainer.working == {1})
    time.sleep(0.1)
    assert house.trainer.working == {1}
    house.trainer.end(1)
    until(lambda: house.trainer.working == {2})


def test_each_job_is_cancelled_fails_and_ends_by_itself(house: House) -> None:
    house.trainer.fail = frozenset({2})
    for seed in (1, 2, 3):
        house.queue(seed)
    house.thread.start()
    until(lambda: house.trainer.working == {1, 2, 3})
    house.stores.jobs.cancel("alice", "ft-1")
    until(lambda: house.state(1) is JobState.CANCELLED)
    house.trainer.end(2)
    until(lambda: house.state(2) is JobState.FAILED)
    assert house.trainer.working == {3}
    # A worker that is asked to stop puts back what it has in hand.
    house.stop.request()
    house.thread.join(LIMIT)
    assert house.state(3) is JobState.QUEUED
    assert house.stores.jobs.get("alice", "ft-3").attempt == 0
