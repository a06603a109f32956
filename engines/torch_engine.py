"""The torch engine: the reference on a CPU, and the engine of CUDA devices."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import BASE_SLOT, EngineRow, Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.slabs import Slabs
from hueshift.engines.svd_cache import SpectralFactors


class TorchEngine:
    """Runs `AdaptedUNet` eagerly: fp32 on a CPU, fp16 on CUDA unless the base is held in another dtype there.

    Implements UNetEngine. Rows, slabs and sigma stay in fp32 on every device.
    """

    name = "torch"
    plans = (Plan.DENSE, Plan.FACTORED)

    def __init__(
        self,
        base: BaseModel,
        factors: SpectralFactors,
        rows: RowLayout,
        norms: Mapping[str, Tensor],
        *,
        slots: int,
        max_batch: int,
        device: torch.device,
    ) -> None:
        self.rows = rows
        self.factors = factors
        self.norms = norms
        self.max_batch = max_batch
        self._base = base
        self._device = device
        self._dtype = torch.float32 if device.type == "cpu" else torch.float16
        self._slabs = Slabs(rows, factors, norms, slots, device)
        self._unets = {
            plan: AdaptedUNet(base, factors, rows, plan).to(device=device, dtype=self._dtype) for plan in self.plans
        }

    @property
    def slots(self) -> int:
        """Slots in all, the base's own included."""
        return self._slabs.slots

    def load_row(self, slot: int, row: EngineRow) -> None:
        """Copy a row into a slot; see UNetEngine."""
        self._slabs.load(slot, row)

    def denoise(self, plan: Plan, latents: Tensor, timesteps: Tensor, context: Tensor, adapter_index: Tensor) -> Tensor:
        """Run the UNet once; see UNetEngine. Inputs may be on another device; the output is where the latents are."""
        self._slabs.check_call(latents.shape[0], self.max_batch, adapter_index)
        spectral = self._slabs.spectral if plan is Plan.FACTORED else None
        with torch.no_grad():
            out: Tensor = self._unets[plan](
                latents.to(self._device, self._dtype),
                timesteps.to(self._device),
                context.to(self._device, self._dtype),
                adapter_index.to(self._device),
                spectral,
                self._slabs.lowrank,
            )
        return out.to(latents.device, torch.float32)

    def warm(self) -> None:
        """Run every plan once."""
        inputs = example_inputs(self._base, 2)
        for plan in self.plans:
            self.denoise(plan, *inputs)


def example_inputs(base: BaseModel, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, context and adapter indices (all BASE_SLOT) of the base's native size, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    side = base.sample_size
    latents = torch.randn(rows, base.latent_channels, side, side, generator=generator)
    timesteps = torch.rand(rows, generator=generator) * (base.schedule.train_steps - 1)
    context = torch.randn(rows, base.max_tokens, base.layout.token_width, generator=generator)
    return latents, timesteps, context, torch.full((rows,), BASE_SLOT)
