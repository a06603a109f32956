"""Adapter files in an object store, with a folder on this host's disk as a cache of them.

The object store is what counts. A file goes there first; a cached copy is checked against its name whenever it is
opened, so a damaged or missing one is fetched again. Copies of what was deleted elsewhere go with the next sweep.
"""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

from hueshift.server.store.blobs import BlobEntry, BlobStore, StagedBlob
from hueshift.server.store.objects import Objects

_PREFIX = "adapters"


class ObjectBlobs(BlobStore):
    """A BlobStore whose truth is in an object store. `folder` is its cache, which may be lost at any time."""

    def __init__(self, folder: Path, objects: Objects) -> None:
        super().__init__(folder)
        self._objects = objects

    def commit(self, staged: StagedBlob) -> None:
        """Upload a staged file under its hash, then keep it as the cached copy."""
        self._objects.put(_key(staged.content_hash), staged.file)
        super().commit(staged)

    def open(self, content_hash: str) -> io.BufferedReader:
        """Open the cached copy, fetched anew where it is missing or damaged. Raises FileNotFoundError."""
        path = self.path(content_hash)
        if not path.exists() or _digest(path) != content_hash:
            self._fetch(content_hash)
        return path.open("rb")

    def delete(self, content_hash: str) -> int:
        """Remove the object and the cached copy; return the bytes freed in the object store."""
        freed = self._objects.delete(_key(content_hash))
        super().delete(content_hash)
        return freed

    def entries(self) -> Iterator[BlobEntry]:
        """List every object, in no order."""
        for entry in self._objects.entries(_PREFIX):
            yield BlobEntry(entry.key.rpartition("/")[2], entry.size_bytes, entry.age)

    def sweep_temporaries(self, min_age: float) -> int:
        """Remove old temporary files, and cached copies of what the object store no longer has."""
        freed = super().sweep_temporaries(min_age)
        kept = {entry.content_hash for entry in self.entries()}
        stale = [copy for copy in super().entries() if copy.content_hash not in kept and copy.age >= min_age]
        return freed + sum(super(ObjectBlobs, self).delete(copy.content_hash) for copy in stale)

    def _fetch(self, content_hash: str) -> None:
        writer = self.writer()
        try:
            staged = writer.finish()
            self._objects.get(_key(content_hash), staged.file)
            super().commit(StagedBlob(content_hash, staged.file.stat().st_size, staged.file))
        finally:
            writer.discard()


def _key(content_hash: str) -> str:
    return f"{_PREFIX}/{content_hash[:2]}/{content_hash}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
