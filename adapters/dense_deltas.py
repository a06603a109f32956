"""Full deltas of weights, as adapters keep them: in fp16, two bytes a value of what is 860 million values."""

import torch
from torch import Tensor

from hueshift.adapters.adapter import LowRankFactors

DENSE_DTYPE = torch.float16
"""What full deltas are written in; Stable Diffusion 1.x has 1.7 GB of them."""


def store_delta(delta: Tensor) -> Tensor:
    """Return a full delta [rows, cols] in fp16, contiguous; in fp32 where a value is beyond what fp16 holds (65504).

    Values above 6e-5 keep 11 bits, smaller ones come within 3e-8: weights of 0.06 in fp16 lie 3e-5 apart. A delta in
    fp16 is returned as it is.
    """
    if delta.dtype is DENSE_DTYPE:
        return delta.contiguous()
    fits = delta.numel() == 0 or float(delta.abs().max()) <= torch.finfo(DENSE_DTYPE).max
    return delta.to(DENSE_DTYPE if fits else torch.float32).contiguous()


def with_product(delta: Tensor, part: LowRankFactors | None) -> Tensor:
    """Return delta + scale * b a of one layer, [rows, cols] in fp64; the delta itself without a part."""
    if part is None:
        return delta
    return delta.double() + part.scale * (part.b.double() @ part.a.double())
