"""UNet layers that read their adapter values from the rows of the current call instead of holding them.

Shapes: N samples; tokens are [N, ..., cols] for linear layers and [N, cols, h, w] for convolutions. Rows are [N, size],
or [1, size] when the whole batch shares one (training). Values of rows are fp32 and meet activations in fp32, whatever
the dtype of the weights: fp16 singular values cost 1e-3 of the output (docs/design.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from hueshift.engines.scaled_rows import scale_rows


@dataclass
class CallRows:
    """The rows of the call in progress, split by layer. The UNet fills it before its forward and empties it after."""

    values: Mapping[str, Tensor] = field(default_factory=dict)
    """Effective singular values [N, rank] of a matrix, or weights [N, size] of a norm, by layer name."""

    branches: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """A [N, rank, cols] and B [N, rows, rank] by layer name; absent layers run without a branch."""

    shared: bool = False
    """True if the first dimension of all rows is 1 and stands for the whole batch."""

    channels_last: bool = False
    """True if activations of convolutions lie in memory as [N, h, w, c]."""

    masks: dict[str, Tensor] = field(default_factory=dict)
    """LAG masks [N, positions] by transformer, as far as the call has got; a branch in one is confined to it."""


class AdaptedLayer(nn.Module):
    """A layer that looks its values up in the rows of the call by its own name."""

    def __init__(self, name: str, rows: CallRows) -> None:
        super().__init__()
        self.name = name
        self.rows = rows

    def with_branch(self, out: Tensor, x: Tensor) -> Tensor:
        """Add B(Ax) to `out`, if the call has a branch for this layer."""
        branch = self.rows.branches.get(self.name)
        if branch is None:
            return out
        if x.dim() == 4:
            added = _branch_on_pixels(x, *branch, channels_last=self.rows.channels_last)
        else:
            added = _branch_on_tokens(x, *branch, shared=self.rows.shared)
        mask = self.rows.masks.get(transformer_of(self.name)) if self.rows.masks else None
        if mask is not None:
            shape = (-1, 1, *added.shape[2:]) if x.dim() == 4 else (*mask.shape, 1)
            added = added * mask.to(added.dtype).reshape(shape)
        return out + added


class CrossSlice(nn.Module):
    """Stands for to_k or to_v of a cross-attention: its result is a part of the `cross` input, whatever the layer."""

    def __init__(self, begin: int, end: int) -> None:
        super().__init__()
        self.begin = begin
        self.end = end

    def forward(self, cross: Tensor) -> Tensor:
        """Cut [N, tokens, begin:end] out of [N, tokens, width]."""
        return cross[..., self.begin : self.end]


class BranchedLinear(AdaptedLayer):
    """y = Wx + b + B_i(A_i x)."""

    def __init__(self, name: str, rows: CallRows, layer: nn.Linear) -> None:
        super().__init__(name, rows)
        self.weight = _frozen(layer.weight)
        self.bias = _frozen_or_none(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, ..., cols] to [N, ..., rows]."""
        return self.with_branch(functional.linear(x, self.weight, self.bias), x)


class BranchedConv(AdaptedLayer):
    """The same for a 1x1 convolution on [N, cols, h, w]."""

    def __init__(self, name: str, rows: CallRows, layer: nn.Conv2d) -> None:
        super().__init__(name, rows)
        self.weight = _frozen(layer.weight)
        self.bias = _frozen_or_none(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, cols, h, w] to [N, rows, h, w]."""
        return self.with_branch(functional.conv2d(x, self.weight, self.bias), x)


class FactoredLinear(AdaptedLayer):
    """y = U(s_i * V^T x) + b, and the branch: `vh` [rank, cols], `u` [rows, rank], s_i [rank] of each sample."""

    def __init__(self, name: str, rows: CallRows, layer: nn.Linear, u: Tensor, vh: Tensor) -> None:
        super().__init__(name, rows)
        self.u = _frozen(u)
        self.vh = _frozen(vh)
        self.bias = _frozen_or_none(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, ..., cols] to [N, ..., rows]."""
        sigma = self.rows.values[self.name]
        hidden = scale_rows(functional.linear(x, self.vh), _beside(sigma, x.dim() - 2, last=True))
        return self.with_branch(functional.linear(hidden, self.u, self.bias), x)


class FactoredConv(AdaptedLayer):
    """The same for a convolution: V^T as `rank` filters, a scale per sample and channel, U as a 1x1 convolution."""

    def __init__(self, name: str, rows: CallRows, layer: nn.Conv2d, u: Tensor, vh: Tensor) -> None:
        super().__init__(name, rows)
        self.u = _frozen(u[:, :, None, None])
        self.vh = _frozen(vh.reshape(-1, *layer.weight.shape[1:]))
        self.bias = _frozen_or_none(layer.bias)
        self.stride = (layer.stride[0], layer.stride[1])
        self.padding = layer.padding if isinstance(layer.padding, str) else (layer.padding[0], layer.padding[1])
        self.dilation = (layer.dilation[0], layer.dilation[1])

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c_in, h, w] to [N, c_out, h', w']."""
        hidden = functional.conv2d(x, self.vh, None, self.stride, self.padding, self.dilation)
        hidden = scale_rows(hidden, _beside(self.rows.values[self.name], 2, last=False))
        return self.with_branch(functional.conv2d(hidden, self.u, self.bias), x)


class RowGroupNorm(AdaptedLayer):
    """Group norm (Wu and He 2018) whose weights [N, channels] come from the rows; its bias is the base's."""

    def __init__(self, name: str, rows: CallRows, layer: nn.GroupNorm) -> None:
        super().__init__(name, rows)
        self.bias = _frozen(layer.bias)
        self.groups = layer.num_groups
        self.eps = layer.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, channels, ...]."""
        weight = self.rows.values[self.name]
        if self.rows.shared:
            return functional.group_norm(x, self.groups, _only(weight).to(self.bias.dtype), self.bias, self.eps)
        normal = functional.group_norm(x, self.groups, None, None, self.eps)
        spatial = x.dim() - 2
        return scale_rows(normal, _beside(weight, spatial, last=False)) + self.bias.view(-1, *[1] * spatial)


class RowLayerNorm(AdaptedLayer):
    """Layer norm (Ba et al. 2016) whose weights [N, width] come from the rows; its bias is the base's."""

    def __init__(self, name: str, rows: CallRows, layer: nn.LayerNorm) -> None:
        super().__init__(name, rows)
        self.bias = _frozen(layer.bias)
        self.shape = list(layer.normalized_shape)
        self.eps = layer.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, ..., width]."""
        weight = self.rows.values[self.name]
        if self.rows.shared:
            return functional.layer_norm(x, self.shape, _only(weight).to(self.bias.dtype), self.bias, self.eps)
        normal = functional.layer_norm(x, self.shape, None, None, self.eps)
        return scale_rows(normal, _beside(weight, x.dim() - 2, last=True)) + self.bias


def transformer_of(layer: str) -> str:
    """Name of the transformer that holds a layer: `down_blocks.0.attentions.1`, or the layer's own outside of one."""
    before, found, after = layer.partition(".attentions.")
    return f"{before}{found}{after.partition('.')[0]}"


def split_rows(rows: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Cut [N, total] into the part [N, size] of each layer, in order."""
    return dict(zip(sizes, torch.split(rows, list(sizes.values()), 1), strict=True))


def split_branches(rows: Tensor, shapes: Sequence[tuple[str, int, int, int]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Cut [N, total] into A [N, rank, cols] and B [N, rows, rank] of each (layer, rows, cols, rank), in order."""
    sizes = [size for _, height, width, rank in shapes for size in (rank * width, height * rank)]
    parts = iter(torch.split(rows, sizes, 1))
    return {
        name: (next(parts).view(-1, rank, width), next(parts).view(-1, height, rank))
        for name, height, width, rank in shapes
    }


def _branch_on_tokens(x: Tensor, a: Tensor, b: Tensor, *, shared: bool) -> Tensor:
    if shared:
        return functional.linear(functional.linear(x, _only(a).to(x.dtype)), _only(b).to(x.dtype))
    tokens = x.flatten(1, -2) if x.dim() > 2 else x[:, None]
    hidden = tokens @ a.to(x.dtype).transpose(1, 2)
    return (hidden @ b.to(x.dtype).transpose(1, 2)).view(*x.shape[:-1], b.shape[1])


def _branch_on_pixels(x: Tensor, a: Tensor, b: Tensor, *, channels_last: bool) -> Tensor:
    height, width = x.shape[2:]
    pixels, a, b = x.flatten(2), a.to(x.dtype), b.to(x.dtype)
    if channels_last:
        # Pixels are rows here; the other order would give a contiguous result and a slow sum of two layouts.
        out = (pixels.transpose(1, 2) @ a.transpose(1, 2) @ b.transpose(1, 2)).transpose(1, 2)
    else:
        out = b @ (a @ pixels)
    return out.reshape(-1, out.shape[1], height, width)


def _only(row: Tensor) -> Tensor:
    """Drop the first dimension, which is 1. Not by an index: its way back fills zeros and copies, for each layer."""
    return row.squeeze(0)


def _beside(values: Tensor, dims: int, *, last: bool) -> Tensor:
    """View [N, size] as [N, 1..., size] (last) or [N, size, 1...], with `dims` ones."""
    ones = [1] * dims
    return values.view(-1, *ones, values.shape[1]) if last else values.view(-1, values.shape[1], *ones)


def _frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter of its own on the same storage: moving this one to a device or layout leaves the owner alone."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _frozen_or_none(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else _frozen(tensor)
