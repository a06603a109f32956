"""Ray places our processes on nodes and starts them again elsewhere; this compares what is there with what shall be.

The actors are detached: they outlive this driver, and the next one finds them by name. Which jobs there are, who holds
them and which replicas take calls is in the database alone, so a driver, or Ray's head, that is away costs nothing but
the replacement of what dies meanwhile.
"""

import time
from collections.abc import Callable
from typing import Any

import structlog

from hueshift.adapters.errors import Reason, Unavailable
from hueshift.server.cluster.child import Child
from hueshift.server.cluster.placement import PREFIX, ActorSpec, wanted_actors
from hueshift.server.outages import Outage
from hueshift.server.settings import Settings
from hueshift.server.stop import StopFlag

_LOG = structlog.get_logger()
ROUND_SECONDS = 2.0
# How long an actor may take to answer; one that is being placed does not answer at all.
_ANSWER_SECONDS = 5.0


class NodeChild(Child):
    """A Child that asks Ray on which node it is. The class that Ray instantiates."""

    def __init__(self, name: str, pool: str, settings: str, gpus: float) -> None:
        import ray

        context = ray.get_runtime_context()
        super().__init__(name, pool, settings, gpus, context.get_node_id(), ray.util.get_node_ip_address())


class Driver:
    """Brings the actors of one namespace in line with the settings. `ray` is the module, connected."""

    def __init__(self, ray: Any, settings: Settings) -> None:
        self._ray = ray
        self._settings = settings
        self._leaving: dict[str, tuple[Any, float]] = {}

    def reconcile(self, *, down: bool = False) -> tuple[int, int, int]:
        """Create what is missing and let go what is not wanted; return how many were kept, created and let go.

        With `down` nothing is wanted.
        """
        wanted = {} if down else {spec.name: spec for spec in wanted_actors(self._settings)}
        present = {name for name in self._ray.util.list_named_actors() if name.startswith(PREFIX)}
        for name in sorted(wanted.keys() - present):
            self._create(wanted[name])
        for name in sorted(present - wanted.keys()):
            self._let_go(name)
        return len(wanted.keys() & present), len(wanted.keys() - present), len(present - wanted.keys())

    def statuses(self) -> list[dict[str, Any]]:
        """Return what each actor says, by name; `pid` is None for those that do not answer."""
        names = sorted(name for name in self._ray.util.list_named_actors() if name.startswith(PREFIX))
        asked = {}
        for name in names:
            try:
                asked[name] = self._ray.get_actor(name).status.remote()
            except ValueError:
                # It ended between the two calls.
                continue
        answers = list(asked.values())
        ready = self._ray.wait(answers, num_returns=len(answers), timeout=_ANSWER_SECONDS)[0] if answers else []
        return [self._answer(name, answer, answer in ready) for name, answer in asked.items()]

    def _answer(self, name: str, answer: Any, ready: bool) -> dict[str, Any]:
        if ready:
            try:
                status: dict[str, Any] = self._ray.get(answer)
                return status
            except self._ray.exceptions.RayError:
                _LOG.info("actor.no_answer", actor=name, exc_info=True)
        return {"name": name, "node": None, "pid": None, "starts": None}

    def _create(self, spec: ActorSpec) -> None:
        # Several at once, so that `status` answers while `stop` waits for a drain.
        actor = self._ray.remote(NodeChild).options(
            name=spec.name,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=4,
            num_cpus=spec.cpus,
            num_gpus=spec.gpus,
            label_selector=dict(spec.labels),
        )
        actor.remote(spec.name, spec.pool.value, spec.settings, spec.gpus)
        _LOG.info("actor.created", actor=spec.name, pool=spec.pool)

    def _let_go(self, name: str) -> None:
        """Ask an actor to stop, and kill it once it has, or once its time is over."""
        grace = self._settings.server.drain_seconds
        if name not in self._leaving:
            try:
                handle = self._ray.get_actor(name)
            except ValueError:
                return
            self._leaving[name] = (handle.stop.remote(grace), time.monotonic() + grace + _ANSWER_SECONDS)
            _LOG.info("actor.stopping", actor=name)
        stopped, deadline = self._leaving[name]
        ready, _ = self._ray.wait([stopped], timeout=0)
        if ready or time.monotonic() > deadline:
            try:
                self._ray.kill(self._ray.get_actor(name), no_restart=True)
            except ValueError:
                _LOG.info("actor.gone", actor=name)
            del self._leaving[name]


def connect(settings: Settings) -> Any:
    """Connect to the Ray cluster of the settings and return the module. Raises Unavailable (RAY_UNAVAILABLE)."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise Unavailable(Reason.RAY_UNAVAILABLE, "ray is not installed; pip install 'hueshift[ray]'") from error
    try:
        # Usage statistics would go to a host outside.
        ray.init(
            address=settings.cluster.ray_address,
            namespace=settings.cluster.namespace,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise Unavailable(
            Reason.RAY_UNAVAILABLE,
            f"no Ray cluster answers at cluster.ray_address {settings.cluster.ray_address!r}: {error}",
        ) from error
    return ray


def ray_error(ray: Any) -> type[Exception]:
    """Return the base of what Ray raises, which is no error of Python's own; with no Ray, one that nothing raises."""
    found: type[Exception] = Unavailable if ray is None else ray.exceptions.RayError
    return found


def run_driver(settings: Settings, stop: StopFlag, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Keep the cluster in line until `stop`. The actors stay. A cluster that is away is waited for."""
    driver: Driver | None = None
    ray: Any = None
    before: tuple[int, int, int] | None = None
    outage = Outage("cluster")
    while not stop.requested:
        try:
            if driver is None:
                ray = connect(settings)
                driver = Driver(ray, settings)
            done = driver.reconcile()
            if done != before:
                _LOG.info("cluster.reconciled", adopted=done[0], created=done[1], leaving=done[2])
            before = done
            outage.worked()
        except Unavailable as error:
            if error.reason is Reason.RAY_UNAVAILABLE and ray is None:
                raise
            outage.failed(error)
        except (ConnectionError, TimeoutError, RuntimeError, ray_error(ray)) as error:
            outage.failed(error)
            ray.shutdown()
            driver = None
        sleep(outage.pause(ROUND_SECONDS))
    if ray is not None:
        ray.shutdown()
