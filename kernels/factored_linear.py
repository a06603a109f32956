"""A linear layer kept as its decomposition, with singular values per sample: y = U (sigma[index[n]] * (V^T x)) + b.

The factored plan: a batch mixes any number of spectral adapters (SVDiff, Han et al. 2023) at the cost of one extra
product (+22 % of SD1.5's FLOPs). The scale is fused into the first product's epilogue, where the sum is still fp32: it
costs no pass over the activations and no rounding of its own.
"""

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.checks import (
    HALF_TYPES,
    REFERENCE_TYPES,
    check_contiguous,
    check_device,
    check_dtype,
    check_index,
    check_inner_contiguous,
    check_shape,
)
from hueshift.kernels.launch import on_gpu
from hueshift.kernels.launch_table import LaunchConfig, choose
from hueshift.kernels.product import product_launch, product_reference, shape_class

KERNEL = "factored_linear"


def factored_linear(
    x: Tensor, u: Tensor, vh: Tensor, sigma: Tensor, index: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return y [N, T, out] = (x V * sigma[index]) U^T + bias.

    x [N, T, in], u [out, r], vh [r, in], bias [out]: contiguous, one dtype (fp16 or bf16 on a GPU). sigma [slots, r]
    fp32 holds relu(sigma + delta) of every adapter slot, any slot stride, so a slice of a slab fits; index [N] int32 or
    int64 of 0..slots-1, where slot 0 is the base by convention. On a GPU a wrong index gives that sample NaN (see
    checks.check_index). The first product is a Triton launch with the scale in fp32 in its epilogue; the second is
    cuBLAS with its bias epilogue, or the same kernel where the launch table says so. CPU tensors take the reference.
    Raises KernelArgumentError on what does not fit.
    """
    check_factors(x, u, vh, sigma, index, bias)
    check_shape("x", x, (None, None, vh.shape[1]))
    check_shape("index", index, (x.shape[0],))
    check_contiguous("x", x)
    samples, tokens, _ = x.shape
    rows = x.view(samples * tokens, x.shape[2])
    if not on_gpu(x):
        return reference(x, u, vh, sigma, index, bias)
    config = choose(x.device, KERNEL, shape_class(tokens, u.shape[1]))
    scaled = torch.empty(rows.shape[0], u.shape[1], dtype=x.dtype, device=x.device)
    product_launch(scaled, rows, vh, tokens=tokens, config=config, sigma=sigma, index=index).run()
    return second_product(scaled, u, bias, tokens, config).view(samples, tokens, u.shape[0])


def second_product(scaled: Tensor, u: Tensor, bias: Tensor | None, tokens: int, config: LaunchConfig) -> Tensor:
    """Return scaled [rows, r] U^T + bias on a GPU, with cuBLAS or with the product kernel as `config` says."""
    if config["SECOND_CUBLAS"]:
        return functional.linear(scaled, u, bias)
    y = torch.empty(scaled.shape[0], u.shape[0], dtype=scaled.dtype, device=scaled.device)
    product_launch(y, scaled, u, tokens=tokens, config=config, bias=bias).run()
    return y


def check_factors(x: Tensor, u: Tensor, vh: Tensor, sigma: Tensor, index: Tensor, bias: Tensor | None) -> None:
    """Raise KernelArgumentError unless the factors fit each other and lie where x lies."""
    check_scaled("x", x, u, sigma, index, bias)
    check_shape("vh", vh, (u.shape[1], *[None] * (vh.dim() - 1)) if vh.dim() == 4 else (u.shape[1], None))
    check_dtype("vh", vh, (x.dtype,))
    if vh.dim() == 2:
        check_contiguous("vh", vh)
    check_device("vh", vh, x.device)


def check_scaled(name: str, x: Tensor, u: Tensor, sigma: Tensor, index: Tensor, bias: Tensor | None) -> None:
    """Raise KernelArgumentError unless U, the singular values and the bias fit each other and lie where x lies."""
    check_dtype(name, x, HALF_TYPES if x.device.type == "cuda" else REFERENCE_TYPES)
    check_shape("u", u, (None, None))
    check_shape("sigma", sigma, (None, u.shape[1]))
    check_dtype("sigma", sigma, (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,))
    check_inner_contiguous("sigma", sigma, 1)
    check_index("index", index, 0, sigma.shape[0])
    check_dtype("u", u, (x.dtype,))
    check_contiguous("u", u)
    if bias is not None:
        check_dtype("bias", bias, (x.dtype,))
        check_shape("bias", bias, (u.shape[0],))
        check_contiguous("bias", bias)
        check_device("bias", bias, x.device)
    for part, tensor in (("u", u), ("sigma", sigma), ("index", index)):
        check_device(part, tensor, x.device)


def reference(x: Tensor, u: Tensor, vh: Tensor, sigma: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do the same with torch: each product summed in float32 (float64 for float64), rounded once to the dtype of x."""
    samples, tokens, _ = x.shape
    rows = x.reshape(samples * tokens, x.shape[2])
    scaled = product_reference(rows, vh, tokens=tokens, sigma=sigma, index=index)
    return functional.linear(scaled, u, bias).view(samples, tokens, u.shape[0])
