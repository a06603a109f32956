"""Adapted layers on the Triton kernels: they read the slabs where they lie, so no row is gathered and no scale rounded.

Each takes over the parameters of the plain layer that it replaces. `SlabRows` holds views of the slabs, which never
move, and the call's indices, which are static buffers in a captured call.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from hueshift.engines.adapted_layers import (
    AdaptedLayer,
    BranchedConv,
    BranchedLinear,
    FactoredConv,
    FactoredLinear,
    transformer_of,
)
from hueshift.engines.rows import RowLayout
from hueshift.kernels.compiled import CompiledOps, compiled_ops


@dataclass
class SlabRows:
    """`sigma` [slots, rank] fp32 of each matrix, and [slots, size] of each norm: its weights; `branches`:
    A [slots, rank, cols] and B [slots, rows, rank] of each target in the UNet's dtype. `slots` [N] says each sample's
    slot, `branch_slots` [N] the same or -1 for no branch; both are set for a call. `masks` as in CallRows.
    `own_weights` [slots, rows, cols] are whole weights of every slot, of the layers that have them (slot_weights.py).
    """

    sigma: Mapping[str, Tensor]
    branches: Mapping[str, tuple[Tensor, Tensor]]
    ones: Tensor
    slots: Tensor | None = None
    branch_slots: Tensor | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    own_weights: Mapping[str, Tensor] = field(default_factory=dict)
    ops: CompiledOps = field(default_factory=compiled_ops)

    def add_branch(self, name: str, out: Tensor, x: Tensor) -> Tensor:
        """Add the branch of a layer to `out`, in place where its memory allows, and return it."""
        branch = self.branches.get(name)
        if branch is None or self.branch_slots is None:
            return out
        if x.dim() == 4:
            # diffusers hands proj_out pixels in the other layout, which costs a copy here.
            tokens, result = as_tokens(x).contiguous(), as_tokens(out)
        else:
            tokens, result = _three(x), _three(out)
        self.ops.lowrank_residual(result, tokens, *branch, self.branch_slots, self.ones, self.mask(name))
        return as_pixels(result, out) if x.dim() == 4 else result.view(out.shape)

    def mask(self, name: str) -> Tensor | None:
        """What confines the branch of a layer, [N, tokens] fp32, if it is in a transformer that has its mask by now."""
        return self.masks.get(transformer_of(name)) if self.masks else None

    def indices(self) -> Tensor:
        """Slots of the call's samples."""
        if self.slots is None:
            raise RuntimeError("no call is in progress")
        return self.slots

    def branch_indices(self) -> Tensor:
        """The same, -1 for a sample without a branch."""
        if self.branch_slots is None:
            raise RuntimeError("no call is in progress")
        return self.branch_slots


def slab_rows(rows: RowLayout, spectral: Tensor, lowrank: Tensor) -> SlabRows:
    """Views of slabs [slots, spectral_size] fp32 and [slots, lowrank_size] by layer."""
    sigma = {name: spectral[:, begin:end] for name, begin, end in rows.layout.spans()}
    branches: dict[str, tuple[Tensor, Tensor]] = {}
    for target in rows.targets:
        middle = target.begin + target.sizes[0]
        a = torch.unflatten(lowrank[:, target.begin : middle], 1, (target.rank, target.cols))
        b = torch.unflatten(lowrank[:, middle : target.end], 1, (target.rows, target.rank))
        branches[target.name] = (a, b)
    return SlabRows(sigma, branches, torch.ones(lowrank.shape[0], device=lowrank.device))


class KernelFactoredLinear(nn.Module):
    """y = U(s_i * V^T x) + b and the branch, the scale fused into the first product (kernels/factored_linear.py)."""

    def __init__(self, layer: FactoredLinear, rows: SlabRows) -> None:
        super().__init__()
        self.name = layer.name
        self.rows = rows
        self.u, self.vh, self.bias = layer.u, layer.vh, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, ..., cols] to [N, ..., rows]."""
        rows = self.rows
        tokens = _three(x).contiguous()
        out = rows.ops.factored_linear(tokens, self.u, self.vh, rows.sigma[self.name], rows.indices(), self.bias)
        return rows.add_branch(self.name, out.view(*x.shape[:-1], out.shape[-1]), x)


class KernelFactoredConv(nn.Module):
    """The same for a convolution: cuDNN convolves with V^T, the scale is fused into the second product's load."""

    def __init__(self, layer: FactoredConv, rows: SlabRows) -> None:
        super().__init__()
        self.name = layer.name
        self.rows = rows
        self.vh, self.bias = layer.vh, layer.bias
        # [rows, rank] for the kernel; the plain layer has it as 1x1 filters.
        self.u = nn.Parameter(layer.u.detach().flatten(1).contiguous(), requires_grad=False)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c_in, h, w] to [N, c_out, h', w'], both channels_last."""
        rows = self.rows
        shrunk = functional.conv2d(x, self.vh, None, self.stride, self.padding, self.dilation)
        shrunk = shrunk.contiguous(memory_format=torch.channels_last)
        out = rows.ops.scale_and_expand(shrunk, self.u, rows.sigma[self.name], rows.indices(), self.bias)
        return rows.add_branch(self.name, out, x)


class KernelBranched(nn.Module):
    """A plain layer and its branch in one product (kernels/lowrank_linear.py); a 1x1 convolution as one on pixels."""

    def __init__(self, layer: BranchedLinear | BranchedConv, rows: SlabRows) -> None:
        super().__init__()
        self.name = layer.name
        self.rows = rows
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, ..., cols] to [N, ..., rows], or [N, cols, h, w] to [N, rows, h, w]."""
        rows = self.rows
        branch = rows.branches[self.name]
        tokens, weight = _packed_tokens(x), self.weight.flatten(1)
        index, mask = rows.branch_indices(), rows.mask(self.name)
        out = rows.ops.lowrank_linear(tokens, weight, self.bias, *branch, index, rows.ones, mask)
        return _shaped_like(out, x)


class SlotLinear(nn.Module):
    """A layer whose weight is each slot's own, branch included (kernels/slot_linear.py); a 1x1 convolution on pixels.

    It keeps the parameters of the layer it replaces: other networks share them.
    """

    def __init__(self, layer: FactoredLinear | FactoredConv | BranchedLinear | BranchedConv, rows: SlabRows) -> None:
        super().__init__()
        self.name = layer.name
        self.rows = rows
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        if layer.bias is None:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, ..., cols] to [N, ..., rows], or [N, cols, h, w] to [N, rows, h, w]."""
        rows = self.rows
        out = rows.ops.slot_linear(_packed_tokens(x), rows.own_weights[self.name], rows.indices(), self.bias)
        return _shaped_like(out, x)


def use_kernels(network: nn.Module, rows: SlabRows, *, few_filters: int = 8) -> int:
    """Put the kernels' layers in the place of the plain ones of an AdaptedUNet and return how many.

    A convolution with fewer than `few_filters` singular values (conv_out) stays: the kernels' tiles would be empty.
    """
    made: dict[int, nn.Module] = {}
    for layer in network.modules():
        if isinstance(layer, _ADAPTED) and layer.name in rows.own_weights:
            made[id(layer)] = SlotLinear(layer, rows)
        elif isinstance(layer, FactoredLinear):
            made[id(layer)] = KernelFactoredLinear(layer, rows)
        elif isinstance(layer, FactoredConv) and layer.vh.shape[0] >= few_filters:
            made[id(layer)] = KernelFactoredConv(layer, rows)
        elif isinstance(layer, BranchedLinear | BranchedConv):
            made[id(layer)] = KernelBranched(layer, rows)
    for parent in list(network.modules()):
        for key, child in parent._modules.items():
            if isinstance(child, AdaptedLayer) and id(child) in made:
                parent._modules[key] = made[id(child)]
    return len(made)


_ADAPTED = FactoredLinear | FactoredConv | BranchedLinear | BranchedConv


def as_tokens(x: Tensor) -> Tensor:
    """View pixels [N, c, h, w] as tokens [N, h * w, c], packed if they lie channels_last."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


def as_pixels(tokens: Tensor, like: Tensor) -> Tensor:
    """View tokens [N, h * w, c] as pixels [N, c, h, w], channels_last."""
    return tokens.view(like.shape[0], *like.shape[2:], tokens.shape[2]).permute(0, 3, 1, 2)


def _three(x: Tensor) -> Tensor:
    """View [N, ..., c] as [N, tokens, c]: a time embedding [N, c] is one token."""
    return x[:, None] if x.dim() == 2 else x.flatten(1, -2)


def _packed_tokens(x: Tensor) -> Tensor:
    """[N, tokens, c] of tokens or pixels; a copy of pixels that diffusers hands in the other layout."""
    return (as_tokens(x) if x.dim() == 4 else _three(x)).contiguous()


def _shaped_like(tokens: Tensor, x: Tensor) -> Tensor:
    """View [N, tokens, c] as `x` is shaped but for its channels."""
    return as_pixels(tokens, x) if x.dim() == 4 else tokens.view(*x.shape[:-1], tokens.shape[-1])
