"""Scaled activations of a training step: autograd's numbers in fewer passes."""

import pytest
import torch
from torch import Tensor

from hueshift.engines.scaled_rows import ScaledRows, scale_rows

SHAPES = {
    "tokens, one row": ((3, 50, 16), (1, 1, 16)),
    "tokens, a row each": ((3, 50, 16), (3, 1, 16)),
    "pixels, one row": ((3, 16, 7, 5), (1, 16, 1, 1)),
    "pixels, a row each": ((3, 16, 7, 5), (3, 16, 1, 1)),
    "one sample": ((1, 50, 16), (1, 1, 16)),
    "time, a row each": ((3, 16), (3, 16)),
    "time, one row": ((3, 16), (1, 16)),
    "rank one": ((2, 50, 1), (2, 1, 1)),
}


def make(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, values and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    sizes, small = SHAPES[name]
    x, gradient = (torch.randn(sizes, generator=generator).bfloat16() for _ in range(2))
    if len(sizes) == 4:
        x, gradient = (part.contiguous(memory_format=torch.channels_last) for part in (x, gradient))
    return x.requires_grad_(), torch.rand(small, generator=generator).requires_grad_(), gradient


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """What a GPU's training step calls."""
    found: Tensor = ScaledRows.apply(x, factor)  # type: ignore[no-untyped-call]  # torch's own
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_results_and_gradients_are_autograds(name: str) -> None:
    x, factor, gradient = make(name)
    plain = (x * factor).to(x.dtype)
    wanted = torch.autograd.grad(plain, [x, factor], gradient)
    found = scaled(x, factor)
    assert torch.equal(found, plain)
    assert (found.dtype, found.stride()) == (plain.dtype, plain.stride())
    for_x, for_factor = torch.autograd.grad(found, [x, factor], gradient)
    assert torch.equal(for_x, wanted[0])
    assert (for_factor.dtype, for_factor.shape) == (torch.float32, factor.shape)
    # Each product is off by 2^-9 of itself at most, and sums of them by as much of what they are the sum of.
    terms = (x.detach().double() * gradient.double()).abs().sum_to_size(factor.shape)
    assert bool(((for_factor - wanted[1]).abs() <= 2**-8 * terms).all())
    exact = (x.detach().double() * gradient.double()).sum_to_size(factor.shape)
    assert float((for_factor - exact).norm() / exact.norm()) < 4e-3


def test_what_needs_no_gradient_gets_none() -> None:
    x, factor, gradient = make("tokens, a row each")
    [for_factor] = torch.autograd.grad(scaled(x.detach(), factor), [factor], gradient)
    [for_x] = torch.autograd.grad(scaled(x, factor.detach()), [x], gradient)
    assert for_factor.shape == factor.shape
    assert for_x.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu_autograd_does_it(dtype: torch.dtype) -> None:
    x, factor, _ = make("pixels, one row")
    x = x.detach().to(dtype).requires_grad_()
    found = scale_rows(x, factor)
    assert torch.equal(found, (x * factor).to(dtype))
    assert found.grad_fn is not None
    assert "ScaledRows" not in type(found.grad_fn).__name__
