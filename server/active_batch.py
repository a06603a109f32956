"""The pictures being denoised, grouped by size, since one UNet call takes latents of one size."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hueshift.server.pace import Size
from hueshift.server.ticket import Running, Ticket

# Pictures of other sizes may start while a size has a full batch of its own, but no more than this many batches in all.
_BATCHES = 2


@dataclass(slots=True)
class _Group:
    virtual: float
    running: list[Running] = field(default_factory=list)
    rows: int = 0
    turn: int = 0


class ActiveBatch:
    """Samples that share the engine, at most `max_batch` UNet rows of a size and twice that in all. For one thread.

    `weights` are the tenants' shares relative to one another; a tenant not named has 1.
    """

    def __init__(self, max_batch: int, weights: Mapping[str, float] | None = None) -> None:
        self._max_batch = max_batch
        self._weights = dict(weights or {})
        self._groups: dict[Size, _Group] = {}
        self._rows = 0
        self._turns = 0

    def full(self) -> bool:
        """True if no picture at all fits."""
        return self._rows >= self._max_batch * _BATCHES

    def fits(self, rows: int, size: Size | None = None) -> bool:
        """True if `rows` more fit, in the group of `size` if given."""
        if size is not None:
            group = self._groups.get(size)
            if group is not None and group.rows + rows > self._max_batch:
                return False
        return self._rows + rows <= self._max_batch * _BATCHES

    def add(self, running: Running) -> None:
        """Let a picture join."""
        group = self._groups.get(running.size)
        if group is None:
            virtual = min((other.virtual for other in self._groups.values()), default=0.0)
            group = self._groups[running.size] = _Group(virtual)
        group.running.append(running)
        group.rows += running.rows
        self._rows += running.rows

    def remove(self, running: Running) -> None:
        """Take a picture out."""
        group = self._groups[running.size]
        group.running.remove(running)
        group.rows -= running.rows
        self._rows -= running.rows
        if not group.running:
            del self._groups[running.size]

    def choose(self) -> list[Running]:
        """Return the pictures whose turn it is.

        Sizes take turns by work done, in proportion to the tenants behind them: each counts with its weight in all, so
        spreading pictures over many sizes buys nobody a larger share.
        """
        if not self._groups:
            return []
        group = min(self._groups.values(), key=lambda group: (group.virtual, group.turn))
        self._turns += 1
        group.turn = self._turns
        return list(group.running)

    def charge(self, size: Size, work: float) -> None:
        """Count the work of one step of a size."""
        group = self._groups.get(size)
        if group is not None and len(self._groups) > 1:
            group.virtual += work / self._claim(group)

    def of(self, ticket: Ticket) -> list[Running]:
        """Return the pictures of a request."""
        group = self._groups.get(ticket.size)
        return [running for running in group.running if running.ticket is ticket] if group is not None else []

    @property
    def rows(self) -> int:
        """UNet rows of all pictures, those kept for a later phase too."""
        return self._rows

    def __len__(self) -> int:
        """Pictures."""
        return sum(len(group.running) for group in self._groups.values())

    def _claim(self, group: _Group) -> float:
        sizes: dict[str, int] = {}
        for other in self._groups.values():
            for tenant in {running.ticket.request.tenant for running in other.running}:
                sizes[tenant] = sizes.get(tenant, 0) + 1
        behind = {running.ticket.request.tenant for running in group.running}
        return sum(self._weights.get(tenant, 1.0) / sizes[tenant] for tenant in behind)
