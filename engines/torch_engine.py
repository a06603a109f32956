"""The torch engine: the reference on a CPU, and the engine of CUDA devices."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.added_embedding import added_width
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cross_attention import CrossLayout
from hueshift.engines.interface import BASE_SLOT, EngineRow, Guides, Plan, no_guides
from hueshift.engines.rows import RowLayout
from hueshift.engines.slabs import Slabs
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.whole_rows import check_whole, only_slot, whole_weights


class TorchEngine:
    """Runs `AdaptedUNet` eagerly: fp32 on a CPU, fp16 on CUDA unless the base is held in another dtype there.

    Implements UNetEngine. Rows, slabs and sigma stay in fp32 on every device.
    """

    name = "torch"
    plans = (Plan.DENSE, Plan.FACTORED, Plan.FULL)

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
        # Weights of slots with dense deltas by the dense plan's names; all others are the base's.
        self._whole: dict[int, dict[str, Tensor]] = {}

    @property
    def slots(self) -> int:
        """Slots in all, the base's own included."""
        return self._slabs.slots

    @property
    def dense_slots(self) -> int:
        """Mixes with dense deltas that it holds at a time: as many as there are slots; see WholeWeightEngine."""
        return self.slots - 1

    @property
    def dense(self) -> frozenset[int]:
        """Slots that hold one now."""
        return frozenset(self._whole)

    def load_row(self, slot: int, row: EngineRow) -> None:
        """Copy a row into a slot; see UNetEngine. One with dense deltas puts weights of its own together."""
        self._slabs.load(slot, row)
        self._whole.pop(slot, None)
        if row.dense is not None:
            base = {
                name.removeprefix("unet.").removesuffix(".weight"): weight.detach()
                for name, weight in self._unets[Plan.DENSE].named_parameters()
            }
            whole = whole_weights(row, base, self.rows, self.factors)
            self._whole[slot] = {f"unet.{name}.weight": weight for name, weight in whole.items()}

    def denoise(
        self,
        plan: Plan,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        added: Tensor | None = None,
    ) -> Tensor:
        """Run the UNet once; see UNetEngine. Inputs may be on another device; the output is where the latents are."""
        if plan is Plan.FULL:
            guides = no_guides(cross)
            return self.denoise_guided(latents, timesteps, cross, adapter_index, guides, added)[0]
        self._slabs.check_call(latents.shape[0], self.max_batch, adapter_index)
        check_whole(self.dense, plan, adapter_index)
        weights: dict[str, Tensor] = {}
        if plan is Plan.MERGED:
            plan, weights = Plan.DENSE, self._weights_of(only_slot(adapter_index))
        spectral = self._slabs.spectral if plan is Plan.FACTORED else None
        inputs = self._placed(latents, timesteps, cross, adapter_index)
        given = (*inputs, spectral, self._slabs.lowrank, self._place_added(added))
        with torch.no_grad():
            out: Tensor = functional_call(self._unets[plan], weights, given)
        return out.to(latents.device, torch.float32)

    def _weights_of(self, slot: int) -> dict[str, Tensor]:
        if slot not in self._whole:
            raise InvalidArgument.for_field(
                "adapter_index", f"slot {slot} has no weights of its own: only rows with dense deltas run merged here"
            )
        return self._whole[slot]

    def denoise_guided(
        self,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        guides: Guides,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the full plan once; see UNetEngine."""
        self._slabs.check_call(latents.shape[0], self.max_batch, adapter_index)
        check_whole(self.dense, Plan.FULL, adapter_index)
        inputs = self._placed(latents, timesteps, cross, adapter_index)
        placed = Guides(*(part.to(self._device) for part in (guides.lag, guides.lag_source, guides.reference)))
        with torch.no_grad():
            unet = self._unets[Plan.FULL]
            slabs = (self._slabs.spectral, self._slabs.lowrank)
            out, mask = unet.forward_guided(*inputs, placed, *slabs, self._place_added(added))
        return out.to(latents.device, torch.float32), mask.to(latents.device)

    def _placed(
        self, latents: Tensor, timesteps: Tensor, cross: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device, dtype = self._device, self._dtype
        return latents.to(device, dtype), timesteps.to(device), cross.to(device, dtype), index.to(device)

    def _place_added(self, added: Tensor | None) -> Tensor | None:
        return None if added is None else added.to(self._device, self._dtype)

    def warm(self) -> None:
        """Run every plan once."""
        inputs, added = example_inputs(self._base, 2), example_added(self._base, 2)
        for plan in self.plans:
            self.denoise(plan, *inputs, added)


def example_inputs(base: BaseModel, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, cross and adapter indices (all BASE_SLOT) of the base's native size, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    side = base.sample_size
    latents = torch.randn(rows, base.latent_channels, side, side, generator=generator)
    timesteps = torch.rand(rows, generator=generator) * (base.schedule.train_steps - 1)
    cross = torch.randn(rows, base.max_tokens, CrossLayout(base.layout).width, generator=generator)
    return latents, timesteps, cross, torch.full((rows,), BASE_SLOT)


def example_added(base: BaseModel, rows: int) -> Tensor | None:
    """What such rows take beside those inputs in SDXL [rows, width], from a fixed seed; None for other models."""
    width = added_width(base.layout)
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) if width else None
