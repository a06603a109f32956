"""Adapter files on disk, named by their SHA-256. A file under its final name is whole: it gets that name by a rename.

Writing goes in two halves, so that the slow one needs no database lock: `stage` writes and syncs a temporary file,
`commit` renames it. A crash leaves a temporary file or a file without a row; the adapter store sweeps both.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hueshift.adapters.errors import InvalidArgument, Reason, ResourceExhausted

_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class StagedBlob:
    """A synced temporary file, waiting for its name."""

    content_hash: str
    size_bytes: int
    file: Path


@dataclass(frozen=True, slots=True)
class BlobEntry:
    """A file of the store and its age in seconds by the file system's clock."""

    content_hash: str
    size_bytes: int
    age: float


class BlobWriter:
    """A temporary file being written and hashed. `discard` it at the end, whatever happened."""

    def __init__(self, file: Path) -> None:
        self._path = file
        self._file = file.open("xb")
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, chunk: bytes | memoryview) -> None:
        """Append. Raises ResourceExhausted (STORE_FULL) when the disk is full."""
        with _disk_space():
            self._file.write(chunk)
        self._digest.update(chunk)
        self.size_bytes += len(chunk) if isinstance(chunk, bytes) else chunk.nbytes

    def finish(self) -> StagedBlob:
        """Sync and close the file, and return it with its hash. Raises ResourceExhausted as `write`."""
        with _disk_space(), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return StagedBlob(self._digest.hexdigest(), self.size_bytes, self._path)

    def discard(self) -> None:
        """Remove the file if it is still temporary."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(ResourceExhausted), _disk_space():
            # Closing writes what is buffered, which nobody needs any more.
            self._file.close()


class BlobStore:
    """A folder of files named by content. Safe for several threads and processes on one local disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.expanduser().resolve()
        self._temporary = self._folder / "tmp"
        self._temporary.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, data: bytes) -> str:
        """Store the bytes and return their SHA-256. Storing the same bytes again is harmless."""
        staged = self.stage(data)
        self.commit(staged)
        return staged.content_hash

    def writer(self) -> "BlobWriter":
        """Begin a temporary file that is written piece by piece, for uploads that should not fill the memory."""
        return BlobWriter(self._temporary / secrets.token_hex(16))

    def stage(self, data: bytes | Iterable[bytes | memoryview]) -> StagedBlob:
        """Write bytes, in one piece or in several, under a temporary name and sync them.

        Raises ResourceExhausted (STORE_FULL) when the disk is full.
        """
        writer = self.writer()
        try:
            for piece in (data,) if isinstance(data, bytes) else data:
                writer.write(piece)
            return writer.finish()
        except BaseException:
            writer.discard()
            raise

    def commit(self, staged: StagedBlob) -> None:
        """Give a staged file its final name. One already there is replaced, which also heals a damaged file."""
        target = self.path(staged.content_hash)
        if not target.parent.is_dir():
            target.parent.mkdir(mode=0o700, exist_ok=True)
            _sync_folder(self._folder)
        with _disk_space():
            staged.file.replace(target)
            _sync_folder(target.parent)

    def discard(self, staged: StagedBlob) -> None:
        """Remove a staged file that was not committed; harmless after `commit`."""
        staged.file.unlink(missing_ok=True)

    def path(self, content_hash: str) -> Path:
        """Return where a file of that hash lies or would lie. Raises InvalidArgument on a malformed hash."""
        if not _HASH.fullmatch(content_hash):
            raise InvalidArgument.for_field("content_hash", f"{content_hash[:80]!r} is not a SHA-256 in hexadecimal")
        return self._folder / content_hash[:2] / content_hash

    def open(self, content_hash: str) -> io.BufferedReader:
        """Open a stored file. It stays readable if it is deleted. Raises FileNotFoundError."""
        return self.path(content_hash).open("rb")

    def delete(self, content_hash: str) -> int:
        """Remove a file at once and return the bytes freed; 0 if there was none."""
        file = self.path(content_hash)
        try:
            size = file.stat().st_size
            file.unlink()
        except FileNotFoundError:
            return 0
        _sync_folder(file.parent)
        return size

    def entries(self) -> Iterator[BlobEntry]:
        """List every stored file, in no order. Files removed meanwhile are left out."""
        now = time.time()
        for shard in self._folder.iterdir():
            if len(shard.name) != 2 or not shard.is_dir():
                continue
            for file in shard.iterdir():
                try:
                    status = file.stat()
                except FileNotFoundError:
                    continue
                if _HASH.fullmatch(file.name):
                    yield BlobEntry(file.name, status.st_size, max(0.0, now - status.st_mtime))

    def sweep_temporaries(self, min_age: float) -> int:
        """Remove temporary files older than `min_age` seconds, left by a crash. Returns the bytes freed."""
        now = time.time()
        freed = 0
        for file in self._temporary.iterdir():
            try:
                status = file.stat()
                if now - status.st_mtime >= min_age:
                    file.unlink()
                    freed += status.st_size
            except FileNotFoundError:
                continue
        return freed


def _sync_folder(folder: Path) -> None:
    # A rename or a removal survives a power cut only once its folder is synced.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_space() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceExhausted(
            Reason.STORE_FULL, "the disk of the store is full; delete adapters or free space, then try again"
        ) from error
