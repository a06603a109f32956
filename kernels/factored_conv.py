"""A convolution kept as its decomposition, with singular values per sample.

The weight [out, c_in, kh, kw] as a matrix [out, c_in kh kw] is U diag(sigma) V^T: a convolution with V^T as filters,
a scale per sample and channel, and a 1x1 convolution with U. Cheap because r = min(out, c_in kh kw) is mostly out.

The scale goes where fewer bytes are: onto a copy of U for each sample where a picture has many pixels (0.2 MB against
5.2 MB for SD1.5's largest pictures), else onto the pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional

from hueshift.kernels.checks import check_shape
from hueshift.kernels.errors import KernelArgumentError
from hueshift.kernels.factored_linear import check_factors, check_scaled, factored_linear, second_product
from hueshift.kernels.launch import Launch, jit, on_gpu, tl
from hueshift.kernels.launch_table import LaunchConfig, choose
from hueshift.kernels.product import product_launch, product_reference, shape_class
from hueshift.kernels.tiles import blocks

KERNEL = "factored_conv"
SCALED_PIXELS = "scaled_pixels"
CLASSES = ("whole_tiles", "narrow_tiles", SCALED_PIXELS)
"""What expand_class returns."""

SCALE_BLOCK = 64


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
    stride 1 is factored_linear on the pixels. Otherwise cuDNN convolves with V^T, and the scale goes onto U or onto the
    pixels (see above), in fp32, before the second product. On a GPU a wrong index gives that sample NaN. CPU tensors
    take the reference. Raises KernelArgumentError on what does not fit.
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
    """Return conv1x1(sigma[index] * shrunk, u) + bias, channels_last, for shrunk [N, r, h, w].

    A copy is made of what does not lie channels_last. The rest as in factored_conv, errors too.
    """
    check_scaled("shrunk", shrunk, u, sigma, index, bias)
    check_shape("shrunk", shrunk, (None, u.shape[1], None, None))
    samples, rank, height, width = shrunk.shape
    check_shape("index", index, (samples,))
    # Of pictures in the other layout, reshape alone would give a view whose pixels are not packed.
    pixels = shrunk.permute(0, 2, 3, 1).reshape(samples, height * width, rank).contiguous()
    work = expand if on_gpu(shrunk) else expand_reference
    y = work(pixels, u, sigma, index, bias)
    return y.view(samples, height, width, u.shape[0]).permute(0, 3, 1, 2)


def expand_class(tokens: int, out: int) -> str:
    """Return the launch table's class for samples of `tokens` pixels and `out` columns of output.

    A sample's own weights are written once, its scaled pixels written and what they were read: as many bytes where
    out = 2 tokens. Weights of a sample's own also need tiles that end with it.
    """
    if tokens % 128 or out > 2 * tokens:
        return SCALED_PIXELS
    return shape_class(tokens, out)


def expand(
    pixels: Tensor,
    u: Tensor,
    sigma: Tensor,
    index: Tensor,
    bias: Tensor | None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Return y [N, T, out] = (sigma[index] * pixels) U^T + bias on a GPU; `config` replaces the launch table's choice.

    pixels [N, T, r] and u [out, r], packed, of one 16-bit dtype. The products with sigma are rounded to it once.
    """
    samples, tokens, rank = pixels.shape
    out = u.shape[0]
    config = config or choose(pixels.device, KERNEL, expand_class(tokens, out))
    if config["SCALED_WEIGHTS"]:
        own = torch.empty(samples, out, rank, dtype=u.dtype, device=u.device)
        scale_launch(own, u[None], sigma, index).run()
        y = torch.empty(samples, tokens, out, dtype=u.dtype, device=u.device)
        product_launch(y.flatten(0, 1), pixels.flatten(0, 1), own, tokens=tokens, config=config, bias=bias).run()
        return y
    scaled = torch.empty_like(pixels)
    scale_launch(scaled, pixels, sigma, index).run()
    return second_product(scaled.flatten(0, 1), u, bias, tokens, config).view(samples, tokens, out)


def scale_launch(target: Tensor, source: Tensor, sigma: Tensor, index: Tensor) -> Launch:
    """Return the launch of target[n] = source[n] * sigma[index[n]] for target [N, R, r] and source [N or 1, R, r].

    Both packed; sigma [slots, r] fp32 with any slot stride, and the product in fp32. A sample whose index lies outside
    0..slots-1 gets NaN.
    """
    samples, rows, width = target.shape
    arguments = {
        "target_ptr": target,
        "source_ptr": source,
        "sigma_ptr": sigma,
        "index_ptr": index,
        "source_step": source.stride(0) if source.shape[0] == samples else 0,
        "rows": rows,
        "width": width,
        "slots": sigma.shape[0],
        "slot_stride": sigma.stride(0),
    }
    grid = (blocks(rows, SCALE_BLOCK), blocks(width, SCALE_BLOCK), samples)
    return Launch(_scale_kernel, grid, arguments, {"BLOCK": SCALE_BLOCK}, 4, 1)


def expand_reference(pixels: Tensor, u: Tensor, sigma: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do what `expand` does with torch: everything in float32, or float64 for float64, rounded once."""
    wide = torch.float64 if pixels.dtype == torch.float64 else torch.float32
    samples, tokens, _ = pixels.shape
    scaled = pixels.to(wide) * sigma.to(wide)[index.long()][:, None]
    wide_bias = None if bias is None else bias.to(wide)
    y = product_reference(scaled.flatten(0, 1), u.to(wide), tokens=tokens, bias=wide_bias)
    return y.to(pixels.dtype).view(samples, tokens, u.shape[0])


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


@jit
def _scale_kernel(target_ptr: tl.tensor, source_ptr: tl.tensor, sigma_ptr: tl.tensor, index_ptr: tl.tensor,
                  source_step: tl.tensor, rows: tl.tensor, width: tl.tensor, slots: tl.tensor,
                  slot_stride: tl.tensor, BLOCK: tl.constexpr) -> None:  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(index_ptr + sample).to(tl.int64)
    known = (slot >= 0) & (slot < slots)
    scale = tl.load(sigma_ptr + slot * slot_stride + col, mask=(col < width) & known, other=float("nan"))
    inside = (row < rows)[:, None] & (col < width)[None, :]
    at = row[:, None] * width + col[None, :]
    value = tl.load(source_ptr + sample * source_step + at, mask=inside, other=0.0)
    target = target_ptr + sample * rows * width + at
    tl.store(target, (value.to(tl.float32) * scale[None, :]).to(target_ptr.dtype.element_ty), mask=inside)
