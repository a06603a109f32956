"""The UNet of one plan as the CUDA engine calls it: static inputs, layers in torch's form or on the Triton kernels."""

import torch
from torch import Tensor

from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cuda_attention import AttentionTable, set_attention
from hueshift.engines.cuda_buffers import CallViews
from hueshift.engines.cuda_layers import SlabRows, use_kernels
from hueshift.engines.fused_blocks import fuse_blocks
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors


class CudaUNet(AdaptedUNet):
    """An AdaptedUNet of the dense or factored plan on the engine's slabs.

    With `kernels` linear layers, convolutions and branches run on the Triton kernels, else in torch's form; with `fuse`
    so do residual blocks, norms and gates. `slab_rows` are views of the slabs that the engine owns.
    """

    def __init__(
        self,
        base: BaseModel,
        factors: SpectralFactors,
        rows: RowLayout,
        plan: Plan,
        *,
        slab_rows: SlabRows,
        spectral: Tensor,
        lowrank: Tensor,
        attention: AttentionTable,
        kernels: bool,
        fuse: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(base, factors, rows, plan)
        self.to(device=lowrank.device, dtype=dtype)
        self.slab_rows = slab_rows
        self.spectral = spectral if plan is Plan.FACTORED else None
        self.lowrank = lowrank
        set_attention(self.unet, attention)
        self.on_kernels = kernels
        self.kernel_layers = use_kernels(self, slab_rows) if kernels else 0
        if self.kernel_layers:
            # What the kernels read where it lies need not be gathered.
            self._branches = []
        self.fused_blocks = 0
        if fuse:
            self.fuse()

    def fuse(self) -> None:
        """Run residual blocks, norms and gates on the Triton kernels from now on, with the parameters they have."""
        if not self.fused_blocks:
            self.fused_blocks = fuse_blocks(self.unet, self.slab_rows)

    def call(self, views: CallViews) -> None:
        """Run on the buffers and write their `out`."""
        views.out.copy_(
            self.compute(views.sample, views.timestep, views.cross, views.slots, views.branches, views.added)
        )

    def compute(
        self,
        sample: Tensor,
        timestep: Tensor,
        cross: Tensor,
        slots: Tensor,
        branches: Tensor,
        added: Tensor | None,
    ) -> Tensor:
        """Run once on inputs as CallViews has them; this is what torch.compile takes. Returns [N, C, h, w]."""
        self.slab_rows.slots, self.slab_rows.branch_slots = slots, branches
        return self.forward(sample, timestep, cross, slots, self.spectral, self.lowrank, added)
