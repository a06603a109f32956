"""The server's TLS certificate, read again when its files change: renewing it takes no restart."""

import ssl
import threading
from pathlib import Path
from typing import Any

import grpc
import structlog

from hueshift.adapters.errors import InvalidArgument, Reason

Stamp = tuple[tuple[int, int, int], ...]


class Certificates:
    """A certificate chain and its key, as PEM files. gRPC asks at every new connection, from threads of its own.

    Files that are being replaced, or that do not belong together, leave the pair in use as it is; the log says so once
    for each change of the files. Open connections keep the certificate they began with.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises InvalidArgument (SETTINGS_INVALID) where a file cannot be read, or both do not belong together."""
        self._files = (certificate.expanduser(), key.expanduser())
        self._lock = threading.Lock()
        try:
            self._served = self._seen = self._stamp()
            self._first = self._read()
        except ssl.SSLError as error:
            raise _invalid(f"{certificate} and {key} are not a PEM certificate chain and its key: {error}") from error
        except OSError as error:
            raise _invalid(f"{error.filename or certificate} cannot be read: {error.strerror or error}") from error

    def credentials(self) -> grpc.ServerCredentials:
        """Return what a port is opened with."""
        # None means no change; gRPC's own types leave that out.
        renewed: Any = self.renewed
        return grpc.dynamic_ssl_server_credentials(self._first, renewed)

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the pair of the files if they have changed since the last one was returned, else None."""
        log = structlog.get_logger()
        with self._lock:
            try:
                stamp = self._stamp()
                if stamp == self._served:
                    return None
                configuration = self._read()
                if self._stamp() != stamp:
                    # Replaced while they were read; the next connection looks again.
                    return None
            except (OSError, ssl.SSLError) as error:
                self._complain(error)
                return None
            self._served = self._seen = stamp
            log.info("certificate renewed", file=str(self._files[0]))
            return configuration

    def _complain(self, error: Exception) -> None:
        stamp = self._known_stamp()
        if stamp != self._seen:
            self._seen = stamp
            structlog.get_logger().error("certificate not renewed", file=str(self._files[0]), error=str(error))

    def _known_stamp(self) -> Stamp:
        try:
            return self._stamp()
        except OSError:
            return ()

    def _stamp(self) -> Stamp:
        # Links are followed: a mounted secret is replaced by turning a link.
        stats = [file.stat() for file in self._files]
        return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        certificate, key = self._files
        # gRPC would take files that do not belong together, and fail every handshake. A key with a passphrase would
        # ask for it at the terminal, so it is given an empty one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        return grpc.ssl_server_certificate_configuration([(key.read_bytes(), certificate.read_bytes())])


def _invalid(text: str) -> InvalidArgument:
    return InvalidArgument.for_field("server.tls_certificate", text, Reason.SETTINGS_INVALID)
