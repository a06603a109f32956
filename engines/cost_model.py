"""Which plans a batch runs under, from measured step times: one call for all, or several where that is cheaper.

A pure function of a table, the batch and what waits. It decides how the rows that are in the batch run, never which
rows those are: every picture of the batch takes its step whatever is chosen, so fairness stays the queue's matter.

dLoRA (Wu et al. 2024, OSDI) switches between merged and unmerged serving by credit; here the two can share a step, and
the credit is what the measured times and the steps still to come say.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from hueshift.engines.interface import BASE_SLOT, Plan

Size = tuple[int, int]

# A new way of running must save this share of a step: less is measuring noise, and changing has costs of its own.
HYSTERESIS = 0.05
# A merge must win back its own cost this many times over in the steps that are known to come: they may be cancelled.
MERGE_MARGIN = 1.5
# Plans that were not measured are taken for their nearest relative, this much slower.
_UNMEASURED = 1.5
_RELATIVES = {Plan.FULL: Plan.FACTORED, Plan.FACTORED: Plan.DENSE, Plan.MERGED: Plan.DENSE}
_RANK = {Plan.DENSE: 0, Plan.FACTORED: 1, Plan.FULL: 2}


class Division(StrEnum):
    """How the rows that are not merged share calls."""

    TOGETHER = "together"
    """One call, under the plan of the row that needs most."""

    GUIDED_APART = "guided_apart"
    """Rows that need the full plan run in a call of their own."""

    APART = "apart"
    """One call for each plan that some row needs."""


@dataclass(frozen=True)
class CostTable:
    """Measured milliseconds of one call by (plan, bucket of rows, latent size), and of one merge.

    `overhead_ms` is what a further call costs beside the UNet: packing, the sampler's update, launches.
    """

    step_ms: Mapping[tuple[Plan, int, Size], float]
    merge_ms: float = inf
    overhead_ms: float = 0.0
    _curves: dict[tuple[Plan, Size], list[tuple[int, float]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Sort the times of each plan and size by rows."""
        curves: dict[tuple[Plan, Size], list[tuple[int, float]]] = {}
        for (plan, rows, size), ms in sorted(self.step_ms.items()):
            curves.setdefault((plan, size), []).append((rows, ms))
        object.__setattr__(self, "_curves", curves)

    def ms(self, plan: Plan, rows: int, size: Size) -> float:
        """Milliseconds of a call of `rows`: those of the bucket that holds them, as the call is filled up to it.

        Beyond the largest bucket time grows with the rows; at a size that was not measured it is the nearest one's,
        scaled by area. infinity if nothing at all was measured.
        """
        sizes = [known for one, known in self._curves if one is plan]
        if not sizes:
            relative = _RELATIVES.get(plan)
            return inf if relative is None else self.ms(relative, rows, size) * _UNMEASURED
        nearest = min(sizes, key=lambda known: (abs(_area(known) - _area(size)), known))
        curve = self._curves[plan, nearest]
        at = bisect_left(curve, (rows, -inf))
        bucket, ms = curve[min(at, len(curve) - 1)]
        beyond = rows / bucket if at == len(curve) else 1.0
        return ms * beyond * _area(size) / _area(nearest)


@dataclass(frozen=True, slots=True)
class Member:
    """One picture of a batch: the slot of its mix, its UNet rows, the cheapest slab plan that can run it, the steps it
    still takes. `mergeable` is False where its rows need several slots or guides, and where it `needs` the merged plan,
    whose weights are there then: pictures of one such slot share a call, and nobody else does.
    """

    slot: int
    rows: int
    needs: Plan
    steps_left: int
    mergeable: bool = True


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits: steps of pictures by the slot that holds their mix already."""

    steps: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Style:
    """A way of running batches: how rows are divided, and the slots whose rows run merged."""

    division: Division = Division.TOGETHER
    merged: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Run:
    """One call: its plan, the numbers of its members in the batch, its milliseconds by the table."""

    plan: Plan
    members: tuple[int, ...]
    ms: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do at one step: `runs` cover the batch; `merge` is a slot whose weights to begin writing, or None.

    `together_ms` is what one call for all would take.
    """

    runs: tuple[Run, ...]
    style: Style
    merge: int | None
    together_ms: float

    @property
    def ms(self) -> float:
        """Milliseconds of all calls by the table."""
        return sum(run.ms for run in self.runs)

    def explain(self) -> str:
        """Say in words what was chosen and what the alternative costs."""
        calls = " + ".join(f"{run.plan} x{len(run.members)} {run.ms:.1f} ms" for run in self.runs)
        text = f"{calls} = {self.ms:.1f} ms; one call {self.together_ms:.1f} ms"
        return text if self.merge is None else f"{text}; begins to merge slot {self.merge}"


def choose(
    table: CostTable,
    size: Size,
    batch: Sequence[Member],
    backlog: Backlog | None = None,
    *,
    merged: frozenset[int] = frozenset(),
    merging: frozenset[int] = frozenset(),
    weight_slots: int = 0,
    before: Style | None = None,
) -> Decision:
    """Choose how a batch of one latent size takes its next step.

    `merged` are the slots whose weights are written, `merging` those being written, `weight_slots` how many can be.
    `before` is the style of the last step, which is kept unless another saves more than HYSTERESIS of it. Every member
    is in exactly one run.
    """

    def cost(style: Style) -> float:
        return sum(run.ms + table.overhead_ms for run in arrange(table, size, batch, style)) - table.overhead_ms

    best = min(_candidates(batch, merged, cost), key=cost)
    if before is not None:
        kept = Style(before.division, before.merged & merged)
        if cost(kept) * (1 - HYSTERESIS) <= cost(best):
            best = kept
    together = sum(run.ms for run in arrange(table, size, batch, Style()))
    # The base's own weights are always there and take no weight slot; those in use now must not be overwritten.
    room = weight_slots - len(best.merged - {BASE_SLOT}) - len(merging)
    started = merged | merging
    merge = _worth_merging(table, batch, backlog or Backlog(), started, best, cost) if room > 0 else None
    return Decision(arrange(table, size, batch, best), best, merge, together)


def arrange(table: CostTable, size: Size, batch: Sequence[Member], style: Style) -> tuple[Run, ...]:
    """The calls that `style` makes of a batch, in the order of their first members."""
    calls: dict[tuple[Plan, int | None], list[int]] = {}
    rest: list[int] = []
    for number, member in enumerate(batch):
        optional = member.mergeable and member.needs is not Plan.FULL and member.slot in style.merged
        if optional or member.needs is Plan.MERGED:
            calls.setdefault((Plan.MERGED, member.slot), []).append(number)
        else:
            rest.append(number)
    highest = _highest([batch[number] for number in rest]) if rest else Plan.DENSE
    for number in rest:
        needs = batch[number].needs
        if style.division is Division.TOGETHER:
            plan = highest
        elif style.division is Division.GUIDED_APART and needs is not Plan.FULL:
            plan = _highest([batch[other] for other in rest if batch[other].needs is not Plan.FULL])
        else:
            plan = needs
        calls.setdefault((plan, None), []).append(number)
    runs = [
        Run(plan, tuple(numbers), table.ms(plan, sum(batch[number].rows for number in numbers), size))
        for (plan, _), numbers in calls.items()
    ]
    return tuple(sorted(runs, key=lambda run: run.members[0]))


def _candidates(batch: Sequence[Member], merged: frozenset[int], cost: Callable[[Style], float]) -> list[Style]:
    """Every division, with the merged slots that make it cheaper, the one that helps most first."""
    present = {member.slot for member in batch if member.mergeable} & merged
    found = []
    for division in Division:
        style = Style(division)
        left = set(present)
        while left:
            slot = min(sorted(left), key=lambda one: cost(Style(division, style.merged | {one})))
            more = Style(division, style.merged | {slot})
            if cost(more) >= cost(style):
                break
            style = more
            left.remove(slot)
        found.append(style)
    return found


def _worth_merging(
    table: CostTable,
    batch: Sequence[Member],
    backlog: Backlog,
    started: frozenset[int],
    style: Style,
    cost: Callable[[Style], float],
) -> int | None:
    """The slot whose merge saves most over the steps to come, if that is more than it costs."""
    gains: dict[int, float] = {}
    now = cost(style)
    for slot in {member.slot for member in batch if member.mergeable} - started:
        steps = max(member.steps_left for member in batch if member.slot == slot) + backlog.steps.get(slot, 0)
        saved = now - cost(Style(style.division, style.merged | {slot}))
        gains[slot] = saved * steps - table.merge_ms * MERGE_MARGIN
    best = max(sorted(gains), key=lambda one: gains[one], default=None)
    return best if best is not None and gains[best] > 0 else None


def _highest(batch: Sequence[Member]) -> Plan:
    return max((member.needs for member in batch), key=lambda plan: _RANK[plan])


def _area(size: Size) -> int:
    return size[0] * size[1]
