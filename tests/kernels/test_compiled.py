"""The operators for torch.compile: traced whole, with the same results as the functions."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.compare import relative_error
from hueshift.kernels.compiled import compiled_ops
from hueshift.kernels.factored_conv import factored_conv
from hueshift.kernels.factored_linear import factored_linear
from hueshift.kernels.lowrank_residual import lowrank_residual


def test_a_layer_of_all_operators_compiles_in_one_graph() -> None:
    torch.manual_seed(0)
    ops = compiled_ops()
    assert compiled_ops() is ops
    x, index, sigma = torch.randn(3, 5, 16), torch.tensor([0, 2, 1]), torch.rand(3, 8)
    u, vh, bias = torch.randn(12, 8), torch.randn(8, 16), torch.randn(12)
    a, b, scales = torch.randn(3, 2, 16), torch.randn(3, 12, 2), torch.rand(3)

    def layer(x: Tensor, mask: Tensor) -> Tensor:
        y = ops.factored_linear(x, u, vh, sigma, index, bias)
        ops.lowrank_residual(y, x, a, b, index, scales, mask)
        return y * 2

    mask = torch.tensor([[1.0, 0.0, 1.0, 0.5, 0.0]] * 3)
    want = 2 * lowrank_residual(factored_linear(x, u, vh, sigma, index, bias), x, a, b, index, scales, mask)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x, mask), want) < 1e-6


def test_the_second_half_of_a_convolution_compiles_and_stays_channels_last() -> None:
    torch.manual_seed(0)
    ops = compiled_ops()
    x = torch.randn(2, 4, 6, 5).contiguous(memory_format=torch.channels_last)
    u, vh, sigma, index = torch.randn(9, 8), torch.randn(8, 4, 3, 3), torch.rand(3, 8), torch.tensor([1, 0])

    def layer(x: Tensor) -> Tensor:
        return ops.scale_and_expand(functional.conv2d(x, vh, None, 1, 1), u, sigma, index, None)

    got = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert relative_error(got, factored_conv(x, u, vh, sigma, index, padding=1)) < 1e-6
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_operators_compile_on_a_gpu(gpu: torch.device) -> None:
    ops = compiled_ops()
    x = torch.randn(4, 64, 320, device=gpu, dtype=torch.float16)
    u, vh = torch.randn(320, 320, device=gpu).half() * 0.05, torch.randn(320, 320, device=gpu).half() * 0.05
    sigma, index = torch.rand(3, 320, device=gpu), torch.tensor([0, 1, 2, 1], device=gpu)
    compiled = torch.compile(
        lambda x: ops.factored_linear(x, u, vh, sigma, index, None).relu(), mode="reduce-overhead", fullgraph=True
    )
    for _ in range(4):
        assert relative_error(compiled(x), factored_linear(x, u, vh, sigma, index).relu()) < 1e-3
