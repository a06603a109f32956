"""What shall run on a Ray cluster: a list of actors, made from the settings alone.

An actor's name holds a fingerprint of the settings it was started with. A driver that comes back finds by name what it
started before, and an actor of other settings is one that is no longer wanted.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from hueshift.server.settings import Settings

PREFIX = "hueshift-"


class Pool(StrEnum):
    """Where an actor belongs: the value of the nodes' pool label."""

    SERVE = "serve"
    FINETUNE = "finetune"


@dataclass(frozen=True, slots=True)
class ActorSpec:
    """One actor: its process, and what Ray shall reserve for it. `settings` is the JSON given to the process."""

    name: str
    pool: Pool
    cpus: float
    gpus: float
    labels: Mapping[str, str]
    settings: str


def wanted_actors(settings: Settings) -> list[ActorSpec]:
    """Return the actors that `cluster.replicas` and `cluster.workers` ask for."""
    found = []
    for pool, count, gpus in (
        (Pool.SERVE, settings.cluster.replicas, settings.cluster.replica_gpus),
        (Pool.FINETUNE, settings.cluster.workers, settings.cluster.worker_gpus),
    ):
        told = _settings_for(pool, settings).model_dump_json()
        asked = f"{told} {gpus} {settings.cluster.actor_cpus} {settings.cluster.pool_label}"
        fingerprint = hashlib.sha256(asked.encode()).hexdigest()[:8]
        labels = {settings.cluster.pool_label: pool.value}
        for number in range(count):
            name = f"{PREFIX}{pool.value}-{number}-{fingerprint}"
            found.append(ActorSpec(name, pool, settings.cluster.actor_cpus, gpus, labels, told))
    return found


def _settings_for(pool: Pool, settings: Settings) -> Settings:
    # How many there are is no matter of each: scaling must not restart those that run.
    role = "replica" if pool is Pool.SERVE else "single"
    cluster = settings.cluster.model_copy(update={"role": role, "replicas": 0, "workers": 0})
    # Ray chooses the GPU; devices by number belong to a single machine.
    training = settings.training.model_copy(update={"workers": 0, "devices": ()})
    return settings.model_copy(update={"cluster": cluster, "training": training})
