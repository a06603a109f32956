"""Weighted fair sharing between tenants, and priority within one.

Start-time fair queueing (Goyal et al. 1996): each tenant has a virtual time that grows by what it is given, divided by
its weight, and the tenant furthest behind goes first. A tenant that comes back from idling starts where the others
are, so nobody saves up credit; and one that used an idle machine alone owes nothing for it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Tenant(Generic[T]):
    weight: float
    virtual: float
    arrived: int
    items: list[tuple[int, int, T]] = field(default_factory=list)


class FairQueue(Generic[T]):
    """Items waiting, by tenant. For one thread.

    `weights` are the tenants' shares relative to one another; a tenant not named has 1.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._tenants: dict[str, _Tenant[T]] = {}
        self._floor = 0.0
        self._arrivals = 0

    def push(self, tenant: str, item: T, priority: int = 0) -> None:
        """Add an item: behind the tenant's items of the same or a larger priority, before those of a smaller one."""
        self._arrivals += 1
        share = self._tenants.get(tenant)
        if share is None:
            self._forget_idle()
            share = self._tenants[tenant] = _Tenant(self._weights.get(tenant, 1.0), self._floor, self._arrivals)
        elif not share.items:
            share.virtual, share.arrived = max(share.virtual, self._floor), self._arrivals
        share.items.append((-priority, self._arrivals, item))
        share.items.sort(key=_rank)

    def remove(self, tenant: str, item: T) -> None:
        """Take an item out; one that is not there is ignored."""
        share = self._tenants.get(tenant)
        if share is not None:
            share.items = [entry for entry in share.items if entry[2] is not item]

    def first(self, accept: Callable[[T], bool]) -> T | None:
        """Return the first item, in fair order, that `accept` accepts. It stays in the queue."""
        for share in self._in_order():
            for _, _, item in share.items:
                if accept(item):
                    return item
        return None

    def heads(self, depth: int) -> Iterator[T]:
        """Yield the first `depth` items of every tenant: all first ones in fair order, then all second ones."""
        shares = self._in_order()
        for rank in range(depth):
            for share in shares:
                if rank < len(share.items):
                    yield share.items[rank][2]

    def charge(self, tenant: str, cost: float) -> None:
        """Count what a tenant is given; a negative `cost` gives back what it did not use."""
        share = self._tenants.get(tenant)
        if share is None:
            return
        waiting = [other.virtual for other in self._tenants.values() if other.items]
        if cost > 0 and waiting:
            self._floor = max(self._floor, min(waiting))
        share.virtual += cost / share.weight

    @property
    def tenants(self) -> int:
        """Tenants with items."""
        return sum(1 for share in self._tenants.values() if share.items)

    def __len__(self) -> int:
        """Items in all."""
        return sum(len(share.items) for share in self._tenants.values())

    def _in_order(self) -> list[_Tenant[T]]:
        waiting = [share for share in self._tenants.values() if share.items]
        return sorted(waiting, key=lambda share: (share.virtual, share.arrived))

    def _forget_idle(self) -> None:
        # They would start from the floor again anyway.
        idle = [name for name, s in self._tenants.items() if not s.items and s.virtual <= self._floor]
        for name in idle:
            del self._tenants[name]


def _rank(entry: tuple[int, int, T]) -> tuple[int, int]:
    return entry[0], entry[1]
