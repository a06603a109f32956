"""The CUDA engine: fp16 networks in captured graphs over buffers that never move.

A call copies its inputs into static buffers, replays the graph of its plan, bucket and size, and copies the output out.
Adapters change what the graphs read (slabs, merged weights), never the graphs: a swap costs no capture and no compile,
which `captures` and `compiles` prove.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import structlog
import torch
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cost_model import CostTable
from hueshift.engines.cuda_buffers import NO_BRANCH, CallBuffers, CallShape, bucket_for, buckets_up_to
from hueshift.engines.cuda_graphs import GraphKey, GraphStore
from hueshift.engines.cuda_lane import GraphLane, Mark
from hueshift.engines.cuda_networks import GuidedNetwork, Network, NetworkSet
from hueshift.engines.cuda_options import CompileKind, CudaOptions, EngineObserver, Silent
from hueshift.engines.device_errors import Fault, classify, release_memory
from hueshift.engines.interface import BASE_SLOT, SLAB_PLANS, EngineRow, Guides, Plan, no_guides
from hueshift.engines.merged_slots import MergedSlots
from hueshift.engines.rows import RowLayout
from hueshift.engines.run_ahead import RunAhead
from hueshift.engines.slabs import Slabs
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.whole_rows import check_whole, no_dense_deltas, only_slot

_log = structlog.get_logger()


class CudaEngine:
    """Implements MergingEngine. `lane` is the device's stream, or a HostLane to run the same on a CPU in fp32."""

    name = "torch"

    def __init__(
        self,
        base: BaseModel,
        factors: SpectralFactors,
        rows: RowLayout,
        norms: Mapping[str, Tensor],
        *,
        slots: int,
        max_batch: int,
        lane: GraphLane,
        options: CudaOptions,
        observer: EngineObserver | None = None,
    ) -> None:
        self.rows, self.factors, self.norms = rows, factors, norms
        self.max_batch = max_batch
        self.base, self.lane, self.options = base, lane, options
        self.observer = observer or Silent()
        self.buckets = buckets_up_to(max_batch)
        self.dtype = options.dtype_on(lane.device)
        self._slabs = Slabs(rows, factors, norms, slots, lane.device, lowrank_dtype=self.dtype)
        # The branch index of every slot, on the host: rows without a branch are skipped by the kernels.
        self._branches = torch.full((slots,), NO_BRANCH, dtype=torch.int64)
        self.graphs = GraphStore(
            lane,
            limit=options.graphs,
            enabled=options.compile is not CompileKind.NONE,
            on_capture=self.observer.captured,
        )
        self.networks = NetworkSet(base, factors, rows, self._slabs, options, self.dtype, self.observer)
        self.buffers = CallBuffers(
            rows=max_batch,
            area=options.max_area,
            channels=base.latent_channels,
            cross=(base.max_tokens, self.networks.cross_width),
            added=self.networks.added_width,
            device=lane.device,
            dtype=self.dtype,
        )
        self._ahead = RunAhead()
        self._copies = lane.beside()
        self._arriving: dict[int, Mark] = {}
        self.costs: CostTable | None = None
        """Measured at start (engines/calibration.py)."""
        self.capacity: Mapping[tuple[int, int], int] = {}
        """UNet rows of one call that fit, by latent size, as far as that was found out at start."""
        self._merged: MergedSlots | None = None
        # What was made above was queued on the caller's stream: from here on the lane, and all that waits for a mark
        # of it, comes after that.
        with lane.running():
            if options.weight_slots:
                self._merged = self.networks.make_merged(lane, options)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Plans it can run."""
        return (*SLAB_PLANS, Plan.MERGED) if self._merged is not None else SLAB_PLANS

    @property
    def slots(self) -> int:
        """Slots in all, the base's own included."""
        return self._slabs.slots

    @property
    def weight_slots(self) -> int:
        """Mixes whose weights it holds at a time, beside those that stay."""
        return 0 if self._merged is None else self._merged.count - len(self._merged.kept)

    @property
    def dense_slots(self) -> int:
        """Mixes with dense deltas that it holds at a time; see WholeWeightEngine. They take weight slots."""
        return 0 if self._merged is None else self._merged.count

    @property
    def dense(self) -> frozenset[int]:
        """Slots that hold one now."""
        return frozenset() if self._merged is None else self._merged.kept

    @property
    def merged(self) -> frozenset[int]:
        """Slots whose weights are written; see MergingEngine."""
        return frozenset() if self._merged is None else self._merged.ready | {BASE_SLOT}

    @property
    def merging(self) -> frozenset[int]:
        """Slots whose weights are being written."""
        return frozenset() if self._merged is None else self._merged.writing

    @property
    def working(self) -> bool:
        """True while calls are queued that the device has not done."""
        return self._ahead.working

    def load_row(self, slot: int, row: EngineRow) -> None:
        """Copy a row into a slot; see UNetEngine. The copy runs beside the steps: only its readers wait.

        One with dense deltas begins to write the slot's own weights, which stay until another row is loaded there.
        Raises FailedPrecondition (PLAN_UNAVAILABLE) on such a row where there are no weight slots.
        """
        if row.dense is not None and self._merged is None:
            raise no_dense_deltas(self.name)
        copies = self._copies
        # Steps that are queued may still read what the slot held.
        copies.after(self.lane.mark())
        on_host = all(part.device.type == "cpu" for part in row.tensors())
        with copies.apart() if on_host else copies.running():
            self._slabs.load(slot, row)
            self.networks.slot_weights.write(slot, self.row(slot))
        arrived = self._arriving[slot] = copies.mark()
        self._branches[slot] = NO_BRANCH if row.lowrank is None else slot
        if self._merged is not None:
            self._merged.loaded(slot, arrived)
            if row.dense is not None:
                self._merged.keep(slot, replace(self.row(slot), dense=row.dense))

    def row(self, slot: int) -> EngineRow:
        """Views of what a slot holds."""
        return EngineRow(self._slabs.spectral[slot], self._slabs.lowrank[slot])

    def merge(self, slot: int) -> None:
        """Begin to write a slot's weights; see MergingEngine."""
        if not BASE_SLOT <= slot < self.slots or self._merged is None:
            raise InvalidArgument.for_field("slot", f"{slot} cannot be merged; allowed are 0 to {self.slots - 1}")
        if slot != BASE_SLOT:
            begun = self._merged.merges
            self._merged.merge(slot, self.row(slot))
            if self._merged.merges > begun:
                self.observer.merge_began()

    def stop_merging(self) -> None:
        """Merge nothing from now on. For a start, before networks with weights of their own are captured."""
        self.finish_merges()
        self.lane.mark().wait()
        self._merged = None
        self.networks.with_own_weights.clear()

    def finish_rows(self) -> None:
        """Let the steps' lane wait for every row that is on its way."""
        for arrived in self._arriving.values():
            self.lane.after(arrived)
        self._arriving.clear()

    def finish_merges(self) -> None:
        """Let the steps' lane wait for every merge that has begun."""
        if self._merged is not None:
            self._merged.finish()

    def denoise(
        self,
        plan: Plan,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        added: Tensor | None = None,
    ) -> Tensor:
        """Run the UNet once; see UNetEngine. Inputs may be on another device; the output is where the latents are.

        Under Plan.MERGED all rows must name one slot. If its weights are not written the factored plan runs, which
        reads the same row.
        """
        if plan is Plan.FULL:
            return self.denoise_guided(latents, timesteps, cross, adapter_index, no_guides(cross), added)[0]
        shape = self._shape(latents, adapter_index)
        network = self._network(plan, adapter_index)
        out = self._run(network, shape, latents, timesteps, cross, adapter_index, added)[0]
        if network.held is not None and self._merged is not None:
            self._merged.used(network.held)
        return out

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
        check_whole(self.dense, Plan.FULL, adapter_index)
        shape = self._shape(latents, adapter_index)
        out, mask = self._run(self.networks.full, shape, latents, timesteps, cross, adapter_index, added, guides)
        return out, mask

    def warm(self) -> None:
        """Capture every plan at the usual sizes, the largest batch first: the smaller ones then fit in its memory."""
        # An engine that was measured was warmed for that.
        if self.costs is None:
            for role, shape, _ in self.captures_to_warm():
                self.warm_if_fits(role, shape)
            self.lane.mark().wait()

    def captures_to_warm(self) -> list[tuple[str, CallShape, Plan]]:
        """What `warm` captures: role, shape and plan, in that order.

        Plan.FULL is among them though it is rare: caught at its first use, each bucket would stop the whole device for
        a capture while others take their steps, and here it costs two eager calls and a capture, never a compile.
        """
        shapes = [CallShape(rows, *size) for size in self.options.warm_sizes for rows in self.buckets]
        shapes.sort(key=lambda shape: -shape.work)
        roles = self.networks.roles()
        return [(role, shape, plan) for shape in shapes for role, plan in roles]

    def warm_one(self, role: str, shape: CallShape) -> Callable[[], None]:
        """Compile and capture one call for good; return what queues it on the lane. Raises where it does not fit."""
        views, key = self.buffers.at(shape), GraphKey(role, shape)
        network: Network | GuidedNetwork
        if role == Plan.FULL:
            network = self.networks.full
            with self.lane.running():
                views.clear_guides()
        else:
            network = self.networks.named(role) if key in self.graphs else self.networks.compiled(role)
        with torch.no_grad():
            return self.graphs.warm(key, partial(network.call, views))

    def warm_if_fits(self, role: str, shape: CallShape) -> Callable[[], None] | None:
        """The same; None, with a word, where there is not enough memory."""
        try:
            return self.warm_one(role, shape)
        except RuntimeError as error:
            if classify(error) is not Fault.MEMORY:
                raise
        # Once the error and what its traceback holds are gone.
        release_memory()
        _log.warning("capture_without_memory", role=role, rows=shape.rows, height=shape.height, width=shape.width)
        return None

    def _run(
        self,
        network: Network | GuidedNetwork,
        shape: CallShape,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        added: Tensor | None,
        guides: Guides | None = None,
    ) -> tuple[Tensor, ...]:
        """Queue one call and return its output where the latents are, and behind it the masks if there are guides."""
        count, near, views = latents.shape[0], latents.device == self.lane.device, self.buffers.at(shape)
        branches = self._branches[adapter_index.cpu()]
        self._ahead.make_room()
        self._await_rows(adapter_index)
        with torch.no_grad(), self.lane.running():
            views.fill(latents, timesteps, cross, added, adapter_index, branches)
            if guides is not None:
                views.fill_guides(guides)
            self.graphs.run(GraphKey(network.role, shape), partial(network.call, views))
            made = (views.out,) if guides is None else (views.out, views.mask)
            found = tuple(part[:count].clone() if near else part[:count].cpu() for part in made)
        self._ahead.add(self.lane.mark())
        return found

    def _network(self, plan: Plan, adapter_index: Tensor) -> Network:
        if plan is Plan.MERGED and self._merged is not None:
            slot = only_slot(adapter_index)
            if slot == BASE_SLOT:
                return self.networks.base
            # Kept ones are waited for: no other plan can run their rows.
            if slot in self.merged or slot in self._merged.kept:
                return self.networks.merged(self._merged.use(slot))
            plan = Plan.FACTORED
        check_whole(self.dense, plan, adapter_index)
        return self.networks.of(plan)

    def _await_rows(self, adapter_index: Tensor) -> None:
        """Let the lane wait for the copies of the rows that a call reads."""
        if self._arriving:
            for slot in set(adapter_index.tolist()):
                arrived = self._arriving.pop(slot, None)
                if arrived is not None:
                    self.lane.after(arrived)

    def _shape(self, latents: Tensor, adapter_index: Tensor) -> CallShape:
        """What the call of these latents is filled up to. Raises InvalidArgument on what does not fit the engine."""
        count, _, height, width = latents.shape
        self._slabs.check_call(count, self.max_batch, adapter_index)
        if height * width > self.buffers.area:
            raise InvalidArgument.for_field(
                "latents", f"{height}x{width} has more than the {self.buffers.area} positions this engine was made for"
            )
        return CallShape(bucket_for(count, self.buckets), height, width)
