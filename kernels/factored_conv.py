"""A convolution kept as its decomposition, with singular values per sample.

The weight [out, c_in, kh, kw] as a matrix [out, c_in kh kw] is U diag(sigma) V^T: a convolution with V^T as filters,
a scale per sample and channel, and a 1x1 convolution with U. Cheap because r = min(out, c_in kh kw) is mostly out.
"""

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.checks import check_index, check_shape
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.factored_linear import check_factors, factored_linear
from hueshift.kernels.launch_table import choose
from hueshift.kernels.product import product_launch, product_reference, shape_class

KERNEL = "factored_conv"


def factored_conv(
    x: Tensor,
    u: Tensor,
    vh: Tensor,
    sigma: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Return y [N, out, h, w], channels_last, = conv1x1(sigma[index] * conv(x, vh), u) + bias.

    x [N, c_in, H, W] channels_last, vh [r, c_in, kh, kw] (channels_last on a GPU is fastest), u [out, r], bias [out],
    one dtype (fp16 or bf16 on a GPU); sigma [slots, r] fp32 and index [N] as in factored_linear. A 1x1 convolution of
    stride 1 is factored_linear on the pixels. Otherwise cuDNN convolves with V^T and the scale is fused into the load
    of the second product, in fp32. CPU tensors take the reference. Raises KernelArgumentError on what does not fit.
    """
    check_shape("x", x, (None, None, None, None))
    check_shape("vh", vh, (None, x.shape[1], None, None))
    check_factors(x, u, vh, sigma, index, bias)
    check_shape("index", index, (x.shape[0],))
    if stride < 1 or padding < 0:
        raise KernelArgumentError(f"stride {stride}, padding {padding} (allowed: stride from 1, padding from 0)")
    if x.numel() and not x.is_contiguous(memory_format=torch.channels_last):
        raise KernelArgumentError(f"x has strides {list(x.stride())} (needed: channels_last)")
    samples, channels, height, width = x.shape
    if vh.shape[2:] == (1, 1) and stride == 1 and padding == 0:
        pixels = x.permute(0, 2, 3, 1).reshape(samples, height * width, channels)
        y = factored_linear(pixels, u, vh.reshape(vh.shape[0], channels), sigma, index, bias)
        return y.view(samples, height, width, u.shape[0]).permute(0, 3, 1, 2)
    return scale_and_expand(functional.conv2d(x, vh, None, stride, padding), u, sigma, index, bias)


def scale_and_expand(shrunk: Tensor, u: Tensor, sigma: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return conv1x1(sigma[index] * shrunk, u) + bias, channels_last, for shrunk [N, r, h, w]."""
    check_index("index", index, 0, sigma.shape[0])
    samples, rank, height, width = shrunk.shape
    tokens = height * width
    rows = shrunk.permute(0, 2, 3, 1).reshape(samples * tokens, rank)
    if shrunk.device.type != "cuda":
        y = product_reference(rows, u, tokens=tokens, sigma=sigma, index=index, scale_input=True, bias=bias)
    else:
        y = torch.empty(samples * tokens, u.shape[0], dtype=shrunk.dtype, device=shrunk.device)
        config = choose(shrunk.device, KERNEL, shape_class(tokens, u.shape[0]))
        product_launch(
            y, rows, u, tokens=tokens, config=config, sigma=sigma, index=index, scale_input=True, bias=bias
        ).run()
    return y.view(samples, height, width, u.shape[0]).permute(0, 3, 1, 2)


def reference(
    x: Tensor,
    u: Tensor,
    vh: Tensor,
    sigma: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Do the same with torch for every kernel size, as the tests' and benchmarks' common ground."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    shrunk = functional.conv2d(x.to(wide), vh.to(wide), None, stride, padding)
    scaled = shrunk * sigma.to(wide)[index.long()][:, :, None, None]
    y = functional.conv2d(scaled, u.to(wide)[:, :, None, None], None if bias is None else bias.to(wide))
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)
