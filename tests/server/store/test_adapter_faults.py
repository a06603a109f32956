"""Failures at every point: each database statement, commit and file operation fails once, and rows and files agree."""

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_store import SmallStore, open_small_store
from sqlalchemy import event

from hueshift.adapters.errors import NotFound
from hueshift.server.store.blobs import BlobStore, BlobWriter, StagedBlob


class Fault(Exception):
    """The failure that a test orders."""


class FaultPlan:
    """Raises at the call of that number, counting every call; -1 never raises."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.calls = 0

    def __call__(self, *_: object) -> None:
        call, self.calls = self.calls, self.calls + 1
        if call == self.at:
            raise Fault(f"call {call}")


class FaultyBlobs(BlobStore):
    """Fails before and after each operation, as the plan says."""

    def __init__(self, folder: Path, plan: Callable[[], None]) -> None:
        super().__init__(folder)
        self._plan = plan

    def writer(self) -> BlobWriter:
        self._plan()
        return super().writer()

    def stage(self, data: bytes | Iterable[bytes | memoryview]) -> StagedBlob:
        staged = super().stage(data)
        self._plan()
        return staged

    def commit(self, staged: StagedBlob) -> None:
        self._plan()
        super().commit(staged)
        self._plan()

    def delete(self, content_hash: str) -> int:
        self._plan()
        freed = super().delete(content_hash)
        self._plan()
        return freed


@contextmanager
def faulty_store(folder: Path, plan: FaultPlan) -> Iterator[SmallStore]:
    store = open_small_store(folder, FaultyBlobs(folder / "adapters", plan))
    engine: Any = store.database._engine
    event.listen(engine, "before_cursor_execute", plan)
    event.listen(engine, "commit", plan)
    try:
        yield store
    finally:
        store.database.close()


def life(store: SmallStore) -> None:
    """Everything an adapter goes through; may be run again from its beginning."""
    store.publish(seed=0, job_id="job-1")
    store.publish("other", "fox", seed=0)
    store.publish(seed=1)
    store.adapters.update("acme", "fox", display_name="Foxy")
    store.adapters.set_pinned("acme", "fox", True)
    store.adapters.list("acme")
    store.adapters.delete("acme", "fox")
    store.adapters.sweep_orphans(0)


def count_calls(folder: Path) -> int:
    plan = FaultPlan(-1)
    with faulty_store(folder, plan) as store:
        life(store)
    return plan.calls


def test_every_call_fails_once_and_the_store_stays_consistent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No power cut here, so nothing has to reach the disk: a quarter of the time.
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    calls = count_calls(tmp_path / "count")
    assert calls > 50
    # Copied, because making the tables takes longer than the life of an adapter.
    open_small_store(tmp_path / "empty").database.close()
    for at in range(calls):
        folder = shutil.copytree(tmp_path / "empty", tmp_path / str(at))
        with faulty_store(folder, FaultPlan(at)) as store, pytest.raises(Fault):
            life(store)
        # A new process finds what the failure left.
        store = open_small_store(folder)
        store.check()
        store.adapters.sweep_orphans(0)
        assert set(store.files()) == store.named(), at
        assert store.temporaries() == [], at
        life(store)
        store.check()
        assert set(store.files()) == store.named(), at
        store.database.close()


def test_a_crash_between_file_and_row_leaves_an_orphan_that_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_small_store(tmp_path)
    kept = store.publish(seed=0)

    def crash(*_: object) -> None:
        raise Fault

    with monkeypatch.context() as patch:
        patch.setattr(type(store.adapters), "_write_adapter", crash)
        with pytest.raises(Fault):
            store.publish(seed=1)
    orphans = set(store.files()) - {kept.content_hash}
    assert len(orphans) == 1
    size = store.blobs.path(next(iter(orphans))).stat().st_size
    assert store.adapters.sweep_orphans(3600) == 0
    assert set(store.files()) == {kept.content_hash, *orphans}
    for content_hash in store.files():
        os.utime(store.blobs.path(content_hash), (0, 0))
    assert store.adapters.sweep_orphans(3600) == size
    assert set(store.files()) == {kept.content_hash}
    store.check()
    store.database.close()


def test_publishing_and_deleting_equal_bytes_at_once_never_loses_a_file(tmp_path: Path) -> None:
    store = open_small_store(tmp_path)
    failures: list[BaseException] = []

    def come_and_go(tenant: str) -> None:
        try:
            for _ in range(15):
                store.publish(tenant)
                store.adapters.open_file(store.adapters.revision(tenant, "fox").content_hash).close()
                store.adapters.delete(tenant, "fox")
                with pytest.raises(NotFound):
                    store.adapters.get(tenant, "fox")
        except BaseException as error:  # a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=come_and_go, args=(f"tenant{n}",)) for n in range(4)]
    # As a sweep does, without its patience.
    hashes = (store.publish("first").content_hash,)
    store.adapters.delete("first", "fox")
    threads.append(threading.Thread(target=lambda: [store.adapters.discard_unused(hashes) for _ in range(40)]))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.files() == {}
    store.check()
    store.database.close()
