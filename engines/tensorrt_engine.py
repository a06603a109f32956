"""The TensorRT engine: the exported fp16 graphs as TensorRT plans, adapters as their inputs or by refit.

`dense` and `factored` read adapter rows from slabs, as every engine here does, so a batch mixes users. `merged` holds
the weights of one adapter: after `merge_after` calls in a row that want nothing but one slot, its row is merged by the
Triton kernels and refitted, and such calls run there at the cost of the plain model.
"""

from collections.abc import Callable, Mapping
from typing import Any

import structlog
import torch
from torch import Tensor

from hueshift.adapters.errors import FailedPrecondition, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import BASE_SLOT, EngineRow, Guides, Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.run_ahead import RunAhead
from hueshift.engines.slabs import Slabs
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.tensorrt_lane import Lane
from hueshift.engines.tensorrt_loader import Fallback, TensorRT, TensorRtError
from hueshift.engines.tensorrt_plans import PlanRanges
from hueshift.engines.tensorrt_refit import MergedWeights, PlanRefitter
from hueshift.engines.tensorrt_runner import PlanRunner, Scratch, buckets_up_to
from hueshift.engines.torch_engine import example_added, example_inputs

MERGED = "merged"
_log = structlog.get_logger()


class TensorRtEngine:
    """Runs one plan file for each plan. Implements UNetEngine; a call that TensorRT refuses raises TensorRtError.

    `loaded` holds the deserialised plans by role (`dense`, `factored`, and `merged` if there is one). `ranges` are what
    the plans were built for. `on_fallback` hears when the merged plan is given up.
    """

    name = "tensorrt"
    plans = (Plan.DENSE, Plan.FACTORED)

    def __init__(
        self,
        trt: TensorRT,
        base: BaseModel,
        factors: SpectralFactors,
        rows: RowLayout,
        norms: Mapping[str, Tensor],
        loaded: Mapping[str, Any],
        ranges: PlanRanges,
        lane: Lane,
        *,
        cuda_graphs: bool = True,
        weights_validation: bool = True,
        merge_after: int = 0,
        on_fallback: Callable[[Fallback], None] | None = None,
    ) -> None:
        self.rows = rows
        self.factors = factors
        self.norms = norms
        self.max_batch = ranges.max_batch
        self.buckets = buckets_up_to(ranges.max_batch)
        """UNet rows that calls are filled up to."""
        _, usual, largest = ranges.sides
        self.capacity = {(side, side): ranges.max_batch for side in (usual, largest)}
        """UNet rows of one call that fit, by latent size: the plans' memory is that of the largest call, held from the
        start."""
        self.lane = lane
        self._ahead = RunAhead()
        self._base = base
        self._slabs = Slabs(rows, factors, norms, ranges.slots, lane.device)
        scratch = Scratch(max(trt.memory_size(engine) for engine in loaded.values()), lane.device)
        slabs = {"spectral_slab": self._slabs.spectral, "lowrank_slab": self._slabs.lowrank}
        self._runners = {
            role: PlanRunner(trt, engine, ranges, slabs, lane, scratch, cuda_graphs=cuda_graphs)
            for role, engine in loaded.items()
        }
        self._weights: MergedWeights | None = None
        self.merged_slot: int | None = None
        self._merge_after = merge_after
        self._on_fallback = on_fallback or (lambda reason: None)
        self._streak = (BASE_SLOT, 0)
        if MERGED in loaded:
            self._weights = MergedWeights(base, factors, rows, norms, lane.device)
            self._refitter = PlanRefitter(
                trt, loaded[MERGED], self._weights.weights, self._weights.outputs, lane, validation=weights_validation
            )

    @property
    def slots(self) -> int:
        """Slots in all, the base's own included."""
        return self._slabs.slots

    @property
    def working(self) -> bool:
        """True while calls are queued that the device has not done."""
        return self._ahead.working

    @property
    def can_merge(self) -> bool:
        """True while the merged plan may be used."""
        return self._weights is not None

    def load_row(self, slot: int, row: EngineRow) -> None:
        """Copy a row into a slot; see UNetEngine."""
        with self.lane.running():
            self._slabs.load(slot, row)
        if slot == self.merged_slot:
            self.merged_slot = None
        if slot == self._streak[0]:
            self._streak = (BASE_SLOT, 0)

    def row(self, slot: int) -> EngineRow:
        """Views of what a slot holds."""
        return EngineRow(self._slabs.spectral[slot], self._slabs.lowrank[slot])

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

        Raises TensorRtError (run) too.
        """
        self._slabs.check_call(latents.shape[0], self.max_batch, adapter_index)
        role = MERGED if self._should_run_merged(adapter_index) else plan.value
        self._ahead.make_room()
        out = self._runners[role].run(latents, timesteps, cross, adapter_index, added)
        self._ahead.add(self.lane.mark())
        return out.to(latents.device)

    def merge(self, slot: int) -> None:
        """Give the merged plan the weights of a slot; BASE_SLOT restores the base, bit for bit.

        If TensorRT refuses, the base is restored, the merged plan is given up, and TensorRtError (refit) is raised: the
        other plans are untouched and go on serving.
        """
        if self._weights is None:
            raise TensorRtError(Fallback.REFIT, "this engine has no merged plan")
        try:
            self._refit(slot)
        except TensorRtError:
            self._give_up_merging()
            raise
        self.merged_slot = slot

    def denoise_guided(
        self,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        guides: Guides,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Refuse: there is no TensorRT plan for it (see `plans`). Raises FailedPrecondition (PLAN_UNAVAILABLE)."""
        raise FailedPrecondition(
            Reason.PLAN_UNAVAILABLE,
            "the TensorRT engine has no full plan; set engine.kind to torch for guided sampling",
        )

    def denoise_merged(self, latents: Tensor, timesteps: Tensor, cross: Tensor, added: Tensor | None = None) -> Tensor:
        """Run the merged plan once, on whatever it holds; shapes as in `denoise`."""
        index = torch.full((latents.shape[0],), BASE_SLOT)
        return self._runners[MERGED].run(latents, timesteps, cross, index, added).to(latents.device)

    def warm(self) -> None:
        """Run every plan twice, so that the calls of the smallest batches are captured too."""
        rows = min(2, self.max_batch)
        inputs, added = example_inputs(self._base, rows), example_added(self._base, rows)
        for plan in (*self.plans, *self.plans):
            self.denoise(plan, *inputs, added)
        self.lane.wait()

    def _should_run_merged(self, adapter_index: Tensor) -> bool:
        # Reading an index that lives on a GPU would stall the stream.
        if self._weights is None or not self._merge_after or adapter_index.device.type != "cpu":
            return False
        slot = int(adapter_index[0])
        if slot == BASE_SLOT or bool((adapter_index != slot).any()):
            self._streak = (BASE_SLOT, 0)
            return False
        self._streak = (slot, self._streak[1] + 1 if self._streak[0] == slot else 1)
        if self.merged_slot == slot:
            return True
        if self._streak[1] < self._merge_after:
            return False
        try:
            self.merge(slot)
        except TensorRtError as error:
            _log.error("merged_plan_given_up", error=error.message)
            return False
        return True

    def _refit(self, slot: int) -> None:
        weights = self._weights
        if weights is None:
            raise TensorRtError(Fallback.REFIT, "this engine has no merged plan")
        self.merged_slot = None
        with self.lane.running():
            weights.write(self.row(slot))
            self._refitter.refit()
        self._runners[MERGED].forget_captures()

    def _give_up_merging(self) -> None:
        """Put the pristine base back where a part of an adapter may be, then leave the merged plan alone."""
        try:
            self._refit(BASE_SLOT)
        except TensorRtError as error:
            _log.error("merged_plan_not_restored", error=error.message)
        self._weights = None
        self._on_fallback(Fallback.REFIT)
