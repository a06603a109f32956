"""A UNet engine for tests: each row's output is a function of that row alone, and of the vector in its slot."""

from collections.abc import Callable

import torch
from torch import Tensor

from hueshift.engines.interface import BASE_SLOT, EngineRow, Plan


class FakeEngine:
    """Deterministic and small. `on_call` runs before each call with (plan, slots), and may raise."""

    name = "fake"
    plans = (Plan.DENSE, Plan.FACTORED)

    def __init__(
        self, slots: int = 8, max_batch: int = 8, on_call: Callable[[Plan, Tensor], None] | None = None
    ) -> None:
        self.slots, self.max_batch, self.on_call = slots, max_batch, on_call
        self.marks = [0.0] * slots
        self.factored = [False] * slots
        self.loads: list[int] = []
        self.calls: list[tuple[Plan, int]] = []
        self.sizes: list[tuple[int, int]] = []

    def load_row(self, slot: int, row: EngineRow) -> None:
        """Keep the sum of the row as the slot's mark."""
        assert slot != BASE_SLOT
        vectors = [v for v in (row.spectral, row.lowrank) if v is not None]
        self.marks[slot] = sum(float(v.sum()) for v in vectors)
        self.factored[slot] = row.needs_factored
        self.loads.append(slot)

    def denoise(self, plan: Plan, latents: Tensor, timesteps: Tensor, context: Tensor, adapter_index: Tensor) -> Tensor:
        """Mix latents, time, context and mark, row by row."""
        if self.on_call is not None:
            self.on_call(plan, adapter_index)
        rows = latents.shape[0]
        assert timesteps.shape == adapter_index.shape == (rows,)
        assert context.shape[0] == rows <= self.max_batch
        assert plan is Plan.FACTORED or not any(self.factored[int(slot)] for slot in adapter_index)
        self.calls.append((plan, rows))
        self.sizes.append((latents.shape[2], latents.shape[3]))
        marks = torch.tensor([self.marks[int(slot)] for slot in adapter_index])
        shift = torch.tanh(context.mean(dim=(1, 2)) * 3) + timesteps / 1000 + marks
        return torch.tanh(0.5 * latents + shift.view(-1, 1, 1, 1))

    def warm(self) -> None:
        """Nothing to warm."""
