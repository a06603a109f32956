"""Processes that share a database and lose leases all the time: no job is held twice, none is published twice."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from postgres import fresh_database
from small_jobs import small_spec
from sqlalchemy import select

from hueshift.server.clock import SystemClock
from hueshift.server.store.database import Database
from hueshift.server.store.job_records import JobState, NewJob
from hueshift.server.store.job_store import JobStore
from hueshift.server.store.tables import revisions

JOBS, SERVERS = 24, 3
# Takes jobs and, for every third, falls silent until its lease has run out; then it tries to publish all the same.
SERVER = """
import json, random, sys, time
from pathlib import Path
from small_jobs import SMALL_ADAPTER
from hueshift.adapters.errors import HueshiftError
from hueshift.server.clock import SystemClock
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.blobs import BlobStore
from hueshift.server.store.database import Database
from hueshift.server.store.job_store import JobStore

location, folder, name, seed = sys.argv[1:]
clock = SystemClock()
database = Database(location, clock)
jobs = JobStore(database, clock, max_attempts=1000)
adapters = AdapterStore(database, BlobStore(Path(folder)), clock)
dice = random.Random(int(seed))
told = {"claimed": [], "published": [], "refused": 0}
while jobs.open_jobs():
    jobs.expire_leases()
    claimed = jobs.claim(name, 0.2)
    if claimed is None:
        time.sleep(0.01)
        continue
    told["claimed"].append([claimed.job.job_id, claimed.lease.token])
    if dice.random() < 1 / 3:
        time.sleep(0.3)
    try:
        data = f"{claimed.job.job_id} by {name}".encode()
        jobs.publish(claimed.lease, adapters, data, SMALL_ADAPTER, None)
        told["published"].append([claimed.job.job_id, claimed.lease.token])
    except HueshiftError as error:
        assert error.reason == "LEASE_LOST", error
        told["refused"] += 1
database.close()
print(json.dumps(told))
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_every_job_is_published_once_by_its_last_holder(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    location = str(tmp_path / "h.db")
    if kind == "postgres":
        location = fresh_database(request.getfixturevalue("postgres_server"), "shared")
    database = Database(location, SystemClock())
    jobs = JobStore(database, SystemClock())
    names = [f"ft-{number}" for number in range(JOBS)]
    for job_id in names:
        jobs.create(NewJob(job_id, "alice", small_spec(), job_id, job_id, {}), tenant_limit=JOBS)
    support = Path(__file__).resolve().parents[2] / "support"
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(support)!r})\n{SERVER}"]
    servers = [
        subprocess.Popen(
            [*command, location, str(tmp_path / "blobs"), f"server-{number}", str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(SERVERS)
    ]
    told = []
    for server in servers:
        out, _ = server.communicate(timeout=120)
        assert server.returncode == 0
        told.append(json.loads(out))

    claimed = Counter((job_id, token) for each in told for job_id, token in each["claimed"])
    published = Counter(job_id for each in told for job_id, _ in each["published"])
    # A token is given out once, whoever asks at the same time; and leases were lost, or this would show nothing.
    assert set(claimed.values()) == {1}
    assert sum(each["refused"] for each in told) > 0
    assert published == Counter(names)
    last = {job_id: max(token for other, token in claimed if other == job_id) for job_id in names}
    assert {(job_id, token) for each in told for job_id, token in map(tuple, each["published"])} == set(last.items())
    for job_id in names:
        job = jobs.get("alice", job_id)
        assert (job.state, job.revision, job.fencing_token) == (JobState.SUCCEEDED, 1, last[job_id])
    with database.read() as connection:
        assert len(connection.execute(select(revisions.c.job_id)).all()) == JOBS
    database.close()
