"""Where the server listens, and what that asks of its callers."""

import ipaddress
from dataclasses import dataclass

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.server.settings import ServerSettings

_UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a running server can be reached. `grpc` is a gRPC target, `metrics` a URL."""

    grpc: str
    metrics: str


@dataclass(frozen=True, slots=True)
class Bind:
    """The address to bind. `is_local`: only this machine can reach it (loopback or a unix socket)."""

    host: str
    port: int
    is_local: bool

    @property
    def is_unix(self) -> bool:
        """True for a unix socket."""
        return self.host.startswith(_UNIX)

    def target(self, port: int | None = None) -> str:
        """Return the gRPC address, with `port` in place of a port left to the system."""
        return self.host if self.is_unix else f"{bracket(self.host)}:{self.port if port is None else port}"


def read_bind(settings: ServerSettings) -> Bind:
    """Return where to bind. `server.host` is a name, an address, or `unix:/path/of/socket`."""
    host = settings.host.strip()
    if not host:
        raise InvalidArgument.for_field(
            "server.host", "empty; give an address such as 127.0.0.1 or 0.0.0.0", Reason.SETTINGS_INVALID
        )
    return Bind(host, settings.port, is_local=host.startswith(_UNIX) or is_loopback(host))


def is_loopback(host: str) -> bool:
    """True if `host` is localhost or a loopback address. Names are not looked up: they can change."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def bracket(host: str) -> str:
    """Return `host` as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def check_exposure(bind: Bind, settings: ServerSettings, *, keys_exist: bool) -> None:
    """Refuse to start where strangers could call. Raises InvalidArgument (SETTINGS_INVALID)."""
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise InvalidArgument.for_field(
            "server.tls_certificate",
            "a certificate and a key belong together; set both or neither of tls_certificate and tls_key",
            Reason.SETTINGS_INVALID,
        )
    if bind.is_local:
        return
    if not keys_exist:
        raise InvalidArgument.for_field(
            "server.host",
            f"{bind.host} can be reached from other machines and no API key exists; make one with "
            "'hueshift keys create TENANT', or bind to 127.0.0.1",
            Reason.SETTINGS_INVALID,
        )
    if settings.tls_certificate is None and not settings.allow_plaintext:
        raise InvalidArgument.for_field(
            "server.host",
            f"{bind.host} can be reached from other machines and TLS is off, so keys and pictures would travel in the "
            "clear; set server.tls_certificate and server.tls_key, or server.allow_plaintext behind a TLS proxy",
            Reason.SETTINGS_INVALID,
        )
