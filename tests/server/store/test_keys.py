"""API keys: random, shown once, and worth nothing in the database."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_store import HandClock

from hueshift.adapters.errors import InvalidArgument
from hueshift.server.store.database import Database
from hueshift.server.store.keys import KeyStore


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def keys(tmp_path: Path, clock: HandClock) -> Iterator[KeyStore]:
    database = Database(tmp_path / "h.db", clock)
    yield KeyStore(database, clock)
    database.close()


def test_a_key_names_its_tenant_until_it_is_revoked(keys: KeyStore, clock: HandClock) -> None:
    assert not keys.any()
    first_id, first = keys.create("acme", "build server")
    clock.now += 1
    second_id, second = keys.create("other")
    assert keys.any()
    assert (keys.verify(first), keys.verify(second)) == ("acme", "other")
    clock.now += 1
    assert keys.revoke(first_id)
    assert not keys.revoke(first_id)
    assert (keys.verify(first), keys.verify(second)) == (None, "other")
    assert [(k.key_id, k.tenant, k.label, k.created, k.revoked) for k in keys.list()] == [
        (first_id, "acme", "build server", 1000.0, 1002.0),
        (second_id, "other", "", 1001.0, None),
    ]
    assert keys.revoke(second_id)
    # Revoking the last key must not open the server.
    assert keys.any()


def test_secrets_are_long_different_and_not_stored(keys: KeyStore, tmp_path: Path) -> None:
    made = [keys.create("acme") for _ in range(20)]
    assert len({secret for _, secret in made}) == 20
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    for key_id, secret in made:
        random_part = secret.removeprefix(f"hs_{key_id}_")
        # 43 characters of base64 are 256 bits.
        assert len(random_part) == 43
        assert random_part.encode() not in stored
        assert key_id.encode() in stored
        assert secret not in repr(keys.list())


def test_anything_else_names_nobody(keys: KeyStore) -> None:
    key_id, secret = keys.create("acme")
    other_id, other = keys.create("acme")
    last = "A" if secret[-1] != "A" else "B"
    swapped = f"hs_{key_id}_{other.removeprefix(f'hs_{other_id}_')}"
    unknown = f"hs_{'0' * 16}_{secret[-43:]}"
    for wrong in ("", "hs_", key_id, secret[:-1], secret[:-1] + last, secret + "x", swapped, unknown, "hs_\ud800"):
        assert keys.verify(wrong) is None
    assert not keys.revoke("nonsense")
    assert not keys.revoke("0" * 16)


def test_wrong_tenants_and_labels_are_refused(keys: KeyStore) -> None:
    for tenant in ("", "Acme", "a/b", "x" * 64):
        with pytest.raises(InvalidArgument, match="tenant"):
            keys.create(tenant)
    for label in ("x" * 121, "a\nb"):
        with pytest.raises(InvalidArgument, match="label"):
            keys.create("acme", label)
    assert keys.list() == ()
