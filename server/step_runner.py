"""One step of the chosen pictures: in the calls that cost least, and in smaller ones where those do not fit in memory.

Whatever happens, every picture has either taken its step or is told why not; the others of its batch are unharmed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import structlog

from hueshift.engines.denoise import advance, choose_plan
from hueshift.engines.device_errors import Fault, classify, release_memory
from hueshift.engines.fused_update import UpdateForm
from hueshift.engines.interface import MeasuredEngine, Plan, UNetEngine
from hueshift.engines.planner import Planner
from hueshift.engines.whole_rows import divide
from hueshift.server.clock import Clock
from hueshift.server.metrics import Metrics
from hueshift.server.pace import Size
from hueshift.server.ticket import Running

# Steps after which a size that did not fit is tried a little larger: whoever took the memory may have left.
_TRY_LARGER_AFTER = 512
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Stepped:
    """Pictures after a call: the plan that ran and its seconds, or what went wrong."""

    running: tuple[Running, ...]
    plan: Plan
    seconds: float
    error: Exception | None = None


class RowLimits:
    """UNet rows that fit in the device's memory, by latent size: `known` ones, and learned from what did not fit."""

    def __init__(self, max_batch: int, known: Mapping[Size, int] | None = None) -> None:
        self._max_batch = max_batch
        self._limits = {size: max(1, rows) for size, rows in (known or {}).items() if rows < max_batch}
        self._calm = dict.fromkeys(self._limits, 0)

    def __getitem__(self, size: Size) -> int:
        """Rows of one call."""
        return self._limits.get(size, self._max_batch)

    def too_many(self, size: Size, rows: int) -> None:
        """Count a call that did not fit."""
        self._limits[size] = max(1, min(self[size], rows) // 2)
        self._calm[size] = 0

    def ran(self, size: Size) -> None:
        """Count a call that did."""
        if size not in self._limits:
            return
        self._calm[size] += 1
        if self._calm[size] >= _TRY_LARGER_AFTER:
            self._calm[size] = 0
            self._limits[size] = min(self._limits[size] * 2, self._max_batch)
            if self._limits[size] == self._max_batch:
                del self._limits[size]


class StepRunner:
    """Takes steps on the engine. For the thread that runs it.

    When the engine changes its name, which it does when another one takes over, `find_planner` is asked again and the
    limits are those of the one that serves: what the other had room for says nothing about it.
    """

    def __init__(
        self,
        engine: UNetEngine,
        metrics: Metrics,
        clock: Clock,
        planner: Planner | None = None,
        find_planner: Callable[[], Planner | None] | None = None,
    ) -> None:
        self._engine, self._metrics, self._clock = engine, metrics, clock
        self._planner, self._find_planner, self._name = planner, find_planner, engine.name
        self.limits = self._known_limits()
        self._form = UpdateForm()

    @property
    def divides(self) -> bool:
        """True if what waits counts for how a batch is run."""
        self._follow()
        return self._planner is not None

    def step(self, chosen: Sequence[Running], waiting: Mapping[int, int]) -> list[Stepped]:
        """Advance pictures of one size by one step; each is in exactly one of the results.

        `waiting` has the steps of queued pictures by the slot that holds their mix.
        """
        done: list[Stepped] = []
        for plan, members in self._calls(chosen, waiting):
            for part in _parts(members, self.limits[chosen[0].size]):
                done += self._call(plan, part)
                if any(stepped.error is not None and classify(stepped.error) is Fault.LOST for stepped in done):
                    # Nothing will run any more; the loop ends everything.
                    return done
        return done

    def _follow(self) -> None:
        """Plan for the engine that serves now: another may have taken over in the last call."""
        if self._engine.name == self._name:
            return
        self._name = self._engine.name
        if self._find_planner is not None:
            self._planner = self._find_planner()
        self.limits = self._known_limits()

    def _known_limits(self) -> RowLimits:
        """What is known of the engine that serves, before anything did not fit."""
        if self._planner is not None:
            return RowLimits(self._engine.max_batch, self._planner.capacity)
        engine = self._engine
        return RowLimits(engine.max_batch, engine.capacity if isinstance(engine, MeasuredEngine) else None)

    def _calls(
        self, chosen: Sequence[Running], waiting: Mapping[int, int]
    ) -> Iterator[tuple[Plan | None, list[Running]]]:
        self._follow()
        if self._planner is None:
            for numbers in divide(self._engine, [running.sample.slot for running in chosen]):
                yield None, [chosen[number] for number in numbers]
            return
        decision = self._planner.decide([running.sample for running in chosen], waiting)
        if len(decision.runs) > 1:
            self._metrics.batch_splits.labels("cost").inc()
        for run in decision.runs:
            yield run.plan, [chosen[number] for number in run.members]

    def _call(self, plan: Plan | None, members: Sequence[Running]) -> list[Stepped]:
        samples = [running.sample for running in members]
        begin = self._clock.monotonic()
        found = plan or Plan.DENSE
        try:
            found = plan or choose_plan(self._engine, samples)
            advance(self._engine, samples, found, self._form)
        except Exception as error:
            self._follow()
            if classify(error) is not Fault.MEMORY:
                return [Stepped(tuple(members), found, 0.0, error)]
            return self._smaller(plan, found, members, error)
        self._follow()
        self.limits.ran(members[0].size)
        return [Stepped(tuple(members), found, self._clock.monotonic() - begin)]

    def _smaller(self, plan: Plan | None, found: Plan, members: Sequence[Running], error: Exception) -> list[Stepped]:
        """Try the halves of a batch that did not fit; pictures that must share a call stay together."""
        rows = _rows(members)
        halves = _parts(members, max(1, rows // 2))
        _log.warning("batch did not fit in memory", rows=rows, parts=len(halves), plan=found.value)
        if len(halves) == 1:
            return [Stepped(tuple(members), found, 0.0, error)]
        self._metrics.batch_splits.labels("memory").inc()
        self.limits.too_many(members[0].size, rows)
        # The error's traceback holds the tensors of the failed call.
        error.__traceback__ = None
        release_memory()
        return [stepped for half in halves for stepped in self._call(plan, half)]


def _parts(members: Sequence[Running], limit: int) -> list[list[Running]]:
    """Cut a batch into calls of at most `limit` rows, as few as first-fit gives; what shares attention stays whole."""
    bonds: dict[int, list[Running]] = {}
    for running in members:
        sample = running.sample
        bonds.setdefault(id(sample if sample.reference is None else sample.reference), []).append(running)
    parts: list[list[Running]] = []
    for bonded in bonds.values():
        room = next((part for part in parts if _rows(part) + _rows(bonded) <= limit), None)
        if room is None:
            parts.append(list(bonded))
        else:
            room.extend(bonded)
    return parts


def _rows(members: Sequence[Running]) -> int:
    return sum(running.sample.rows for running in members)
