"""A store in a temporary folder, a clock moved by hand, and the promise that rows and files agree."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from small_adapters import spectral_adapter
from sqlalchemy import func, select

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.file import write_adapter
from hueshift.server.store.adapter_records import RevisionRecord
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.blobs import BlobStore
from hueshift.server.store.database import Database
from hueshift.server.store.tables import adapters, revisions


class HandClock:
    """Stands still until it is moved."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@dataclass
class SmallStore:
    """An adapter store and what it is made of."""

    folder: Path
    clock: HandClock
    database: Database
    blobs: BlobStore
    adapters: AdapterStore

    def publish(self, tenant: str = "acme", adapter_id: str = "fox", seed: int = 0, job_id: str = "") -> RevisionRecord:
        """Publish the small spectral adapter of that seed."""
        adapter, data = small_file(seed)
        return self.adapters.publish(tenant, adapter_id, "", {}, data, adapter, job_id)

    def files(self) -> dict[str, Path]:
        """Every stored file by its name."""
        return {file.name: file for file in (self.folder / "adapters").glob("??/*")}

    def temporaries(self) -> list[Path]:
        """Every temporary file."""
        return list((self.folder / "adapters" / "tmp").iterdir())

    def named(self) -> set[str]:
        """The content hashes that rows name."""
        with self.database.read() as connection:
            return set(connection.execute(select(revisions.c.content_hash)).scalars())

    def check(self) -> None:
        """Every row has its whole file, and every adapter counts its revisions right."""
        files = self.files()
        for content_hash in self.named():
            assert hashlib.sha256(files[content_hash].read_bytes()).hexdigest() == content_hash
        with self.database.read() as connection:
            counted = connection.execute(
                select(
                    revisions.c.tenant, revisions.c.adapter_id, func.max(revisions.c.revision), func.count()
                ).group_by(revisions.c.tenant, revisions.c.adapter_id)
            ).all()
            rows = connection.execute(select(adapters.c.tenant, adapters.c.adapter_id, adapters.c.revision)).all()
        assert {(t, a): (newest, newest) for t, a, newest in rows} == {(t, a): (m, n) for t, a, m, n in counted}


def small_file(seed: int) -> tuple[Adapter, bytes]:
    """A small adapter and its file."""
    adapter = spectral_adapter(seed)
    return adapter, write_adapter(adapter)


def open_small_store(folder: Path, blobs: BlobStore | None = None) -> SmallStore:
    """Open the store in `folder`, making it if need be."""
    clock = HandClock()
    database = Database(folder / "hueshift.db", clock)
    blobs = blobs or BlobStore(folder / "adapters")
    return SmallStore(folder, clock, database, blobs, AdapterStore(database, blobs, clock))
