"""Files in an S3-compatible store, by key. A folder by file:// URL works alike, for tests and network shares.

Keys and region of AWS come from the environment that its own tools read (AWS_ACCESS_KEY_ID and so on).
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hueshift.adapters.errors import InvalidArgument, Reason, Unavailable

_RETRY_TIME = timedelta(seconds=15)


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """An object: its key, its size, its age in seconds by the store's clock and ours."""

    key: str
    size_bytes: int
    age: float


class Objects:
    """Objects under one URL. Synchronous, safe for several threads and hosts; a put is seen whole or not at all.

    Every method raises Unavailable (STORE_UNAVAILABLE) when the store does not answer.
    """

    def __init__(self, url: str, endpoint: str = "") -> None:
        """Open the store at `url`. Raises InvalidArgument (SETTINGS_INVALID) when obstore is missing or refuses it."""
        try:
            import obstore
            from obstore.store import from_url
        except ModuleNotFoundError as error:
            raise InvalidArgument.for_field(
                "store.objects_url", f"{url} needs obstore: pip install 'hueshift[s3]'", Reason.SETTINGS_INVALID
            ) from error
        options: dict[str, Any] = {"mkdir": True}
        if url.startswith("s3://"):
            # obstore's own is three minutes, for which a publication would hold its transaction.
            retries = {"max_retries": 10, "retry_timeout": _RETRY_TIME}
            options = {"client_options": {"allow_http": endpoint.startswith("http://")}, "retry_config": retries}
            if endpoint:
                options["endpoint"] = endpoint
        self._api: Any = obstore
        try:
            self._store: Any = from_url(url, **options)
        except (ValueError, obstore.exceptions.BaseError) as error:
            raise InvalidArgument.for_field(
                "store.objects_url", f"{url} cannot be opened: {error}", Reason.SETTINGS_INVALID
            ) from error

    def put(self, key: str, file: Path) -> None:
        """Store a file under a key, in place of what was there."""
        with self._translated():
            self._api.put(self._store, key, file, use_multipart=file.stat().st_size > 64 * 1024 * 1024)

    def get(self, key: str, file: Path) -> None:
        """Write an object to a file. Raises FileNotFoundError when there is none."""
        with self._translated(), file.open("wb") as target:
            for chunk in self._api.get(self._store, key).stream():
                target.write(bytes(chunk))

    def delete(self, key: str) -> int:
        """Remove an object and return its size; 0 if there was none."""
        with self._translated(), contextlib.suppress(FileNotFoundError):
            size = int(self._api.head(self._store, key)["size"])
            self._api.delete(self._store, key)
            return size
        return 0

    def entries(self, prefix: str) -> Iterator[ObjectEntry]:
        """List the objects whose keys begin with the folder `prefix`."""
        now = datetime.now(UTC)
        with self._translated():
            for page in self._api.list(self._store, prefix):
                for found in page:
                    age = max(0.0, (now - found["last_modified"]).total_seconds())
                    yield ObjectEntry(found["path"], found["size"], age)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._api.exceptions.BaseError as error:
            raise Unavailable(
                Reason.STORE_UNAVAILABLE, "the object store did not answer; try again", retry_after=1.0
            ) from error
