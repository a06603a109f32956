"""The UNet of one plan as the CUDA engine calls it: static inputs, layers in torch's form or on the Triton kernels."""

from dataclasses import replace

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
from hueshift.engines.weightless import is_weightless


class CudaUNet(AdaptedUNet):
    """An AdaptedUNet of one plan on the engine's slabs. `slab_rows` are views of them, which the engine owns.

    With `kernels` linear layers, convolutions, branches and masks run on the Triton kernels, else in torch's form; with
    `fuse` so do residual blocks, norms and gates. `attention` is of no use to Plan.FULL, which has its own.
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
        # One without weights is given them by whoever made it.
        self.to(device=None if is_weightless(self) else lowrank.device, dtype=dtype)
        # Of its own, with what is set for a call: the masks are those that its attention leaves behind. What they
        # confine is the branch, which has to be there by itself.
        own_weights = slab_rows.own_weights if kernels and plan is not Plan.FULL else {}
        self.slab_rows = replace(slab_rows, masks=self.call_rows.masks, own_weights=own_weights)
        self.spectral = None if plan is Plan.DENSE else spectral
        self.lowrank = lowrank
        if plan is not Plan.FULL:
            set_attention(self.unet, attention)
        # Kernels that fail, or are off, must not be what the masks need.
        self.guides.in_torch = not kernels
        self.on_kernels = kernels
        self.kernel_layers = use_kernels(self, self.slab_rows) if kernels else 0
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

    def call_guided(self, views: CallViews) -> None:
        """Run Plan.FULL on the buffers and write their `out` and `mask`.

        Everything in it has the shape of the call, whoever asks for something: a row without LAG has a mask of ones,
        and one that shares with nobody is its own reference. So one graph runs any guides, as buffers like all else.
        """
        if self.spectral is None:
            raise RuntimeError("the full plan reads singular values")
        self.slab_rows.slots, self.slab_rows.branch_slots = views.slots, views.branches
        out, mask = self.forward_guided(
            views.sample,
            views.timestep,
            views.cross,
            views.slots,
            views.guides,
            self.spectral,
            self.lowrank,
            views.added,
        )
        views.out.copy_(out)
        views.mask.copy_(mask)
