"""The merged plan on TensorRT: the Triton kernels write an adapter's weights, and a refit takes them from there.

Always the union of all adapted weights, always from the pristine base: refitting only what an adapter changes leaves
traces of the one before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import EngineRow
from hueshift.engines.rows import LowRankTarget, RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.tensorrt_lane import Lane
from hueshift.engines.tensorrt_loader import Fallback, TensorRT, TensorRtError
from hueshift.engines.tensorrt_weights import RefitWeight, refit_weights
from hueshift.kernels.lowrank_merge import LowRankFactors, MergeLayer, lowrank_merge, mix_adapters, plan_merge
from hueshift.kernels.spectral_plan import SpectralLayer, plan_spectral
from hueshift.kernels.spectral_reassemble import spectral_reassemble


@dataclass(frozen=True, slots=True)
class _Branch:
    """The place of one target's A and B in a row, and the fp16 buffers that the kernel reads."""

    target: LowRankTarget
    a: Tensor
    b: Tensor
    is_transposed: bool


class MergedWeights:
    """The fp16 weights of one adapter, as the plan's initializers hold them, in memory that never moves.

    A linear layer's initializer is W^T. Its change is V diag(d) U^T + A^T B^T, so the same kernels write it transposed
    with the two factors exchanged: no pass of its own. Costs twice the adapted weights (pristine and merged) plus the
    packed factors; SD1.5: 1.7 + 1.7 + 2.2 GB.
    """

    def __init__(
        self,
        base: BaseModel,
        factors: SpectralFactors,
        rows: RowLayout,
        norms: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self.weights = refit_weights(base.layout)
        self.outputs: dict[str, Tensor] = {}
        self._norms: list[tuple[Tensor, int]] = []
        layers: list[SpectralLayer] = []
        places: dict[str, int] = {}
        for weight in self.weights:
            if weight.is_norm:
                out = norms[weight.layer].to(device, torch.float16).clone()
                self._norms.append((out, base.layout.norm_offsets[weight.layer]))
            else:
                layer = _spectral_layer(base, factors, weight, device)
                places[weight.layer] = len(layers)
                layers.append(layer)
                out = layer.out
            self.outputs[weight.name] = out
        self._row = torch.zeros(1, rows.spectral_size, device=device)
        self._one = torch.ones(1, device=device)
        self._spectral = plan_spectral(layers)
        self._branches = [_make_branch(target, self._weight_of(target.name), device) for target in rows.targets]
        self._merge = None
        if self._branches:
            # Onto what the reassembly has just written, so base and out are one tensor.
            merged = [
                MergeLayer(layers[places[b.target.name]].out, layers[places[b.target.name]].out) for b in self._branches
            ]
            self._merge = plan_merge(merged, in_place=True)
            parts = {number: LowRankFactors(b.a, b.b) for number, b in enumerate(self._branches)}
            self._mix = mix_adapters(self._merge, [parts])

    def write(self, row: EngineRow) -> None:
        """Queue W' of a row that has both parts, on the current stream. The base's own row gives the base's bits."""
        spectral, lowrank = row.spectral, row.lowrank
        if spectral is None or lowrank is None:
            raise ValueError("a merge takes both parts of a row, as the slabs hold them")
        self._row[0].copy_(spectral, non_blocking=True)
        spectral_reassemble(self._spectral, self._row, self._one, effective=True)
        for out, begin in self._norms:
            out.copy_(self._row[0, begin : begin + out.numel()])
        if self._merge is not None:
            for branch in self._branches:
                _fill(branch, lowrank)
            lowrank_merge(self._merge, self._mix, self._one)

    def _weight_of(self, layer: str) -> RefitWeight:
        return next(weight for weight in self.weights if weight.layer == layer)


class PlanRefitter:
    """Gives a loaded plan new weights from device memory. The addresses are set once; later refits only repeat."""

    def __init__(
        self,
        trt: TensorRT,
        engine: Any,
        weights: Sequence[RefitWeight],
        outputs: Mapping[str, Tensor],
        lane: Lane,
        *,
        validation: bool,
    ) -> None:
        self._trt = trt
        self._lane = lane
        # TensorRT holds the addresses only; this keeps the memory.
        self._outputs = outputs
        trt.forget_errors()
        self._refitter = trt.module.Refitter(engine, trt.logger)
        self._refitter.weights_validation = validation
        self._set_all(weights)

    def refit(self) -> None:
        """Queue the refit on the lane, after what has written the weights there.

        Raises TensorRtError (refit) if TensorRT refuses; the plan may then hold a part of the new weights.
        """
        if not self._refitter.refit_cuda_engine_async(self._lane.handle):
            raise TensorRtError(Fallback.REFIT, f"TensorRT refused new weights: {self._trt.errors()}")

    def _set_all(self, weights: Sequence[RefitWeight]) -> None:
        module, half = self._trt.module, self._trt.dtypes[torch.float16]
        known = set(self._refitter.get_all_weights())
        lost = [weight.name for weight in weights if weight.name not in known]
        if lost:
            raise TensorRtError(Fallback.REFIT, f"the plan cannot refit {_some(lost)}; build it again")
        for weight in weights:
            prototype, out = self._refitter.get_weights_prototype(weight.name), self._outputs[weight.name]
            if prototype.dtype != half or prototype.size != out.numel() or out.dtype != torch.float16:
                raise TensorRtError(
                    Fallback.REFIT,
                    f"{weight.name}: the plan holds {prototype.size} values of {prototype.dtype}, the adapter gives "
                    f"{out.numel()} of {out.dtype}",
                )
            given = module.Weights(half, out.data_ptr(), out.numel())
            if not self._refitter.set_named_weights(weight.name, given, module.TensorLocation.DEVICE):
                raise TensorRtError(Fallback.REFIT, f"TensorRT refused {weight.name}: {self._trt.errors()}")
        missing = self._refitter.get_missing_weights()
        if missing:
            raise TensorRtError(Fallback.REFIT, f"the plan wants weights that no adapter has: {_some(missing)}")


def _spectral_layer(
    base: BaseModel, factors: SpectralFactors, weight: RefitWeight, device: torch.device
) -> SpectralLayer:
    def half(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, torch.float16).contiguous()

    name = weight.layer
    matrix: Tensor = base.unet.get_parameter(f"{name}.weight")
    u, vh = factors.u[name], factors.vh[name]
    if weight.is_transposed:
        matrix, u, vh = matrix.T, vh.T, u.T
    pristine = half(matrix).clone()
    offset = base.layout.matrix_offsets[name]
    return SpectralLayer(half(u), factors.sigma[name].to(device), half(vh), pristine, pristine.clone(), offset)


def _make_branch(target: LowRankTarget, weight: RefitWeight, device: torch.device) -> _Branch:
    rows, cols = (target.cols, target.rows) if weight.is_transposed else (target.rows, target.cols)
    a = torch.zeros(target.rank, cols, dtype=torch.float16, device=device)
    b = torch.zeros(rows, target.rank, dtype=torch.float16, device=device)
    return _Branch(target, a, b, weight.is_transposed)


def _fill(branch: _Branch, lowrank: Tensor) -> None:
    target = branch.target
    size_a, _ = target.sizes
    a = lowrank[target.begin : target.begin + size_a].view(target.rank, target.cols)
    b = lowrank[target.begin + size_a : target.end].view(target.rows, target.rank)
    branch.a.copy_(b.T if branch.is_transposed else a, non_blocking=True)
    branch.b.copy_(a.T if branch.is_transposed else b, non_blocking=True)


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])} ({len(names)} in all)"
