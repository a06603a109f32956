"""Weighted fair sharing between tenants, and priority within one.

Start-time fair queueing (Goyal et al. 1996): each tenant has a virtual time that grows by what it is given, divided by
its weight, and the tenant furthest behind goes first. A tenant that comes back from idling starts where the others
are, so nobody saves up credit; and one that used an idle machine alone owes nothing for it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")

# Tenants without items whose debts are kept: the step loop meets every tenant that ever asked, and few of them again.
_REMEMBERED = 1024
_FORGOTTEN_AT_ONCE = 8


@dataclass(slots=True)
class _Tenant(Generic[T]):
    weight: float
    virtual: float
    arrived: int
    items: list[tuple[int, int, T]] = field(default_factory=list)


class FairQueue(Generic[T]):
    """Items waiting, by tenant. For one thread.

    `weights` are the tenants' shares relative to one another; a tenant not named has 1. What it costs depends on the
    tenants with items alone, however many came before.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._waiting: dict[str, _Tenant[T]] = {}
        # In the order in which they became idle.
        self._idle: dict[str, _Tenant[T]] = {}
        self._floor = 0.0
        self._arrivals = 0
        self._items = 0

    def push(self, tenant: str, item: T, priority: int = 0) -> None:
        """Add an item: behind the tenant's items of the same or a larger priority, before those of a smaller one."""
        self._arrivals += 1
        share = self._waiting.get(tenant)
        if share is None:
            share = self._idle.pop(tenant, None) or _Tenant(self._weights.get(tenant, 1.0), self._floor, 0)
            share.virtual, share.arrived = max(share.virtual, self._floor), self._arrivals
            self._waiting[tenant] = share
        share.items.append((-priority, self._arrivals, item))
        share.items.sort(key=_rank)
        self._items += 1

    def remove(self, tenant: str, item: T) -> None:
        """Take an item out; one that is not there is ignored."""
        share = self._waiting.get(tenant)
        if share is None:
            return
        left = [entry for entry in share.items if entry[2] is not item]
        self._items -= len(share.items) - len(left)
        share.items = left
        if not left:
            self._idle[tenant] = self._waiting.pop(tenant)
            self._forget_idle()

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
        share = self._waiting.get(tenant) or self._idle.get(tenant)
        if share is None:
            return
        if cost > 0 and self._waiting:
            self._floor = max(self._floor, min(other.virtual for other in self._waiting.values()))
        share.virtual += cost / share.weight

    @property
    def tenants(self) -> int:
        """Tenants with items."""
        return len(self._waiting)

    def __len__(self) -> int:
        """Items in all."""
        return self._items

    def _in_order(self) -> list[_Tenant[T]]:
        return sorted(self._waiting.values(), key=_turn)

    def _forget_idle(self) -> None:
        """Forget who would start from the floor again anyway, the longest idle ones first, and who is one too many."""
        for name in list(islice(self._idle, _FORGOTTEN_AT_ONCE)):
            if self._idle[name].virtual > self._floor and len(self._idle) <= _REMEMBERED:
                return
            del self._idle[name]


def _rank(entry: tuple[int, int, T]) -> tuple[int, int]:
    return entry[0], entry[1]


def _turn(share: _Tenant[T]) -> tuple[float, int]:
    return share.virtual, share.arrived
