"""A worker of two places with the real trainer: both jobs take their steps together, and both adapters come out."""

import threading
import time
from dataclasses import replace
from pathlib import Path

from tiny_training import make_pictures, make_spec, make_tiny_base

from hueshift.engines.base_model import BaseModel
from hueshift.server.base_trainer import BaseTrainer
from hueshift.server.clock import SystemClock
from hueshift.server.failpoints import Failpoint
from hueshift.server.settings import Settings, StoreSettings, TrainingSettings
from hueshift.server.stop import StopFlag
from hueshift.server.store.job_records import JobState, NewJob
from hueshift.server.store.stores import open_stores
from hueshift.server.worker import Worker
from hueshift.training.cost import open_speeds
from hueshift.training.sharing.shared_training import SharedTraining

STEPS = 8
LIMIT = 120.0


def test_two_jobs_share_their_steps_and_are_published_each(base_model: BaseModel, tmp_path: Path) -> None:
    base, factors = make_tiny_base(base_model)
    sharing = SharedTraining(base, factors, patience=20.0)
    training = TrainingSettings(poll_seconds=0.01, jobs_per_worker=2)
    stores = open_stores(Settings(store=StoreSettings(path=tmp_path), training=training), SystemClock())
    names = ("fox", "owl")
    for number, name in enumerate(names):
        staged = stores.folders.stage()
        for index, picture in enumerate(make_pictures()):
            picture.save(stores.folders.staged_file(staged, index).target)
        stores.folders.adopt(staged, f"ft-{name}")
        spec = replace(make_spec(seed=number), steps=STEPS)
        stores.jobs.create(NewJob(f"ft-{name}", f"tenant-{number}", spec, name, name, {}), tenant_limit=9)
    stop = StopFlag()
    worker = Worker(
        owner="w",
        jobs=stores.jobs,
        adapters=stores.adapters,
        folders=stores.folders,
        trainer=BaseTrainer(base, factors, None, tmp_path, open_speeds(tmp_path), sharing),
        settings=training,
        clock=SystemClock(),
        stop=stop,
        failpoint=Failpoint(),
    )
    thread = threading.Thread(target=worker.run)
    begun = time.monotonic()
    thread.start()
    end = time.monotonic() + LIMIT
    while any(not stores.jobs.get(f"tenant-{n}", f"ft-{name}").state.ended for n, name in enumerate(names)):
        assert time.monotonic() < end
        time.sleep(0.05)
    passed = time.monotonic() - begun
    stop.request()
    thread.join(LIMIT)
    # Each is charged its part of the common steps, so that both together used the device once.
    jobs = [stores.jobs.get(f"tenant-{n}", f"ft-{name}") for n, name in enumerate(names)]
    assert 0 < sum(job.device_seconds for job in jobs) <= passed
    for number, name in enumerate(names):
        job = stores.jobs.get(f"tenant-{number}", f"ft-{name}")
        assert (job.state, job.step, job.revision) == (JobState.SUCCEEDED, STEPS, 1)
        assert stores.adapters.get(f"tenant-{number}", name).newest.job_id == f"ft-{name}"
    assert sharing.rounds[2] > 0
    stores.close()
