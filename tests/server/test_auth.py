"""Credentials: what is accepted, what is cached, and for how long."""

import pytest

from hueshift.adapters.errors import Reason, Unauthenticated
from hueshift.server.auth import CACHE_SECONDS, Authenticator


class FakeClock:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


class FakeKeys:
    """Keys in memory, counting the reads."""

    def __init__(self, **tenants: str) -> None:
        self.tenants = tenants
        self.reads = 0

    def verify(self, secret: str) -> str | None:
        self.reads += 1
        return self.tenants.get(secret)

    def any(self) -> bool:
        self.reads += 1
        return bool(self.tenants)


def make(keys: FakeKeys, *, required: bool = False) -> tuple[Authenticator, FakeClock]:
    clock = FakeClock()
    return Authenticator(keys, clock, default_tenant="local", required=required), clock


async def test_keyless_is_the_default_tenant_until_the_first_key() -> None:
    keys = FakeKeys()
    authenticator, clock = make(keys)
    assert await authenticator.tenant([]) == "local"
    keys.tenants["hs_a"] = "acme"
    clock.now += CACHE_SECONDS
    with pytest.raises(Unauthenticated) as caught:
        await authenticator.tenant([])
    assert caught.value.reason is Reason.CREDENTIAL_MISSING
    assert await authenticator.tenant(["Bearer hs_a"]) == "acme"


async def test_required_refuses_keyless_calls_before_any_key_exists() -> None:
    authenticator, _ = make(FakeKeys(), required=True)
    with pytest.raises(Unauthenticated):
        await authenticator.tenant([])


async def test_a_revoked_key_stops_within_the_cache_time() -> None:
    keys = FakeKeys(hs_a="acme")
    authenticator, clock = make(keys)
    for _ in range(50):
        assert await authenticator.tenant(["Bearer hs_a"]) == "acme"
    assert keys.reads == 1
    del keys.tenants["hs_a"]
    clock.now += CACHE_SECONDS
    with pytest.raises(Unauthenticated) as caught:
        await authenticator.tenant(["Bearer hs_a"])
    assert caught.value.reason is Reason.CREDENTIAL_INVALID
    assert CACHE_SECONDS <= 1


@pytest.mark.parametrize(
    "values",
    [
        ["hs_a"],
        ["Basic hs_a"],
        ["Bearer "],
        ["Bearer wrong"],
        ["Bearer hs_a", "Bearer hs_a"],
        ["Bearer " + "x" * 5000],
        ["Bearer \ud800"],
    ],
)
async def test_wrong_credentials_are_refused_without_echo(values: list[str]) -> None:
    authenticator, _ = make(FakeKeys(hs_a="acme"))
    with pytest.raises(Unauthenticated) as caught:
        await authenticator.tenant(values)
    assert caught.value.reason is Reason.CREDENTIAL_INVALID
    assert "wrong" not in caught.value.message


async def test_the_cache_of_wrong_keys_is_bounded() -> None:
    authenticator, _ = make(FakeKeys(hs_a="acme"))
    for number in range(5000):
        with pytest.raises(Unauthenticated):
            await authenticator.tenant([f"Bearer hs_{number}"])
    assert len(authenticator._answers) == 4096
