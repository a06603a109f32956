"""Idempotency keys: kept with the change, per tenant and method, and refused for another request."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_store import HandClock

from hueshift.adapters.errors import AlreadyExists, InvalidArgument, Reason
from hueshift.server.store.database import Database
from hueshift.server.store.idempotency import check_key, forget, hash_request, recall, remember


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "h.db", HandClock())
    yield database
    database.close()


def test_an_answer_is_recalled_by_its_key(database: Database) -> None:
    with database.write() as connection:
        assert recall(connection, "acme", "Import", "k", "h1") is None
        remember(connection, "acme", "Import", "k", "h1", {"revision": 3, "name": None})
    with database.write() as connection:
        assert recall(connection, "acme", "Import", "k", "h1") == {"revision": 3, "name": None}
        assert recall(connection, "acme", "Delete", "k", "h1") is None
        assert recall(connection, "other", "Import", "k", "h1") is None


def test_another_request_with_the_key_is_refused(database: Database) -> None:
    with database.write() as connection:
        remember(connection, "acme", "Import", "k", "h1", {})
    with pytest.raises(AlreadyExists, match="'k' was used") as caught, database.write() as connection:
        recall(connection, "acme", "Import", "k", "h2")
    assert caught.value.reason is Reason.IDEMPOTENCY_CONFLICT


def test_a_change_that_fails_forgets_its_answer(database: Database) -> None:
    def fail() -> None:
        with database.write() as connection:
            remember(connection, "acme", "Import", "k", "h1", {})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with database.write() as connection:
        assert recall(connection, "acme", "Import", "k", "h2") is None


def test_an_empty_key_means_none(database: Database) -> None:
    with database.write() as connection:
        for _ in range(2):
            remember(connection, "acme", "Import", "", "h1", {})
        assert recall(connection, "acme", "Import", "", "h1") is None


def test_old_answers_can_be_forgotten(tmp_path: Path) -> None:
    clock = HandClock(100.0)
    database = Database(tmp_path / "h.db", clock)
    with database.write() as connection:
        remember(connection, "acme", "Import", "old", "h", {})
    clock.now = 200.0
    with database.write() as connection:
        remember(connection, "acme", "Import", "new", "h", {})
        assert forget(connection, before=150.0) == 1
        assert recall(connection, "acme", "Import", "old", "other") is None
        assert recall(connection, "acme", "Import", "new", "h") == {}
    database.close()


def test_requests_hash_by_their_parts() -> None:
    assert hash_request([b"a", b"b"]) == hash_request(iter([b"a", b"b"]))
    assert len({hash_request(parts) for parts in ([b"ab"], [b"a", b"b"], [b"", b"ab"], [b"ab", b""], [])}) == 5


@pytest.mark.parametrize("key", ["x" * 65, "a\nb", "ключ", "\x00"])
def test_keys_are_short_and_printable(key: str) -> None:
    with pytest.raises(InvalidArgument, match="at most 64 printable"):
        check_key(key)
    assert check_key("x" * 64) == "x" * 64
    assert check_key("") == ""
