"""The baseline of shared_training.py: SVDiff as it is usually written, W = U diag(relu(sigma + delta)) V^T each step.

Made well, so that what is measured is the method: layers of one size in one batched product, in the precision of all
other products; factors are held in it, and weights come out in the layout that convolutions read. Gradients are
autograd's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hueshift.engines.adapted_layers import split_rows
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.training.methods.learnable import Rows
from hueshift.training.precision import holds_lowered, mixed_precision
from hueshift.training.spec import TrainingSpec
from hueshift.training.unet import TrainingUNet


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Layers whose matrices have one size: `u` [k, rows, rank] and `vh` [k, rank, cols] as the products read them.

    `layers` names them with the shapes of their weights. Columns of convolutions are in the order of channels_last
    weights, so that nothing is copied.
    """

    u: Tensor
    vh: Tensor
    layers: tuple[tuple[str, tuple[int, ...]], ...]


class RematerialisingUNet(TrainingUNet):
    """A TrainingUNet that is given a spectral row and runs with the weights that it makes of it."""

    def __init__(self, base: BaseModel, factors: SpectralFactors, spec: TrainingSpec) -> None:
        layout, device = base.layout, next(base.unet.parameters()).device
        lowered = holds_lowered(device, spec.precision)
        adapted = AdaptedUNet(base, factors, RowLayout(layout, (), 1), Plan.DENSE)
        super().__init__(adapted, layout.cross_attentions, layout.token_width, lowered=lowered)
        self._precision = spec.precision
        self._sizes = {name: end - begin for name, begin, end in layout.spans()}
        self._norms = tuple(layout.norm_offsets)
        self._groups = _grouped(base, factors, torch.bfloat16 if lowered else torch.float32)

    def __call__(self, sample: Tensor, timesteps: Tensor, context: Tensor, rows: Rows) -> Tensor:
        """Run with weights that are made of a spectral row [1, size]."""
        if rows.spectral is None:
            raise TypeError("a job of svdiff has a spectral row")
        parts = split_rows(rows.spectral, self._sizes)
        weights = {name: parts[name][0] for name in self._norms}
        with mixed_precision(sample.device, self._precision):
            for group in self._groups:
                values = torch.stack([parts[name] for name, _ in group.layers])
                made = torch.bmm(group.u * values, group.vh)
                for (name, shape), weight in zip(group.layers, made.unbind(), strict=True):
                    weights[name] = weight if len(shape) == 2 else _as_filters(weight, shape)
        return super().__call__(sample, timesteps, context, Rows(weights=weights))


def _as_filters(weight: Tensor, shape: Sequence[int]) -> Tensor:
    out, channels, height, width = shape
    return weight.view(out, height, width, channels).permute(0, 3, 1, 2)


def _grouped(base: BaseModel, factors: SpectralFactors, dtype: torch.dtype) -> list[Group]:
    device = next(base.unet.parameters()).device
    by_size: dict[tuple[int, int], list[tuple[str, tuple[int, ...]]]] = {}
    for layer in base.layout.matrices:
        shape = tuple(base.unet.get_parameter(f"{layer.name}.weight").shape)
        by_size.setdefault((layer.rows, layer.cols), []).append((layer.name, shape))
    groups = []
    for layers in by_size.values():
        columns = []
        for name, shape in layers:
            vh = factors.vh[name].to(device)
            # (channels, height, width) to (height, width, channels).
            filters = vh if len(shape) == 2 else vh.view(-1, *shape[1:]).permute(0, 2, 3, 1).flatten(1)
            columns.append(filters.to(dtype))
        u = torch.stack([factors.u[name].to(device, dtype) for name, _ in layers])
        groups.append(Group(u, torch.stack(columns), tuple(layers)))
    return groups
