"""What the end of a job needs of the adapter store, so that neither store imports the other."""

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeAlias

from sqlalchemy import Connection

from hueshift.adapters.adapter import Adapter
from hueshift.server.store.blobs import StagedBlob

AdapterFile: TypeAlias = bytes | StagedBlob
"""The bytes of an adapter's file, or the file itself, written before the transaction that others wait for."""


class PublishedRevision(Protocol):
    """What publishing gives back."""

    @property
    def revision(self) -> int:
        """Number of the revision within its adapter."""
        ...


class AdapterPublisher(Protocol):
    """The part of the adapter store that ends a job."""

    def publish(
        self,
        tenant: str,
        adapter_id: str,
        display_name: str,
        labels: Mapping[str, str],
        data: AdapterFile,
        adapter: Adapter,
        job_id: str = "",
        connection: Connection | None = None,
    ) -> PublishedRevision:
        """Add a revision in the caller's transaction."""
        ...

    def stage(self, pieces: Iterable[bytes | memoryview]) -> StagedBlob:
        """Write a file before that transaction."""
        ...

    def discard(self, staged: StagedBlob) -> None:
        """Remove a staged file that was not published."""
        ...
