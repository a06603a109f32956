"""The few calls of S3 that the object store makes, over a dictionary, on loopback. Signatures are not looked at."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class TinyS3(ThreadingHTTPServer):
    """A server of one bucket, called `bucket`. `broken` makes every call fail."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.broken = False

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: TinyS3
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        self.server.objects[self._key()] = self.rfile.read(int(self.headers["content-length"]))
        self._answer(200)

    def do_GET(self) -> None:
        if "list-type" in urlsplit(self.path).query:
            self._list()
        else:
            self._object(with_body=True)

    def do_HEAD(self) -> None:
        self._object(with_body=False)

    def do_POST(self) -> None:
        """Remove the objects that the body lists."""
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        keys = re.findall(r"<Key>(.*?)</Key>", body)
        for key in keys:
            self.server.objects.pop(key, None)
        rows = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self._answer(200, f"<DeleteResult>{rows}</DeleteResult>".encode(), with_body=True)

    def _object(self, with_body: bool) -> None:
        data = self.server.objects.get(self._key())
        if data is None:
            self._answer(404)
        else:
            self._answer(200, data, with_body)

    def _list(self) -> None:
        (prefix,) = parse_qs(urlsplit(self.path).query).get("prefix", [""])
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        rows = "".join(
            f"<Contents><Key>{key}</Key><LastModified>{now}</LastModified><Size>{len(data)}</Size></Contents>"
            for key, data in sorted(self.server.objects.items())
            if key.startswith(prefix)
        )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        self._answer(200, text.encode(), with_body=True)

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/bucket/")

    def _answer(self, status: int, data: bytes = b"", with_body: bool = False) -> None:
        self.send_response(403 if self.server.broken else status)
        self.send_header("content-length", str(len(data)))
        self.send_header("etag", f'"{hashlib.md5(data).hexdigest()}"')
        self.send_header("last-modified", format_datetime(datetime.now(UTC), usegmt=True))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def run_tiny_s3() -> Iterator[TinyS3]:
    """Run a server while the block runs."""
    server = TinyS3()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
