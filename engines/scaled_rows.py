"""Activations times values of rows, in fewer and smaller passes than autograd makes of it; for training on a GPU.

With activations in bfloat16 and values in fp32, `(x * factor).to(x.dtype)` writes the product in fp32 and reads it
again, and its way back does so four times: 7 launches and 46 bytes for each activation, here 4 and 16. A training step
of SD1.5 has 282 such layers with 150 million such activations for each sample, a quarter of all that it moves.
"""

from typing import Any

import torch
from torch import Tensor


class ScaledRows(torch.autograd.Function):
    """x [N, ...] times factor [N or 1, 1..., size] fp32, in the dtype of x: multiplied in fp32 and rounded once.

    The gradient for x has autograd's bits. That for the factor is summed in fp32 over products that are rounded to the
    dtype of x, as the factors of each product are already: its error grows by about a fifth.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(x, factor)
        return torch.mul(x, factor, out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients for x and for the factor, where they are wanted."""
        [gradient] = gradients
        x, factor = ctx.saved_tensors
        for_x = for_factor = None
        if ctx.needs_input_grad[0]:
            for_x = torch.mul(gradient, factor, out=torch.empty_like(gradient))
        if ctx.needs_input_grad[1]:
            products = gradient * x
            shared = [dim for dim, size in enumerate(factor.shape) if size == 1]
            # An empty list would mean all dimensions.
            for_factor = products.sum(shared, keepdim=True, dtype=factor.dtype) if shared else products.to(factor.dtype)
        return for_x, for_factor


def scale_rows(x: Tensor, factor: Tensor) -> Tensor:
    """`(x * factor).to(x.dtype)`, differentiable. On the CPU, and for compilers, which fuse it anyway, just that."""
    lowered = x.dtype is not factor.dtype and x.device.type != "cpu"
    if lowered and factor.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        scaled: Tensor = ScaledRows.apply(x, factor)  # type: ignore[no-untyped-call]  # torch's own
        return scaled
    return (x * factor).to(x.dtype)
