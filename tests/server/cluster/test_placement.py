"""What shall run where, and the driver that brings it about, over a Ray of a few lines."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from hueshift.adapters.errors import Reason, Unavailable
from hueshift.server.cluster.driver import Driver, connect, run_driver
from hueshift.server.cluster.placement import Pool, wanted_actors
from hueshift.server.settings import Settings, load_settings
from hueshift.server.stop import StopFlag


def settings(**cluster: Any) -> Settings:
    return load_settings(None, cluster=cluster)


def test_each_pool_gets_its_actors_with_their_devices_and_settings() -> None:
    chosen = load_settings(
        None,
        cluster={"replicas": 1, "workers": 2, "replica_gpus": 1, "worker_gpus": 0.5, "pool_label": "acme.io/pool"},
        engine={"device": "cuda:0"},
        training={"devices": ("cuda:1",)},
    )
    actors = wanted_actors(chosen)
    assert [(a.pool, a.gpus, dict(a.labels)) for a in actors] == [
        (Pool.SERVE, 1, {"acme.io/pool": "serve"}),
        (Pool.FINETUNE, 0.5, {"acme.io/pool": "finetune"}),
        (Pool.FINETUNE, 0.5, {"acme.io/pool": "finetune"}),
    ]
    replica, worker = (Settings.model_validate_json(actor.settings) for actor in actors[:2])
    assert (replica.cluster.role, replica.training.workers) == ("replica", 0)
    # Ray gives the device; those of a single machine mean nothing there.
    assert (worker.cluster.role, worker.training.devices) == ("single", ())


def test_names_change_with_the_settings_and_not_with_the_numbers() -> None:
    few = [actor.name for actor in wanted_actors(settings(workers=1))]
    assert [actor.name for actor in wanted_actors(settings(workers=3, replicas=1))][1:2] == few
    assert [actor.name for actor in wanted_actors(settings(workers=1, worker_gpus=1))] != few
    assert [
        actor.name for actor in wanted_actors(load_settings(None, cluster={"workers": 1}, training={"nice": 1}))
    ] != few
    # They are part of a lease's owner, of at most 64 characters with the node and a random end.
    assert all(len(name) <= 64 - 18 for name in few)


@dataclass
class FakeRay:
    """Named actors, and stops that end when the test says so."""

    actors: dict[str, Any] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    stopped: list[tuple[str, float]] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.util = SimpleNamespace(list_named_actors=lambda: [*self.actors, "of-somebody-else"])

    def remote(self, _kind: type) -> Any:
        return SimpleNamespace(options=self.options)

    def options(self, **options: Any) -> Any:
        def create(name: str, *_arguments: Any) -> None:
            self.created.append(options)
            self.add(name)

        return SimpleNamespace(remote=create)

    def add(self, name: str) -> None:
        def stop(grace: float) -> str:
            self.stopped.append((name, grace))
            return name

        self.actors[name] = SimpleNamespace(name=name, stop=SimpleNamespace(remote=stop))

    def get_actor(self, name: str) -> Any:
        if name not in self.actors:
            raise ValueError(name)
        return self.actors[name]

    def wait(self, references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        return [each for each in references if each in self.finished], []

    def kill(self, actor: Any, no_restart: bool) -> None:
        assert no_restart
        del self.actors[actor.name]


def test_a_driver_creates_what_is_missing_and_adopts_what_is_there() -> None:
    ray = FakeRay()
    asked = settings(workers=2, replicas=1, worker_gpus=1, replica_gpus=2)
    assert Driver(ray, asked).reconcile() == (0, 3, 0)
    assert [(o["lifetime"], o["max_restarts"], o["num_gpus"], o["label_selector"]) for o in ray.created] == [
        ("detached", -1, 1, {"hueshift-pool": "finetune"}),
        ("detached", -1, 1, {"hueshift-pool": "finetune"}),
        ("detached", -1, 2, {"hueshift-pool": "serve"}),
    ]
    # Another driver, after the first one is gone; and one of three dies for good.
    assert Driver(ray, asked).reconcile() == (3, 0, 0)
    ray.actors.popitem()
    assert Driver(ray, asked).reconcile() == (2, 1, 0)


def test_what_is_not_wanted_drains_before_it_is_removed() -> None:
    ray = FakeRay()
    driver = Driver(ray, settings(workers=2))
    driver.reconcile()
    gone = sorted(ray.actors)[1]
    driver = Driver(ray, settings(workers=1))
    for _ in range(3):
        assert driver.reconcile() == (1, 0, 1)
    assert ray.stopped == [(gone, 60.0)]
    ray.finished.add(gone)
    driver.reconcile()
    assert gone not in ray.actors
    assert driver.reconcile() == (1, 0, 0)
    assert driver.reconcile(down=True)[2] == 1


def test_without_a_cluster_the_driver_says_so() -> None:
    pytest.importorskip("ray", reason="ray is not installed (pip install 'hueshift[ray]')")
    with pytest.raises(Unavailable, match="no Ray cluster answers") as refused:
        connect(settings(ray_address="auto"))
    assert refused.value.reason is Reason.RAY_UNAVAILABLE
    stop = StopFlag()
    stop.request()
    run_driver(settings(), stop)
