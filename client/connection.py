"""How to reach a server: address, key, TLS and channel options, for either kind of client."""

import ipaddress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS of a channel, as PEM bytes.

    `ca` verifies the server; None takes the machine's own authorities. `certificate` and `key` prove the client to
    servers that ask for it. `server_name` is expected in the server's certificate instead of the address's host.
    """

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    server_name: str = ""


@dataclass(frozen=True, slots=True)
class Connection:
    """Everything needed to open a channel. Raises ValueError where a key would cross a network in the clear.

    `allow_plaintext` permits that, for networks that encrypt by themselves.
    """

    address: str = DEFAULT_ADDRESS
    api_key: str | None = field(default=None, repr=False)
    tls: Tls | None = None
    allow_plaintext: bool = False
    max_message_bytes: int = 16 * MIB

    def __post_init__(self) -> None:
        """Refuse to send a key unencrypted to another machine."""
        if self.api_key and self.tls is None and not self.allow_plaintext and not is_loopback(self.address):
            raise ValueError(
                f"an API key would travel unencrypted to {self.address}: give tls=Tls(...), or allow_plaintext=True "
                "if the network encrypts"
            )

    def open(self) -> grpc.Channel:
        """Open a channel for the sync client. Connects at the first call."""
        if self.tls is None:
            return grpc.insecure_channel(self.address, self._options())
        return grpc.secure_channel(self.address, self._credentials(self.tls), self._options())

    def open_async(self) -> grpc.aio.Channel:
        """Open a channel for the async client, bound to the running event loop."""
        if self.tls is None:
            return grpc.aio.insecure_channel(self.address, self._options())
        return grpc.aio.secure_channel(self.address, self._credentials(self.tls), self._options())

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what every call carries."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def _options(self) -> list[tuple[str, Any]]:
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.primary_user_agent", f"hueshift-client/{version('hueshift')}"),
            # A dead peer is noticed in 70 s while calls run, instead of never.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.ping_timeout_ms", 10_000),
            # gRPC waits up to 120 s between reconnects by default; a restarted server should be found at once.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5_000),
        ]
        if is_loopback(self.address):
            # A proxy of the environment cannot reach this machine's own loopback.
            options.append(("grpc.enable_http_proxy", 0))
        if self.tls is not None and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options

    @staticmethod
    def _credentials(tls: Tls) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)


def is_loopback(address: str) -> bool:
    """Return whether a gRPC target stays on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rsplit(":", 1)[0] if address.count(":") == 1 or "]" in address else address
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
