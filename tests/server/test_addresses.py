"""Where the server may listen without keys or TLS."""

from pathlib import Path

import pytest

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.server.addresses import check_exposure, read_bind
from hueshift.server.settings import ServerSettings


@pytest.mark.parametrize(
    ("host", "target", "local"),
    [
        ("127.0.0.1", "127.0.0.1:50051", True),
        ("127.8.9.1", "127.8.9.1:50051", True),
        ("localhost", "localhost:50051", True),
        ("::1", "[::1]:50051", True),
        ("unix:/run/hueshift.sock", "unix:/run/hueshift.sock", True),
        ("0.0.0.0", "0.0.0.0:50051", False),
        ("::", "[::]:50051", False),
        ("example.org", "example.org:50051", False),
        ("127.0.0.1.example.org", "127.0.0.1.example.org:50051", False),
    ],
)
def test_targets_and_locality(host: str, target: str, local: bool) -> None:
    bind = read_bind(ServerSettings(host=host))
    assert (bind.target(), bind.is_local) == (target, local)


def test_strangers_need_keys_and_tls() -> None:
    pem = Path("certificate.pem")
    open_settings = ServerSettings(host="0.0.0.0")
    bind = read_bind(open_settings)
    with pytest.raises(InvalidArgument, match="hueshift keys create") as caught:
        check_exposure(bind, open_settings, keys_exist=False)
    assert caught.value.reason is Reason.SETTINGS_INVALID
    with pytest.raises(InvalidArgument, match="allow_plaintext"):
        check_exposure(bind, open_settings, keys_exist=True)
    check_exposure(bind, ServerSettings(host="0.0.0.0", allow_plaintext=True), keys_exist=True)
    check_exposure(bind, ServerSettings(host="0.0.0.0", tls_certificate=pem, tls_key=pem), keys_exist=True)


def test_half_of_a_certificate_is_refused() -> None:
    settings = ServerSettings(tls_key=Path("key.pem"))
    with pytest.raises(InvalidArgument, match="belong together"):
        check_exposure(read_bind(settings), settings, keys_exist=True)
    with pytest.raises(InvalidArgument):
        read_bind(ServerSettings(host=" "))
