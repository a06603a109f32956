"""Where a key may travel."""

import pytest

from hueshift.client.connection import Connection, Tls, is_loopback


@pytest.mark.parametrize(
    "address", ["127.0.0.1:50051", "localhost:1", "[::1]:50051", "127.3.2.1:9", "unix:/run/h.sock", "localhost"]
)
def test_loopback(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["db:50051", "10.0.0.1:50051", "[2001:db8::1]:50051", "127.0.0.1.evil.com:1"])
def test_not_loopback(address: str) -> None:
    assert not is_loopback(address)


def test_a_key_never_crosses_a_network_in_the_clear_by_accident() -> None:
    with pytest.raises(ValueError, match=r"db:50051.*allow_plaintext"):
        Connection("db:50051", api_key="hs_secret")
    assert Connection("db:50051", api_key="hs_secret", allow_plaintext=True).metadata()
    assert Connection("db:50051", api_key="hs_secret", tls=Tls()).metadata()
    assert Connection("127.0.0.1:1", api_key="hs_secret").metadata() == (("authorization", "Bearer hs_secret"),)
    assert Connection("db:50051").metadata() == ()


def test_a_key_is_not_printed() -> None:
    assert "hs_secret" not in repr(Connection("127.0.0.1:1", api_key="hs_secret"))
    assert "PRIVATE" not in repr(Tls(key=b"PRIVATE"))
