"""Where everything of one deployment lies under its store folder. Server, workers and commands open it alike."""

from dataclasses import dataclass
from functools import partial

from hueshift.server.clock import Clock, SystemClock
from hueshift.server.job_folders import JobFolders
from hueshift.server.job_mirror import JobMirror
from hueshift.server.settings import Settings
from hueshift.server.store.adapter_store import AdapterStore
from hueshift.server.store.blobs import BlobStore
from hueshift.server.store.database import Database
from hueshift.server.store.job_quotas import JobQuotas
from hueshift.server.store.job_store import JobStore
from hueshift.server.store.object_blobs import ObjectBlobs
from hueshift.server.store.objects import Objects
from hueshift.server.store.retention import known_jobs
from hueshift.server.store.shared_clock import SharedClock
from hueshift.server.store.stored_bytes import StorageQuota


@dataclass(frozen=True, slots=True)
class Stores:
    """All stores, on one database."""

    database: Database
    adapters: AdapterStore
    jobs: JobStore
    folders: JobFolders

    def close(self) -> None:
        """Close the database connections."""
        self.database.close()


def open_stores(settings: Settings, clock: Clock) -> Stores:
    """Open, and on first use create, the stores of the settings. Raises as `Database`."""
    root = settings.store.path.expanduser()
    blobs, mirror = BlobStore(root / "adapters"), None
    if settings.store.objects_url:
        objects = Objects(settings.store.objects_url, settings.store.objects_endpoint)
        blobs, mirror = ObjectBlobs(root / "adapters", objects), JobMirror(objects)
    location = settings.store.database
    # A clock that is moved by hand stays as it is.
    if isinstance(location, str) and isinstance(clock, SystemClock):
        clock = SharedClock(clock)
    database = Database(location, clock)
    limits = settings.limits
    storage = StorageQuota(
        limits.tenant_stored_bytes,
        limits.tenant_stored_bytes_of,
        settings.training.keep_failed_seconds,
        settings.training.keep_pictures,
    )
    quotas = JobQuotas(limits.tenant_running_jobs, limits.tenant_training_seconds, limits.tenant_weights, storage)
    return Stores(
        database=database,
        adapters=AdapterStore(database, blobs, clock, storage),
        jobs=JobStore(
            database,
            clock,
            max_attempts=settings.training.max_attempts,
            quotas=quotas,
            keep_failed_seconds=settings.training.keep_failed_seconds,
        ),
        folders=JobFolders(
            root / "jobs",
            keep_pictures=settings.training.keep_pictures,
            mirror=mirror,
            known=partial(known_jobs, database),
        ),
    )
