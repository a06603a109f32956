"""The worker with a trainer of a few lines: every way an attempt can end, and what it leaves in the table."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_jobs import SMALL_ADAPTER, small_spec
from sqlalchemy import update
from sqlalchemy.exc import InternalError
from structlog.testing import capture_logs

from hueshift.adapters.errors import Cancelled, HueshiftError, InvalidArgument, Reason, ResourceExhausted, Unavailable
from hueshift.server.clock import SystemClock
from hueshift.server.failpoints import Failpoint
from hueshift.server.job_run import JobRun
from hueshift.server.settings import Settings, StoreSettings, TrainingSettings
from hueshift.server.stop import StopFlag
from hueshift.server.store.job_records import EventKind, JobRecord, JobState, NewJob
from hueshift.server.store.job_store import JobStore
from hueshift.server.store.stores import Stores, open_stores
from hueshift.server.store.tables import jobs
from hueshift.server.worker import Trained, Worker
from hueshift.training.spec import TrainingSpec

STEPS = 20
Script = Callable[[JobRun], None]


@dataclass
class ScriptedTrainer:
    """Calls each script in turn, one per attempt."""

    scripts: list[Script]
    pictures: list[tuple[int, int]] = field(default_factory=list)

    def train(
        self,
        spec: TrainingSpec,
        pictures: Sequence[Image.Image],
        masks: Mapping[int, Image.Image],
        work: Path,
        run: JobRun,
    ) -> Trained:
        assert work.is_dir()
        (work / "checkpoint").write_bytes(b"state")
        self.pictures = [picture.size for picture in pictures]
        self.scripts.pop(0)(run)
        return Trained(SMALL_ADAPTER, {"clip_i": 0.5, "clip_t": 0.3, "clip_i_base": 0.1})


class Bench:
    """Stores in a folder, and workers on them."""

    def __init__(self, folder: Path, *, keep_pictures: bool = False, max_job_memory: int = 0) -> None:
        training = TrainingSettings(
            lease_seconds=30,
            poll_seconds=0.01,
            max_attempts=2,
            keep_pictures=keep_pictures,
            max_job_memory=max_job_memory,
        )
        self.settings = Settings(store=StoreSettings(path=folder), training=training)
        self.stores: Stores = open_stores(self.settings, SystemClock())
        self.stop = StopFlag()
        self.folder = folder / "jobs"

    def queue(self, job_id: str = "ft-1") -> None:
        spec = small_spec(captions=["", ""], steps=STEPS)
        staged = self.stores.folders.stage()
        for index in range(2):
            Image.new("RGB", (40 + index, 40)).save(self.stores.folders.staged_file(staged, index).target)
        self.stores.folders.adopt(staged, job_id)
        self.stores.jobs.create(NewJob(job_id, "alice", spec, "fox", "Fox", {}), tenant_limit=9)

    def worker(self, *scripts: Script, trainer: ScriptedTrainer | None = None) -> Worker:
        return Worker(
            owner="w",
            jobs=self.stores.jobs,
            adapters=self.stores.adapters,
            folders=self.stores.folders,
            trainer=trainer or ScriptedTrainer(list(scripts)),
            settings=self.settings.training,
            clock=SystemClock(),
            stop=self.stop,
            failpoint=Failpoint(),
        )

    def attempt(self, *scripts: Script) -> JobRecord:
        claimed = self.stores.jobs.claim("w", 30.0)
        assert claimed is not None
        self.worker(*scripts).work(claimed)
        return self.job()

    def job(self, job_id: str = "ft-1") -> JobRecord:
        return self.stores.jobs.get("alice", job_id)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.stores.close()


def nothing(run: JobRun) -> None:
    """Train without a word."""


def stops_when_asked(run: JobRun) -> None:
    for _ in range(2000):
        if run.should_stop():
            raise Cancelled(Reason.CANCELLED, "asked to stop")
        time.sleep(0.01)


def raises(error: Exception) -> Script:
    def script(run: JobRun) -> None:
        raise error

    return script


def test_an_outage_of_a_store_costs_a_job_no_attempt(bench: Bench) -> None:
    bench.queue()
    for _ in range(4):
        before = SystemClock().time()
        job = bench.attempt(raises(Unavailable(Reason.STORE_UNAVAILABLE, "away")))
        assert (job.state, job.attempt, job.failures) == (JobState.QUEUED, 0, [])
        assert job.not_before >= before + 10
        assert bench.stores.jobs.claim("w", 30.0) is None
        with bench.stores.database.write() as connection:
            connection.execute(update(jobs).values(not_before=0.0))
    assert bench.attempt(nothing).state is JobState.SUCCEEDED


def test_a_job_that_does_not_fit_is_not_tried_again(bench: Bench) -> None:
    bench.queue()
    job = bench.attempt(raises(torch.OutOfMemoryError("CUDA out of memory")))
    assert (job.state, job.attempt, job.error_reason) == (JobState.FAILED, 1, "JOB_MEMORY_LIMIT")
    assert not bench.stop.requested


def test_a_job_over_a_limit_fails_and_its_worker_makes_room(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_job_memory=1)
    bench.queue()
    job = bench.attempt(stops_when_asked)
    assert (job.state, job.error_reason) == (JobState.FAILED, "JOB_MEMORY_LIMIT")
    # The supervisor starts another in its place.
    assert bench.stop.requested
    bench.stores.close()


def test_a_job_is_trained_published_and_cleaned_up(bench: Bench) -> None:
    bench.queue()
    claimed = bench.stores.jobs.claim("w", 30.0)
    assert claimed is not None
    trainer = ScriptedTrainer([nothing])
    bench.worker(trainer=trainer).work(claimed)
    job = bench.job()
    assert (job.state, job.revision, job.attempt) == (JobState.SUCCEEDED, 1, 1)
    assert job.scores == {"clip_i": 0.5, "clip_t": 0.3, "clip_i_base": 0.1}
    assert trainer.pictures == [(40, 40), (41, 40)]
    assert bench.stores.adapters.get("alice", "fox").newest.job_id == "ft-1"
    assert list(bench.folder.iterdir()) == []


def test_kept_pictures_stay_and_nothing_else(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep_pictures=True)
    bench.queue()
    bench.attempt(nothing)
    assert [path.name for path in (bench.folder / "ft-1").iterdir()] == ["pictures"]
    assert bench.stores.folders.sweep(set(), 0.0) == 0
    bench.stores.close()


def test_progress_is_thinned_but_its_means_lose_nothing(bench: Bench) -> None:
    def train(run: JobRun) -> None:
        for step in range(1, STEPS + 1):
            run.on_step(step, float(step), 0.5)

    bench.queue()
    bench.attempt(train)
    events = [e.payload for e in bench.stores.jobs.events("ft-1") if e.kind is EventKind.PROGRESS]
    # The first and the last step are told at once, those within half a second between them in one mean.
    assert [event["step"] for event in events] == [1, STEPS]
    assert events[1]["loss"] == sum(range(2, STEPS + 1)) / (STEPS - 1)
    assert events[1]["seconds_per_step"] == 0.5


def test_reports_that_the_database_refuses_do_not_end_training(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise InternalError("UPDATE jobs", {}, Exception("of a kind that nobody thought of"))

    def train(run: JobRun) -> None:
        with monkeypatch.context() as broken:
            for method in ("progress", "sample", "checkpoint"):
                broken.setattr(JobStore, method, refuse)
            run.on_step(1, 0.5, 0.5)
            run.on_sample(1, "a prompt", b"png")
            run.on_checkpoint(1, Path("folder/checkpoint.safetensors"))

    bench.queue()
    assert bench.attempt(train).state is JobState.SUCCEEDED


def test_samples_and_checkpoints_reach_the_table(bench: Bench) -> None:
    def train(run: JobRun) -> None:
        run.on_sample(3, "a prompt", b"png")
        run.on_checkpoint(4, Path("folder/checkpoint.safetensors"))

    bench.queue()
    assert bench.attempt(train).checkpoint == "checkpoint.safetensors"
    (sample,) = [e for e in bench.stores.jobs.events("ft-1") if e.kind is EventKind.SAMPLE]
    assert (sample.payload, sample.data) == ({"step": 3, "prompt": "a prompt"}, b"png")


@pytest.mark.parametrize(
    "error",
    [
        HueshiftError(Reason.TRAINING_DIVERGED, "training diverged at step 3; lower settings.learning_rate"),
        InvalidArgument.for_field("identifier", "is two tokens"),
    ],
)
def test_an_error_of_the_job_fails_it_for_good_with_its_words(bench: Bench, error: HueshiftError) -> None:
    bench.queue()
    job = bench.attempt(raises(error))
    assert (job.state, job.error_reason, job.error_message) == (JobState.FAILED, error.reason, error.message)
    assert list(bench.folder.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("/secret/path is full"), ResourceExhausted(Reason.STORE_FULL, "full")])
def test_an_error_of_ours_is_tried_again_and_its_text_stays_in_the_log(bench: Bench, error: Exception) -> None:
    bench.queue()
    job = bench.attempt(raises(error))
    assert (job.state, job.attempt, job.error_message) == (JobState.QUEUED, 1, None)
    assert job.not_before > job.created
    # The checkpoint waits for the next attempt.
    assert (bench.folder / "ft-1" / "work" / "checkpoint").exists()
    time.sleep(max(0.0, job.not_before - SystemClock().time()) + 0.05)
    job = bench.attempt(raises(error))
    assert (job.state, job.error_reason) == (JobState.FAILED, "ATTEMPTS_EXHAUSTED")
    assert "incident" in str(job.error_message)
    assert "secret" not in str(job.error_message)
    # It may be retried, so its files stay until then.
    assert bench.stores.folders.sweep(bench.stores.jobs.kept_jobs(), 0.0) == 0
    assert bench.stores.folders.holds_inputs("ft-1", 2)
    assert bench.stores.folders.sweep(bench.stores.jobs.open_jobs(), 0.0) == 1


def test_a_worker_whose_device_is_lost_takes_no_other_job(bench: Bench) -> None:
    bench.queue()
    with capture_logs() as logs:
        job = bench.attempt(raises(RuntimeError("CUDA error: an illegal memory access was encountered")))
    # It may have been the job: the try counts.
    assert (job.state, job.attempt) == (JobState.QUEUED, 1)
    assert bench.stop.requested
    assert "worker.device_lost" in [line["event"] for line in logs]


def test_a_cancelled_job_ends_cancelled(bench: Bench) -> None:
    def train(run: JobRun) -> None:
        bench.stores.jobs.cancel("alice", "ft-1")
        stops_when_asked(run)

    bench.queue()
    assert bench.attempt(train).state is JobState.CANCELLED
    assert list(bench.folder.iterdir()) == []


def test_a_cancellation_that_comes_too_late_for_training_still_counts(bench: Bench) -> None:
    def train(run: JobRun) -> None:
        bench.stores.jobs.cancel("alice", "ft-1")

    bench.queue()
    job = bench.attempt(train)
    assert (job.state, job.revision) == (JobState.CANCELLED, 0)


def test_a_stopped_worker_puts_its_job_back_without_counting(bench: Bench) -> None:
    def train(run: JobRun) -> None:
        bench.stop.request()
        stops_when_asked(run)

    bench.queue()
    job = bench.attempt(train)
    assert (job.state, job.attempt) == (JobState.QUEUED, 0)
    assert (bench.folder / "ft-1" / "work" / "checkpoint").exists()


def test_a_lost_lease_stops_training_and_writes_nothing(bench: Bench) -> None:
    taken: list[int] = []

    def train(run: JobRun) -> None:
        bench.stores.jobs.expire_leases("w")
        other = bench.stores.jobs.claim("other", 30.0)
        assert other is not None
        taken.append(other.lease.token)
        run.on_step(1, 0.5, 0.1)
        stops_when_asked(run)

    bench.queue()
    job = bench.attempt(train)
    assert (job.state, job.lease_owner, job.fencing_token) == (JobState.RUNNING, "other", taken[0])
    assert job.step == 0
    assert len(bench.stores.folders.pictures("ft-1")) == 2


def test_a_zombie_that_does_not_notice_cannot_publish(bench: Bench) -> None:
    def train(run: JobRun) -> None:
        bench.stores.jobs.expire_leases("w")
        assert bench.stores.jobs.claim("other", 30.0) is not None

    bench.queue()
    job = bench.attempt(train)
    assert (job.state, job.lease_owner, job.revision) == (JobState.RUNNING, "other", 0)
    assert bench.stores.adapters.list("alice").adapters == ()


def test_missing_pictures_are_our_fault(bench: Bench) -> None:
    bench.queue()
    bench.stores.folders.pictures("ft-1")[0].unlink()
    assert bench.attempt(nothing).state is JobState.QUEUED


def test_the_loop_takes_jobs_until_told_to_stop(bench: Bench) -> None:
    def last(run: JobRun) -> None:
        bench.stop.request()

    for number in range(3):
        bench.queue(f"ft-{number}")
    bench.worker(nothing, nothing, last).run()
    assert bench.stores.jobs.numbers().states[JobState.SUCCEEDED] == 3
    assert bench.stores.adapters.get("alice", "fox").revision == 3


def test_a_long_training_keeps_its_lease(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.queue()
    claimed = bench.stores.jobs.claim("w", 30.0)
    assert claimed is not None
    before = claimed.job.lease_expires
    seen: list[float | None] = []

    def train(run: JobRun) -> None:
        time.sleep(1.3)
        seen.append(bench.job().lease_expires)

    bench.worker(train).work(claimed)
    assert before is not None
    assert seen[0] is not None
    assert seen[0] > before + 0.9
    # The keeper's thread ends with the attempt.
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]
    bench.stores.close()


def test_folders_of_nobody_are_swept_when_they_are_old(bench: Bench) -> None:
    bench.queue("ft-open")
    bench.queue("ft-ended")
    staged = bench.stores.folders.stage()
    assert bench.stores.folders.sweep({"ft-open"}, 3600.0) == 0
    assert bench.stores.folders.sweep({"ft-open"}, 0.0) == 2
    assert not staged.exists()
    assert [path.name for path in bench.folder.iterdir()] == ["ft-open"]


@pytest.mark.parametrize("text", ["nowhere", "claimed:0", "claimed:x", "mid-step:-1"])
def test_unknown_failpoints_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Failpoint.parse(text)


def test_a_retried_job_finds_its_pictures_and_its_checkpoint(bench: Bench) -> None:
    seen: list[bool] = []

    def resumes(run: JobRun) -> None:
        seen.append((bench.folder / "ft-1" / "work" / "checkpoint").exists())

    bench.queue()
    assert bench.attempt(raises(torch.OutOfMemoryError("CUDA out of memory"))).state is JobState.FAILED
    # As long as it may be retried no sweep takes its files.
    assert bench.stores.folders.sweep(bench.stores.jobs.kept_jobs(), 0.0) == 0
    assert bench.stores.folders.holds_inputs("ft-1", 2)
    (bench.folder / "ft-1" / "work" / "checkpoint").touch()
    bench.stores.jobs.retry_failed("alice", "ft-1", tenant_limit=9)
    job = bench.attempt(resumes)
    assert (job.state, job.attempt, seen) == (JobState.SUCCEEDED, 1, [True])
    assert list(bench.folder.iterdir()) == []


def test_a_job_that_would_fail_again_leaves_nothing(bench: Bench) -> None:
    bench.queue()
    error = InvalidArgument(Reason.INVALID_FIELD, "the captions are wrong")
    assert bench.attempt(raises(error)).state is JobState.FAILED
    assert list(bench.folder.iterdir()) == []
