"""The merged plan on TensorRT: the Triton kernels write an adapter's weights, and a refit takes them from there.

Always the union of all adapted weights, always from the pristine base: refitting only what an adapter changes leaves
traces of the one before.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import EngineRow
from hueshift.engines.merged_weights import WeightWriter, WrittenMatrix
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.tensorrt_lane import Lane
from hueshift.engines.tensorrt_loader import Fallback, TensorRT, TensorRtError
from hueshift.engines.tensorrt_weights import RefitWeight, refit_weights
from hueshift.kernels.spectral_plan import SpectralLayer


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
        matrices: list[WrittenMatrix] = []
        written: dict[str, Tensor] = {}
        for weight in self.weights:
            if weight.is_norm:
                out = written[weight.layer] = norms[weight.layer].to(device, torch.float16).clone()
            else:
                layer = _spectral_layer(base, factors, weight, device)
                matrices.append(WrittenMatrix(weight.layer, layer, weight.is_transposed))
                out = layer.out
            self.outputs[weight.name] = out
        self._writer = WeightWriter(base.layout, rows, matrices, written)

    def write(self, row: EngineRow) -> None:
        """Queue W' of a row that has both parts, on the current stream. The base's own row gives the base's bits."""
        self._writer.write(row)


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


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])} ({len(names)} in all)"
