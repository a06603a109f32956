"""The cost model at work for one engine: from samples to calls, remembering the last choice and starting merges."""

from collections.abc import Mapping, Sequence

import structlog

from hueshift.engines.cost_model import Backlog, CostTable, Decision, Member, Size, Style, choose
from hueshift.engines.denoise import Sample
from hueshift.engines.device_errors import Fault, classify
from hueshift.engines.interface import MergingEngine, Plan, UNetEngine, dense_in

_log = structlog.get_logger()


class Planner:
    """Decides how batches run on `engine`, step by step. For the thread that runs the engine.

    `capacity` has the UNet rows of one call that fit, by latent size, as far as that is known.
    """

    def __init__(self, engine: UNetEngine, table: CostTable, capacity: Mapping[Size, int] | None = None) -> None:
        self.capacity = dict(capacity or {})
        self._engine = engine
        self._table = table
        self._merging = engine if isinstance(engine, MergingEngine) and Plan.MERGED in engine.plans else None
        self._before: dict[Size, Style] = {}

    def decide(self, samples: Sequence[Sample], waiting: Mapping[int, int]) -> Decision:
        """Choose the calls of one step of samples of one size, and begin the merge that pays, if one does.

        `waiting` has the steps of queued pictures by the slot that their mix is in already.
        """
        size = (samples[0].latents.shape[-2], samples[0].latents.shape[-1])
        merging = self._merging
        decision = choose(
            self._table,
            size,
            members_of(self._engine, samples),
            Backlog(waiting),
            merged=merging.merged if merging else frozenset(),
            merging=merging.merging if merging else frozenset(),
            weight_slots=merging.weight_slots if merging else 0,
            before=self._before.get(size),
        )
        if decision.style != self._before.get(size):
            _log.debug("plan_changed", height=size[0], width=size[1], choice=decision.explain())
        self._before[size] = decision.style
        if merging and decision.merge is not None:
            # Those that this step reads count as used first, so that none of them makes room.
            self._merge(merging, (*sorted(decision.style.merged), decision.merge))
        return decision

    def _merge(self, engine: MergingEngine, slots: Sequence[int]) -> None:
        """Begin merges. Where one fails no more are begun: the pictures of all plans but that one go on as before."""
        try:
            for slot in slots:
                engine.merge(slot)
        except RuntimeError as error:
            if classify(error) is Fault.LOST:
                raise
            _log.error("merging_given_up", error=str(error).splitlines()[0])
            self._merging = None


def members_of(engine: UNetEngine, samples: Sequence[Sample]) -> list[Member]:
    """What the cost model knows of samples. Those that share attention must stay in one call, under the full plan."""
    shared = {id(sample.reference) for sample in samples if sample.reference is not None}
    # Asked once: looking whether an engine has such slots takes 6 us, and this runs at every step.
    dense = dense_in(engine)
    return [_member(engine, sample, dense, id(sample) in shared) for sample in samples]


def _member(engine: UNetEngine, sample: Sample, dense: frozenset[int], is_reference: bool) -> Member:
    left = sample.table.steps - sample.step
    if sample.slot in dense:
        return Member(sample.slot, sample.rows, Plan.MERGED, left, mergeable=False)
    guided = sample.lag is not None or sample.reference is not None or is_reference
    factored = any(part.needs_factored for part in sample.parts) or Plan.DENSE not in engine.plans
    needs = Plan.FULL if guided else Plan.FACTORED if factored else Plan.DENSE
    one_slot = len({part.slot for part in sample.parts}) == 1
    return Member(sample.slot, sample.rows, needs, left, mergeable=one_slot and not guided)
