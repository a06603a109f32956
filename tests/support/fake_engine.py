"""A UNet engine for tests: each row's output is a function of that row alone, and of the vector in its slot."""

from collections.abc import Callable

import torch
from torch import Tensor

from hueshift.engines.interface import BASE_SLOT, EngineRow, Guides, Plan


class FakeEngine:
    """Deterministic and small. `on_call` runs before each call with (plan, slots), and may raise.

    It holds as many mixes with dense deltas as `dense_slots` says.
    """

    name = "fake"
    plans: tuple[Plan, ...] = (Plan.DENSE, Plan.FACTORED, Plan.FULL)

    def __init__(
        self, slots: int = 8, max_batch: int = 8, on_call: Callable[[Plan, Tensor], None] | None = None
    ) -> None:
        self.slots, self.max_batch, self.on_call = slots, max_batch, on_call
        self.marks = [0.0] * slots
        self.factored = [False] * slots
        self.loads: list[int] = []
        self.calls: list[tuple[Plan, int]] = []
        self.guides: list[Guides] = []
        self.sizes: list[tuple[int, int]] = []
        self.dense_slots = 0
        self.dense: frozenset[int] = frozenset()

    def load_row(self, slot: int, row: EngineRow) -> None:
        """Keep the sum of the row as the slot's mark."""
        assert slot != BASE_SLOT
        self.marks[slot] = sum(float(part.sum()) for part in row.tensors())
        self.dense = self.dense - {slot} | ({slot} if row.needs_weights else set())
        assert len(self.dense) <= self.dense_slots
        self.factored[slot] = row.needs_factored
        self.loads.append(slot)

    def denoise(
        self,
        plan: Plan,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        added: Tensor | None = None,
    ) -> Tensor:
        """Mix latents, time, cross and mark, row by row."""
        if self.on_call is not None:
            self.on_call(plan, adapter_index)
        rows = latents.shape[0]
        assert timesteps.shape == adapter_index.shape == (rows,)
        assert cross.shape[0] == rows <= self.max_batch
        assert plan is not Plan.DENSE or not any(self.factored[int(slot)] for slot in adapter_index)
        named = set(adapter_index.tolist())
        assert not named & self.dense or (plan, len(named)) == (Plan.MERGED, 1)
        self.calls.append((plan, rows))
        self.sizes.append((latents.shape[2], latents.shape[3]))
        marks = torch.tensor([self.marks[int(slot)] for slot in adapter_index])
        shift = torch.tanh(cross.mean(dim=(1, 2)) * 3) + timesteps / 1000 + marks
        return torch.tanh(0.5 * latents + shift.view(-1, 1, 1, 1))

    def denoise_guided(
        self,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        guides: Guides,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add what the guides ask for: the reference's latents, and the sum of the tokens that confine."""
        self.guides.append(guides)
        out = self.denoise(Plan.FULL, latents, timesteps, cross, adapter_index)
        shared = latents[guides.reference] - latents
        lag = guides.lag.sum(1)[guides.lag_source].view(-1, 1, 1, 1)
        mask = torch.where(lag > 0, 0.5, 1.0).expand(-1, 1, *latents.shape[2:])[:, 0]
        return out + 0.1 * shared + 0.01 * lag, mask

    def warm(self) -> None:
        """Nothing to warm."""
