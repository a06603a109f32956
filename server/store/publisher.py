"""What the end of a job needs of the adapter store, so that neither store imports the other."""

from collections.abc import Mapping
from typing import Protocol

from sqlalchemy import Connection

from hueshift.adapters.adapter import Adapter


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
        data: bytes,
        adapter: Adapter,
        job_id: str = "",
        connection: Connection | None = None,
    ) -> PublishedRevision:
        """Add a revision in the caller's transaction."""
        ...
