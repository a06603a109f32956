"""Events, jobs and revisions go when they are old: which, how many at a time, on which server, and through a kill."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_clock import FakeClock
from postgres import fresh_database
from pydantic import SecretStr
from small_jobs import small_spec
from small_store import small_file
from sqlalchemy import select, text

from hueshift.adapters.errors import NotFound, Reason
from hueshift.server import housekeeping
from hueshift.server.housekeeping import Keeping, clean
from hueshift.server.settings import RetentionSettings, ServerSettings, Settings, StoreSettings, TrainingSettings
from hueshift.server.store.job_records import EventKind, JobRecord, NewJob
from hueshift.server.store.retention import RevisionRule
from hueshift.server.store.stores import Stores, open_stores
from hueshift.server.store.tables import job_events, revisions
from hueshift.server.store.turns import end_turn, take_turn

Open = Callable[..., Stores]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(params=["sqlite", "postgres"])
def stores(request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock) -> Iterator[Stores]:
    url = fresh_database(request.getfixturevalue("postgres_server"), "kept") if request.param == "postgres" else ""
    found = open_stores(Settings(store=StoreSettings(path=tmp_path, database_url=SecretStr(url))), clock)
    yield found
    found.close()


@pytest.fixture
def on_sqlite(tmp_path: Path, clock: FakeClock) -> Iterator[Open]:
    opened = []

    def make(**training: bool) -> Stores:
        settings = Settings(store=StoreSettings(path=tmp_path), training=TrainingSettings(**training))
        opened.append(open_stores(settings, clock))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def end_job(stores: Stores, job_id: str, reason: str = "TRAINING_DIVERGED", samples: int = 1) -> JobRecord:
    """Queue, train and fail a job, with three events of progress."""
    stores.jobs.create(NewJob(job_id, "acme", small_spec(), "fox", "Fox", {}), tenant_limit=99)
    claimed = stores.jobs.claim("worker", 1e9)
    assert claimed is not None
    for step in range(3):
        stores.jobs.progress(claimed.lease, step, 0.5, 0.1)
    for step in range(samples):
        stores.jobs.sample(claimed.lease, step, "a fox", b"png")
    return stores.jobs.fail(claimed.lease, reason, "why")


def publish(stores: Stores, seed: int, adapter_id: str = "fox") -> str:
    adapter, data = small_file(seed)
    return stores.adapters.publish("acme", adapter_id, "", {}, data, adapter).content_hash


def numbers(stores: Stores, adapter_id: str = "fox") -> list[int]:
    query = select(revisions.c.revision).where(revisions.c.adapter_id == adapter_id).order_by(revisions.c.revision)
    with stores.database.read() as connection:
        return list(connection.scalars(query))


def test_progress_goes_a_few_at_a_time_and_the_end_of_a_watch_stays(
    stores: Stores, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = end_job(stores, "ft-old")
    clock.advance(100)
    end_job(stores, "ft-new")
    clock.advance(1)
    monkeypatch.setattr(housekeeping, "AT_ONCE", {**housekeeping.AT_ONCE, "events": 3})
    told: list[tuple[str, int]] = []
    removed = clean(stores, clock, Keeping(events=100), swept=lambda kind, count: told.append((kind, count)))
    assert removed == {"samples": 1, "events": 4}
    assert told == [("samples", 1), ("events", 3), ("events", 1)]
    old = stores.jobs.events("ft-old")
    assert [event.kind for event in old] == [EventKind.STATE] * 3
    # A watch ends at the event that has the job's own number.
    assert old[-1].sequence == ended.sequence
    assert len(stores.jobs.events("ft-new")) == 7
    assert clean(stores, clock, Keeping(events=100)) == {}


def test_ended_jobs_go_with_their_events_unless_they_can_be_retried(stores: Stores, clock: FakeClock) -> None:
    for job_id, reason in (("ft-old", "TRAINING_DIVERGED"), ("ft-retry", "ATTEMPTS_EXHAUSTED")):
        end_job(stores, job_id, reason)
    stores.jobs.create(NewJob("ft-waits", "acme", small_spec(), "fox", "Fox", {}), tenant_limit=99)
    clock.advance(101)
    removed = clean(stores, clock, Keeping(jobs=100, failed=1000))
    assert removed["jobs"] == 1
    with pytest.raises(NotFound):
        stores.jobs.get("acme", "ft-old")
    with stores.database.read() as connection:
        left = set(connection.scalars(select(job_events.c.job_id).distinct()))
    assert left == {"ft-retry", "ft-waits"}
    clock.advance(1000)
    assert clean(stores, clock, Keeping(jobs=100, failed=1000))["jobs"] == 1
    assert [job.job_id for job in stores.jobs.list_jobs("acme", 9)] == ["ft-waits"]


def test_kept_pictures_go_with_the_row_of_their_job(on_sqlite: Open, clock: FakeClock, tmp_path: Path) -> None:
    stores = on_sqlite(keep_pictures=True)
    for job_id in ("ft-swept", "ft-orphan", "ft-kept"):
        staged = stores.folders.stage()
        (staged / "pictures" / "000.png").write_bytes(b"png")
        stores.folders.adopt(staged, job_id)
        if job_id != "ft-orphan":
            end_job(stores, job_id)
            clock.advance(100)
    # The sweep of folders leaves what has a job, and takes what a crash left without one.
    assert stores.folders.sweep(stores.jobs.kept_jobs(), 0.0) == 3
    assert {folder.name for folder in (tmp_path / "jobs").iterdir()} == {"ft-swept", "ft-kept"}
    clean(stores, clock, Keeping(jobs=150))
    assert [folder.name for folder in (tmp_path / "jobs").iterdir()] == ["ft-kept"]
    assert stores.folders.pictures("ft-kept")


def test_an_adapter_keeps_its_newest_revisions_and_their_files(stores: Stores, clock: FakeClock) -> None:
    hashes = [publish(stores, seed) for seed in range(5)]
    publish(stores, 0, "other")
    clock.advance(3600)
    removed = clean(stores, clock, Keeping(revisions=RevisionRule(most=2)))
    assert (numbers(stores), removed["revisions"]) == ([4, 5], 3)
    # The file that another adapter has too stays.
    files = {entry.content_hash for entry in stores.adapters._blobs.entries()}
    assert files == {hashes[0], hashes[3], hashes[4]}
    assert removed["bytes"] == 2 * len(small_file(1)[1])
    # Numbers are never given twice, and a removed one is told apart from one that is to come.
    with pytest.raises(NotFound, match="may have removed old ones") as caught:
        stores.adapters.revision("acme", "fox", 1)
    assert caught.value.reason is Reason.ADAPTER_REVISION_NOT_FOUND
    publish(stores, 9)
    assert numbers(stores) == [4, 5, 6]


def test_old_revisions_go_by_age_but_never_the_newest(stores: Stores, clock: FakeClock) -> None:
    for seed in range(3):
        publish(stores, seed)
        clock.advance(5000)
    removed = clean(stores, clock, Keeping(revisions=RevisionRule(seconds=9000)))
    assert (numbers(stores), removed["revisions"]) == ([3], 2)
    clock.advance(1e6)
    assert clean(stores, clock, Keeping(revisions=RevisionRule(seconds=9000))) == {}
    assert numbers(stores) == [3]


def test_what_a_request_may_be_using_stays(stores: Stores, clock: FakeClock) -> None:
    rule, used = Keeping(revisions=RevisionRule(most=1, unused=3600)), 2
    for seed in range(4):
        publish(stores, seed)
    # The third was the newest until now: a request that began with it may still wait for its file.
    clock.advance(3599)
    assert clean(stores, clock, rule) == {}
    stores.adapters.revision("acme", "fox", used)
    clock.advance(1)
    assert clean(stores, clock, rule)["revisions"] == 2
    assert numbers(stores) == [used, 4]
    # Naming it again and again is noted every few minutes, which is enough.
    for _ in range(12):
        clock.advance(300)
        stores.adapters.revision("acme", "fox", used)
    assert "revisions" not in clean(stores, clock, rule)
    clock.advance(3600)
    assert clean(stores, clock, rule)["revisions"] == 1


def test_many_adapters_are_gone_through_page_by_page(
    on_sqlite: Open, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = on_sqlite()
    for adapter_id in ("a", "b", "c", "d", "e"):
        for seed in range(4):
            publish(stores, seed, adapter_id)
    clock.advance(3600)
    monkeypatch.setattr(housekeeping, "AT_ONCE", {**housekeeping.AT_ONCE, "adapters": 2, "revisions": 2})
    assert clean(stores, clock, Keeping(revisions=RevisionRule(most=1)))["revisions"] == 15
    assert [numbers(stores, adapter_id) for adapter_id in ("a", "e")] == [[4], [4]]


def test_one_server_cleans_at_a_time(stores: Stores, clock: FakeClock) -> None:
    end_job(stores, "ft-old")
    clock.advance(101)
    keeping = Keeping(jobs=100)
    with stores.database.write() as connection:
        assert take_turn(connection, "housekeeping", "another", 300.0)
    assert clean(stores, clock, keeping) == {}
    # One that was killed loses its turn.
    clock.advance(301)
    assert clean(stores, clock, keeping)["jobs"] == 1
    end_job(stores, "ft-next")
    clock.advance(101)
    assert clean(stores, clock, keeping, rest=200.0) == {}
    assert clean(stores, clock, keeping, rest=100.0)["jobs"] == 1
    with stores.database.write() as connection:
        assert take_turn(connection, "housekeeping", "another", 300.0)
        end_turn(connection, "housekeeping", "nobody")
        assert not take_turn(connection, "housekeeping", "a third", 300.0)


def test_a_lost_turn_and_a_stopping_server_end_a_round(
    on_sqlite: Open, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, stop = on_sqlite(), threading.Event()
    for number in range(4):
        end_job(stores, f"ft-{number}", samples=0)
    clock.advance(101)
    monkeypatch.setattr(housekeeping, "AT_ONCE", {**housekeeping.AT_ONCE, "jobs": 1})

    def steal(kind: str, _count: int) -> None:
        if kind == "jobs":
            clock.advance(301)
            with stores.database.write() as connection:
                assert take_turn(connection, "housekeeping", "another", 300.0)

    assert clean(stores, clock, Keeping(jobs=100), swept=steal)["jobs"] == 1
    clock.advance(301)
    assert clean(stores, clock, Keeping(jobs=100), swept=lambda kind, _: stop.set(), stop=stop)["jobs"] == 1
    assert len(stores.jobs.list_jobs("acme", 9)) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from hueshift.server.clock import SystemClock
from hueshift.server.housekeeping import Keeping, clean
from hueshift.server.settings import Settings, StoreSettings, TrainingSettings
from hueshift.server.store.retention import RevisionRule
from hueshift.server.store.stores import open_stores

class Later(SystemClock):
    def time(self):
        return super().time() + 1e6

settings = Settings(store=StoreSettings(path=Path(sys.argv[1])), training=TrainingSettings(keep_pictures=True))
stores = open_stores(settings, Later())
point = {"files": stores.adapters, "folder": stores.folders}[sys.argv[2]]
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
setattr(type(point), {"files": "discard_unused", "folder": "remove"}[sys.argv[2]], die)
clean(stores, Later(), Keeping(jobs=100, revisions=RevisionRule(most=1)))
"""


@pytest.mark.parametrize("point", ["files", "folder"])
def test_what_a_killed_sweep_left_is_found_by_the_next_one(
    on_sqlite: Open, clock: FakeClock, tmp_path: Path, point: str
) -> None:
    stores = on_sqlite(keep_pictures=True)
    if point == "files":
        for seed in range(3):
            publish(stores, seed)
    else:
        staged = stores.folders.stage()
        (staged / "pictures" / "000.png").write_bytes(b"png")
        stores.folders.adopt(staged, "ft-old")
        end_job(stores, "ft-old")
    killed = subprocess.run([sys.executable, "-P", "-c", KILLED, str(tmp_path), point], check=False)
    assert killed.returncode == -signal.SIGKILL
    # The rows are gone, what they named is not.
    assert len(list((tmp_path / "adapters").glob("??/*"))) == (3 if point == "files" else 0)
    assert (tmp_path / "jobs" / "ft-old").exists() == (point == "folder")
    assert numbers(stores) == ([3] if point == "files" else [])
    for file in (*(tmp_path / "adapters").glob("??/*"), *(tmp_path / "jobs").iterdir()):
        os.utime(file, (0, 0))
    clean(stores, clock, Keeping())
    stores.folders.sweep(stores.jobs.kept_jobs(), 60.0)
    assert len(list((tmp_path / "adapters").glob("??/*"))) == (1 if point == "files" else 0)
    assert not (tmp_path / "jobs" / "ft-old").exists()


def test_settings_say_what_stays() -> None:
    settings = Settings(
        server=ServerSettings(max_deadline_seconds=7200),
        retention=RetentionSettings(revisions=3, revisions_seconds=4, events_seconds=5, jobs_seconds=6),
        training=TrainingSettings(keep_samples_seconds=7, keep_failed_seconds=8),
    )
    # No call that named a revision lives for as long as that revision is kept.
    rule = RevisionRule(most=3, seconds=4, unused=14400)
    assert Keeping.of(settings) == Keeping(samples=7, events=5, jobs=6, failed=8, revisions=rule)
    assert Keeping.of(Settings()).revisions.unused == 3600


def test_old_events_and_jobs_are_found_by_an_index(on_sqlite: Open) -> None:
    asked = {
        "SELECT 1 FROM job_events WHERE kind != 'state' AND time < 5": "loose_events_by_age",
        "SELECT 1 FROM jobs WHERE ended < 5 ORDER BY ended": "jobs_by_end",
    }
    with on_sqlite().database.read() as connection:
        for query, index in asked.items():
            assert index in " ".join(map(str, connection.execute(text(f"EXPLAIN QUERY PLAN {query}"))))
