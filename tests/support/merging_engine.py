"""A fake engine with merged weights, and a clock that moves by what each call costs."""

from collections.abc import Callable

import torch
from fake_clock import FakeClock
from fake_engine import FakeEngine
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.cost_model import CostTable
from hueshift.engines.interface import BASE_SLOT, SLAB_PLANS, EngineRow, Plan


class MergingFakeEngine(FakeEngine):
    """Implements MergingEngine: a merge is done `merge_calls` calls after it began, as it runs beside the steps."""

    def __init__(self, table: CostTable, clock: FakeClock, *, weight_slots: int = 1, slots: int = 16) -> None:
        super().__init__(slots=slots)
        self.plans = (*SLAB_PLANS, Plan.MERGED)
        self.weight_slots = weight_slots
        self.merges: list[int] = []
        self._table, self._clock = table, clock
        self._ready: list[int] = []
        self._pending: dict[int, int] = {}

    @property
    def merged(self) -> frozenset[int]:
        """Slots whose weights are written."""
        return frozenset({BASE_SLOT, *self._ready})

    @property
    def merging(self) -> frozenset[int]:
        """Slots whose weights are being written."""
        return frozenset(self._pending)

    def merge(self, slot: int) -> None:
        """Begin one."""
        if not BASE_SLOT <= slot < self.slots:
            raise InvalidArgument.for_field("slot", f"{slot} does not exist")
        if slot in self.merged:
            self._touch(slot)
            return
        if slot in self._pending:
            return
        # What makes room is gone as soon as the writing begins.
        while self._ready and len(self._ready) + len(self._pending) >= self.weight_slots:
            self._ready.pop(0)
        self.merges.append(slot)
        self._pending[slot] = 2

    def load_row(self, slot: int, row: EngineRow) -> None:
        """What was merged of the slot's former row is of no use any more."""
        super().load_row(slot, row)
        self._pending.pop(slot, None)
        self._ready = [other for other in self._ready if other != slot]

    def denoise(
        self,
        plan: Plan,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        added: Tensor | None = None,
    ) -> Tensor:
        """Charge the clock, and refuse what merged weights cannot do."""
        if plan is Plan.MERGED:
            slot = int(adapter_index[0])
            assert bool((adapter_index == slot).all())
            assert slot in self.merged
            self._touch(slot)
        size = (latents.shape[2], latents.shape[3])
        self._clock.advance(self._table.ms(plan, latents.shape[0], size) / 1000)
        for slot in list(self._pending):
            self._pending[slot] -= 1
            if not self._pending[slot]:
                del self._pending[slot]
                self._ready.append(slot)
        return super().denoise(plan, latents, timesteps, cross, adapter_index, added)

    def _touch(self, slot: int) -> None:
        if slot in self._ready:
            self._ready.remove(slot)
            self._ready.append(slot)


def refuse_above(rows: int, make: Callable[[], Exception]) -> Callable[[Plan, Tensor], None]:
    """An `on_call` of FakeEngine: calls of more than `rows` do not fit."""

    def check(plan: Plan, adapter_index: Tensor) -> None:
        if adapter_index.shape[0] > rows:
            raise make()

    return check


def out_of_memory() -> Exception:
    """What torch raises."""
    return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
