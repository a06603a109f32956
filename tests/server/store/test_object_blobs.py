"""Adapter files and job files in an object store: two hosts, each with a folder of its own, see the same."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from PIL import Image
from small_store import HandClock, SmallStore
from tiny_s3 import TinyS3, run_tiny_s3

from hueshift.adapters.errors import InvalidArgument, NotFound, Reason, Unavailable
from hueshift.server.job_folders import JobFolders
from hueshift.server.job_mirror import JobMirror
from hueshift.server.settings import load_settings
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.database import Database
from hueshift.server.store.object_blobs import ObjectBlobs
from hueshift.server.store.objects import Objects
from hueshift.server.store.stores import open_stores

pytest.importorskip("obstore", reason="obstore is not installed (pip install 'hueshift[s3]')")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyS3]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_REGION", "local")
    with run_tiny_s3() as server:
        yield server


@pytest.fixture(params=["folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "folder":
        return Objects((tmp_path / "objects").as_uri())
    return Objects("s3://bucket/prefix", request.getfixturevalue("s3").endpoint)


@pytest.fixture
def hosts(objects: Objects, tmp_path: Path) -> Iterator[list[SmallStore]]:
    clock = HandClock()
    database = Database(tmp_path / "h.db", clock)
    found = []
    for name in "ab":
        blobs = ObjectBlobs(tmp_path / name / "adapters", objects)
        found.append(SmallStore(tmp_path / name, clock, database, blobs, AdapterStore(database, blobs, clock)))
    yield found
    database.close()


def test_what_one_host_publishes_the_other_reads(hosts: list[SmallStore], objects: Objects) -> None:
    one, two = hosts
    record = one.publish()
    assert [entry.key.rpartition("/")[2] for entry in objects.entries("adapters")] == [record.content_hash]
    with two.adapters.open_file(record.content_hash) as file:
        data = file.read()
    assert data == one.files()[record.content_hash].read_bytes()
    assert two.temporaries() == []
    # From now on from its own disk; a damaged copy is fetched again.
    two.files()[record.content_hash].write_bytes(b"damaged")
    with two.adapters.open_file(record.content_hash) as file:
        assert file.read() == data


def test_what_one_host_deletes_is_gone_for_the_other(hosts: list[SmallStore], objects: Objects) -> None:
    one, two = hosts
    record = one.publish()
    kept = one.publish(seed=1)
    two.adapters.open_file(record.content_hash).close()
    two.adapters.open_file(kept.content_hash).close()
    one.adapters.delete("acme", "fox")
    assert list(objects.entries("adapters")) == []
    other = one.publish(adapter_id="owl", seed=1)
    assert other.content_hash == kept.content_hash
    two.adapters.sweep_orphans(0.0)
    assert set(two.files()) == {kept.content_hash}
    with pytest.raises(NotFound):
        two.adapters.open_file(record.content_hash)


def test_orphans_of_a_crash_are_swept_from_the_object_store(hosts: list[SmallStore], objects: Objects) -> None:
    one, _ = hosts
    orphan = one.blobs.stage(b"never named by a row")
    one.blobs.commit(orphan)
    kept = one.publish()
    assert one.adapters.sweep_orphans(1000.0) == 0
    assert one.adapters.sweep_orphans(0.0) == orphan.size_bytes
    assert [entry.key.rpartition("/")[2] for entry in objects.entries("adapters")] == [kept.content_hash]


def test_a_store_that_does_not_answer_is_unavailable_and_nothing_is_published(s3: TinyS3, tmp_path: Path) -> None:
    clock = HandClock()
    database = Database(tmp_path / "h.db", clock)
    blobs = ObjectBlobs(tmp_path / "adapters", Objects("s3://bucket", s3.endpoint))
    store = SmallStore(tmp_path, clock, database, blobs, AdapterStore(database, blobs, clock))
    s3.broken = True
    with pytest.raises(Unavailable) as refused:
        store.publish()
    assert refused.value.reason is Reason.STORE_UNAVAILABLE
    assert (store.named(), store.files(), store.temporaries()) == (set(), {}, [])
    s3.broken = False
    assert store.publish().revision == 1
    database.close()


def test_a_store_that_fails_is_tried_again_for_seconds_not_minutes(s3: TinyS3) -> None:
    # A publication holds its transaction meanwhile.
    store = Objects("s3://bucket", s3.endpoint)._store
    assert store.retry_config["retry_timeout"] <= timedelta(seconds=20)


def stage(folders: JobFolders, job_id: str) -> None:
    staged = folders.stage()
    for index in range(2):
        Image.new("RGB", (8 + index, 8)).save(JobFolders.staged_file(staged, index).target)
    Image.new("L", (8, 8)).save(JobFolders.staged_mask(staged, 1).target)
    folders.adopt(staged, job_id)


def checkpoint(folders: JobFolders, token: int, data: bytes) -> None:
    file = folders.work("ft-1") / "checkpoint.safetensors"
    file.write_bytes(data)
    folders.keep_checkpoint("ft-1", token, file)


def test_a_job_goes_on_at_another_host(objects: Objects, tmp_path: Path) -> None:
    mirror = JobMirror(objects)
    one, two = (JobFolders(tmp_path / name, mirror=mirror) for name in "ab")
    stage(one, "ft-1")
    stage(one, "ft-10")
    two.fetch("ft-1")
    sent = [path.read_bytes() for path in one.pictures("ft-1")]
    assert [path.read_bytes() for path in two.pictures("ft-1")] == sent
    assert len(sent) == 2
    assert set(two.masks("ft-1")) == set(one.masks("ft-1")) == {1}
    assert list(two.work("ft-1").iterdir()) == []
    checkpoint(one, 1, b"step 10")
    checkpoint(two, 2, b"step 20")
    # The first host, which lost the job, does not know yet.
    checkpoint(one, 1, b"step 12")
    one.fetch("ft-1")
    assert [file.read_bytes() for file in one.work("ft-1").iterdir()] == [b"step 20"]
    two.end("ft-1")
    assert {entry.key.split("/")[1] for entry in objects.entries("jobs")} == {"ft-10"}
    assert one.sweep({"ft-10"}, 0.0) == 1
    assert one.pictures("ft-10") != []
    assert one.sweep(set(), 1000.0) == 0
    assert one.sweep(set(), 0.0) == 1
    assert list(objects.entries("jobs")) == []


def test_pictures_are_kept_where_the_operator_wants_them(objects: Objects, tmp_path: Path) -> None:
    folders = JobFolders(tmp_path / "a", keep_pictures=True, mirror=JobMirror(objects))
    stage(folders, "ft-1")
    checkpoint(folders, 1, b"state")
    folders.end("ft-1")
    folders.sweep(set(), 0.0)
    assert sorted(entry.key.split("/")[2] for entry in objects.entries("jobs")) == ["masks", "pictures", "pictures"]


def test_the_settings_choose_it(tmp_path: Path) -> None:
    url = (tmp_path / "objects").as_uri()
    stores = open_stores(load_settings(None, store={"path": tmp_path / "a", "objects_url": url}), HandClock())
    stage(stores.folders, "ft-1")
    stores.close()
    assert len(list((tmp_path / "objects").rglob("*.png"))) == 3
    with pytest.raises(InvalidArgument, match="objects_url"):
        load_settings(None, store={"objects_url": "ftp://somewhere"})
