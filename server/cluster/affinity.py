"""Which replica draws for whom: the same adapters go to the same replica, whose slots hold them already.

Rendezvous hashing (Thaler and Ravishankar 1998): every replica gets a score from its id and the key, and the largest
wins, so a replica that comes or goes moves only its own share of the keys. With a bound on the load (Mirrokni et al.
2018): a replica whose load would pass `bound` times the mean is passed by for the next in the same order, so one loved
adapter spreads over as many replicas as it needs.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence


def ranked(key: str, replica_ids: Iterable[str]) -> list[str]:
    """Return the replicas in the order in which they are tried for the key."""
    return sorted(replica_ids, key=lambda replica_id: _score(key, replica_id), reverse=True)


def choose(key: str, loads: Mapping[str, int], cost: int, bound: float) -> str | None:
    """Return the replica for a call of so many pictures; None when there is no replica.

    `loads` are the pictures under way on each replica, by its id.
    """
    if not loads:
        return None
    most = math.ceil(bound * (sum(loads.values()) + cost) / len(loads))
    order = ranked(key, loads)
    return next((each for each in order if loads[each] + cost <= most), min(order, key=lambda each: loads[each]))


def affinity_key(tenant: str, adapters: Sequence[str]) -> str:
    """Return the key of a mix of adapters, given by resource names or ids, in any order; "" for the base model."""
    ids = sorted({name.rpartition("/")[2] for name in adapters})
    return "/".join((tenant, *ids)) if ids else ""


def _score(key: str, replica_id: str) -> bytes:
    return hashlib.blake2b(f"{key}\n{replica_id}".encode(), digest_size=8).digest()
