"""The same stores on Postgres, where several hosts share them. Skips without psycopg or Postgres' own programs."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from postgres import free_port, fresh_database
from small_store import HandClock, SmallStore
from sqlalchemy import update

from hueshift.adapters.errors import FailedPrecondition, NotFound, Reason, Unavailable
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.blobs import BlobStore
from hueshift.server.store.database import Database, lock
from hueshift.server.store.idempotency import recall, remember
from hueshift.server.store.keys import KeyStore
from hueshift.server.store.tables import schema


@pytest.fixture
def url(postgres_server: str) -> str:
    """The URL of an empty database."""
    return fresh_database(postgres_server, "store")


@pytest.fixture
def hosts(url: str, tmp_path: Path) -> Iterator[list[SmallStore]]:
    """Four servers on one database and one folder."""
    clock, blobs = HandClock(1795157789.644136), BlobStore(tmp_path / "adapters")
    found: list[SmallStore] = []

    def join() -> None:
        database = Database(url, clock)
        found.append(SmallStore(tmp_path, clock, database, blobs, AdapterStore(database, blobs, clock)))

    # All of them meet at the empty database.
    at_once([join] * 4)
    yield found
    found[0].check()
    for host in found:
        host.database.close()


def at_once(works: list[Callable[[], object]]) -> None:
    """Run each in its own thread; raise what the first of them raised."""
    failures: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_adapters_live_as_on_sqlite(hosts: list[SmallStore]) -> None:
    store = hosts[0]
    assert [store.publish(job_id="j").revision, store.publish(seed=1).revision, store.publish(job_id="j").revision] == [
        1,
        2,
        1,
    ]
    store.adapters.update("acme", "fox", labels={"a.b/c": "q'\"", "x": "1"})
    assert len(store.adapters.list("acme", labels={"a.b/c": "q'\"", "x": "1"}).adapters) == 1
    assert store.adapters.list("acme", labels={"x": "2"}).adapters == ()
    for n in range(5):
        store.clock.now += 0.001
        store.publish(adapter_id=f"a{n}")
    seen, token = [], ""
    while True:
        page = store.adapters.list("acme", 2, token)
        seen += [record.adapter_id for record in page.adapters]
        token = page.next_token
        if not token:
            break
    assert seen == ["a4", "a3", "a2", "a1", "a0", "fox"]
    store.adapters.set_pinned("acme", "fox", True)
    assert [record.adapter_id for record in hosts[1].adapters.pinned()] == ["fox"]
    with pytest.raises(NotFound):
        store.adapters.revision("acme", "fox", 10**30)
    assert hosts[2].adapters.delete("acme", "fox").revisions == 2
    keys = KeyStore(store.database, store.clock)
    key_id, secret = keys.create("acme", "label")
    assert KeyStore(hosts[3].database, store.clock).verify(secret) == "acme"
    assert keys.revoke(key_id)


def test_hosts_publish_and_delete_equal_bytes_at_once(hosts: list[SmallStore]) -> None:
    def come_and_go(host: SmallStore, tenant: str) -> None:
        for _ in range(10):
            host.publish(tenant)
            host.adapters.open_file(host.adapters.revision(tenant, "fox").content_hash).close()
            host.publish("shared", "same", seed=3)
            host.adapters.delete(tenant, "fox")

    at_once([partial(come_and_go, host, f"tenant{n}") for n, host in enumerate(hosts)])
    assert hosts[0].adapters.get("shared", "same").revision == 40
    assert set(hosts[0].files()) == hosts[0].named()


def test_a_key_used_on_every_host_at_once_works_once(hosts: list[SmallStore]) -> None:
    done: list[int] = []

    def once(host: SmallStore, number: int) -> None:
        with host.database.write() as connection:
            if recall(connection, "acme", "Method", "key", "hash") is None:
                time.sleep(0.05)
                remember(connection, "acme", "Method", "key", "hash", {"number": number})
                done.append(number)

    at_once([partial(once, host, n) for n, host in enumerate(hosts)])
    assert len(done) == 1


def test_another_schema_and_an_absent_server_are_told_apart(hosts: list[SmallStore], url: str) -> None:
    with hosts[0].database.write() as connection:
        connection.execute(update(schema).values(version=9))
    with pytest.raises(FailedPrecondition, match="version 9") as wrong:
        Database(url, HandClock())
    assert wrong.value.reason is Reason.STORE_SCHEMA
    with pytest.raises(Unavailable) as absent:
        Database(f"postgresql+psycopg://hueshift@127.0.0.1:{free_port()}/store", HandClock())
    assert absent.value.reason is Reason.STORE_UNAVAILABLE


def test_a_lock_that_is_not_given_back_holds_nobody_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hueshift.server.store.database._BUSY_SECONDS", 0.3)
    one, two = Database(url, HandClock()), Database(url, HandClock())
    with one.write() as held:
        lock(held, "adapter/acme/fox")
        with pytest.raises(Unavailable) as refused, two.write() as waiting:
            lock(waiting, "adapter/acme/fox")
    assert refused.value.reason is Reason.STORE_UNAVAILABLE
    with two.write() as free:
        lock(free, "adapter/acme/fox")
    one.close()
    two.close()
