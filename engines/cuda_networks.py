"""The networks of the CUDA engine: one for each plan and each copy of merged weights, sharing all memory they can."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hueshift.adapters.layout import MatrixLayer
from hueshift.engines.added_embedding import added_width
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cross_attention import CrossLayout
from hueshift.engines.cuda_buffers import CallViews
from hueshift.engines.cuda_compile import compile_network
from hueshift.engines.cuda_lane import GraphLane
from hueshift.engines.cuda_layers import slab_rows
from hueshift.engines.cuda_options import CompileKind, CudaOptions, EngineObserver, KernelUse
from hueshift.engines.cuda_unet import CudaUNet
from hueshift.engines.device_errors import release_memory
from hueshift.engines.interface import Plan
from hueshift.engines.merged_slots import BASE_ROLE, MergedSlots, WeightSlot
from hueshift.engines.rows import RowLayout
from hueshift.engines.slabs import Slabs
from hueshift.engines.slot_weights import SlotWeights, choose_layers
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.weightless import check_shared, share_parameters, without_weights


@dataclass(frozen=True, slots=True)
class Network:
    """A network to be called: `role` names its graphs; `held` is the copy of weights it reads, if it has its own."""

    role: str
    unet: CudaUNet
    compute: Callable[..., Tensor]
    held: WeightSlot | None = field(default=None, compare=False)

    def call(self, views: CallViews) -> None:
        """Run on the buffers and write their `out`."""
        out = self.compute(views.sample, views.timestep, views.cross, views.slots, views.branches, views.added)
        views.out.copy_(out)


@dataclass(frozen=True, slots=True)
class GuidedNetwork:
    """The network of Plan.FULL. It is never compiled: its masks are our kernels, mostly."""

    unet: CudaUNet
    role: str = Plan.FULL.value

    def call(self, views: CallViews) -> None:
        """Run on the buffers and write their `out` and `mask`."""
        self.unet.call_guided(views)


class NetworkSet:
    """Makes networks and knows which serves what. For one thread at a time."""

    def __init__(
        self,
        base: BaseModel,
        factors: SpectralFactors,
        rows: RowLayout,
        slabs: Slabs,
        options: CudaOptions,
        dtype: torch.dtype,
        observer: EngineObserver,
    ) -> None:
        self._base, self._factors, self._rows, self._slabs = base, factors, rows, slabs
        self._options, self._dtype, self._observer = options, dtype, observer
        self.slot_weights = self._make_slot_weights()
        views = slab_rows(rows, slabs.spectral, slabs.lowrank)
        self._slab_rows = replace(views, own_weights=self.slot_weights.weights)
        self.cross_width = CrossLayout(rows.layout).width
        self.added_width = added_width(rows.layout)
        kernels = options.kernels is KernelUse.ON
        self._chosen = {plan: self.make(plan, kernels=kernels) for plan in (Plan.DENSE, Plan.FACTORED)}
        self.slot_weights.prepare(dict(self._chosen[Plan.DENSE].unet.named_parameters()), factors)
        self._full: GuidedNetwork | None = None
        self.with_own_weights: list[Network] = []
        """Those of merged weights, one for each copy."""
        self._compiled: dict[str, Network] = {}
        self._uncompiled: set[str] = set()

    def of(self, plan: Plan) -> Network:
        """The network of a slab plan without guides."""
        return self._chosen[plan]

    @cached_property
    def base(self) -> Network:
        """The base's own weights, without branches."""
        network = self._plain()
        return Network(BASE_ROLE, network, network.compute)

    @property
    def full(self) -> GuidedNetwork:
        """The network of Plan.FULL, on the factored one's memory, and in its form where none was chosen."""
        if self._full is None:
            self._full = self._make_full(kernels=self._chosen[Plan.FACTORED].unet.on_kernels)
        return self._full

    def merged(self, held: WeightSlot) -> Network:
        """The network of a copy of weights."""
        return next(network for network in self.with_own_weights if network.role == held.role)

    def make(self, plan: Plan, *, kernels: bool, source: nn.Module | None = None) -> Network:
        """A network of a slab plan, its adapted layers on the Triton kernels or in torch's form, on weights of its own
        or on those of `source`, a network of the same plan.
        """
        unet = self._unet(self._rows, plan, kernels=kernels, fuse=kernels and self._fuses, source=source)
        return Network(plan.value, unet, unet.compute)

    def choose(self, plan: Plan, *, kernels: bool) -> None:
        """Serve a plan in this form from now on. Its graphs must be forgotten."""
        if plan is Plan.FULL:
            if self._full is None or self._full.unet.on_kernels != kernels:
                self._full = self._make_full(kernels=kernels)
        elif self._chosen[plan].unet.on_kernels != kernels:
            self._chosen[plan] = self.make(plan, kernels=kernels, source=self._chosen[plan].unet)
            self._compiled.pop(plan.value, None)

    def settle(self) -> None:
        """Follow the forms that were chosen: the base and merged weights run their blocks on the Triton kernels as the
        dense plan was found right with, and weights of slots that no plan reads are let go. For a start: graphs of
        those networks must not be there yet.
        """
        if self._fuses and self._chosen[Plan.DENSE].unet.on_kernels:
            for network in (self.base, *self.with_own_weights):
                network.unet.fuse()
        if not any(network.unet.on_kernels for network in self._chosen.values()):
            self.slot_weights = SlotWeights((), self._rows, self._slabs.slots, self._slabs.lowrank.device, self._dtype)
            self._slab_rows = replace(self._slab_rows, own_weights=self.slot_weights.weights)

    @property
    def _fuses(self) -> bool:
        """torch.compile fuses by itself, and better what it sees whole."""
        return self._options.compile is not CompileKind.INDUCTOR

    def make_merged(self, lane: GraphLane, options: CudaOptions) -> MergedSlots:
        """Networks with weights of their own, and what writes those."""
        pristine = self._chosen[Plan.DENSE].unet
        networks: list[nn.Module] = [self._plain() for _ in range(options.weight_slots)]
        capture = options.compile is not CompileKind.NONE
        layout = self._rows.layout
        made = MergedSlots(layout, self._rows, self._factors, pristine, networks, lane, capture=capture)
        if lane.device.type == "cuda":
            # Graphs take their memory from pools of their own, which find nothing in the cache of what was let go.
            release_memory()
        for held in made.slots:
            network = held.network
            if isinstance(network, CudaUNet):
                self.with_own_weights.append(Network(held.role, network, network.compute, held))
        return made

    def roles(self) -> list[tuple[str, Plan]]:
        """What is captured: role and plan of each network, the one that takes most memory first."""
        found = [(Plan.FULL.value, Plan.FULL), *((plan.value, plan) for plan in self._chosen)]
        if self.with_own_weights:
            found += [(BASE_ROLE, Plan.MERGED), *((network.role, Plan.MERGED) for network in self.with_own_weights)]
        return found

    def compiled(self, role: str) -> Network:
        """The same as it is warmed for a shape: to be compiled at its next call if the options say so."""
        network = self.named(role)
        if self._options.compile is not CompileKind.INDUCTOR or role in self._uncompiled:
            return network
        self._observer.compiled(role)
        if role not in self._compiled:
            compute = compile_network(network.compute, autotune=self._options.autotune)
            self._compiled[role] = replace(network, compute=compute)
        return self._compiled[role]

    def leave_uncompiled(self, plan: Plan) -> None:
        """Compile no network of a slab plan from now on; with the dense plan's go those that have their own weights."""
        roles = [plan.value]
        if plan is Plan.DENSE:
            roles += [BASE_ROLE, *(network.role for network in self.with_own_weights)]
        self._uncompiled.update(roles)
        for role in roles:
            self._compiled.pop(role, None)

    def named(self, role: str) -> Network:
        """The network of a role other than Plan.FULL's."""
        if role == BASE_ROLE:
            return self.base
        return next(network for network in (*self._chosen.values(), *self.with_own_weights) if network.role == role)

    def _make_slot_weights(self) -> SlotWeights:
        options, slots, lowrank = self._options, self._slabs.slots, self._slabs.lowrank
        layers: list[MatrixLayer] = []
        if options.kernels is not KernelUse.OFF and options.slot_weight_bytes:
            unet: Any = self._base.unet
            levels, side = len(unet.config.block_out_channels), self._base.sample_size
            most = options.slot_weight_bytes
            layers = choose_layers(self._rows.layout, levels, side, slots, self._dtype.itemsize, most)
        return SlotWeights(layers, self._rows, slots, lowrank.device, self._dtype)

    def _make_full(self, *, kernels: bool) -> GuidedNetwork:
        # torch.compile never sees it, so nothing else would fuse it.
        source = self._chosen[Plan.FACTORED].unet
        return GuidedNetwork(self._unet(self._rows, Plan.FULL, kernels=kernels, fuse=kernels, source=source))

    def _plain(self) -> CudaUNet:
        """The dense network without branches, on the dense plan's weights: its adapter is in its own, if it has any."""
        rows = RowLayout(self._rows.layout, (), self._rows.lowrank_rank, text_side=False)
        return self._unet(rows, Plan.DENSE, kernels=False, fuse=False, source=self._chosen[Plan.DENSE].unet)

    @cached_property
    def _shapes(self) -> tuple[BaseModel, SpectralFactors]:
        return without_weights(self._base, self._factors)

    def _unet(
        self, rows: RowLayout, plan: Plan, *, kernels: bool, fuse: bool, source: nn.Module | None = None
    ) -> CudaUNet:
        base, factors = (self._base, self._factors) if source is None else self._shapes
        made = CudaUNet(
            base,
            factors,
            rows,
            plan,
            slab_rows=self._slab_rows,
            spectral=self._slabs.spectral,
            lowrank=self._slabs.lowrank,
            attention=self._options.attention,
            kernels=kernels,
            fuse=fuse,
            dtype=self._dtype,
        )
        if source is not None:
            share_parameters(made, source)
            check_shared(made, self._slabs.lowrank.device)
        return made
