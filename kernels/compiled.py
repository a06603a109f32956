"""The kernels of the UNet's forward pass as operators that torch.compile takes without a graph break.

Registration changes a process-wide table of torch, so it happens when an engine asks for it and not on import.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hueshift.kernels import factored_conv, factored_linear, lowrank_linear, lowrank_residual, slot_linear


@dataclass(frozen=True, slots=True)
class CompiledOps:
    """Operators with the arguments of the functions of the same name, all positional.

    `lowrank_residual` changes y in place and returns nothing; `scale_and_expand` is the second half of factored_conv,
    after a convolution with V^T that the compiler may fuse as it likes.
    """

    lowrank_residual: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], None]
    factored_linear: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
    scale_and_expand: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
    lowrank_linear: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
    slot_linear: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@cache
def compiled_ops() -> CompiledOps:
    """Register the operators in torch's `hueshift` namespace, once a process, and return them."""

    @torch.library.custom_op("hueshift::lowrank_residual", mutates_args=("y",))
    def residual(
        y: Tensor, x: Tensor, a: Tensor, b: Tensor, index: Tensor, scales: Tensor, mask: Tensor | None
    ) -> None:
        lowrank_residual.lowrank_residual(y, x, a, b, index, scales, mask)

    @torch.library.custom_op("hueshift::factored_linear", mutates_args=())
    def linear(x: Tensor, u: Tensor, vh: Tensor, sigma: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
        return factored_linear.factored_linear(x, u, vh, sigma, index, bias)

    @linear.register_fake
    def _(x: Tensor, u: Tensor, vh: Tensor, sigma: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[1], u.shape[0])

    @torch.library.custom_op("hueshift::scale_and_expand", mutates_args=())
    def expand(shrunk: Tensor, u: Tensor, sigma: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
        return factored_conv.scale_and_expand(shrunk, u, sigma, index, bias)

    @expand.register_fake
    def _(shrunk: Tensor, u: Tensor, sigma: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
        samples, _, height, width = shrunk.shape
        return shrunk.new_empty(samples, height, width, u.shape[0]).permute(0, 3, 1, 2)

    @torch.library.custom_op("hueshift::lowrank_linear", mutates_args=())
    def branched(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        index: Tensor,
        scales: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        return lowrank_linear.lowrank_linear(x, weight, bias, a, b, index, scales, mask)

    @branched.register_fake
    def _(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        index: Tensor,
        scales: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])

    return CompiledOps(residual, linear, expand, branched, _register_slot_linear())


def _register_slot_linear() -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    @torch.library.custom_op("hueshift::slot_linear", mutates_args=())
    def own(x: Tensor, weights: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
        return slot_linear.slot_linear(x, weights, index, bias)

    @own.register_fake
    def _(x: Tensor, weights: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[1], weights.shape[1])

    return own
