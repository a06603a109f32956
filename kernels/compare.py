"""How a result is judged against a reference of higher precision, in tests and before every benchmark."""

import torch
from torch import Tensor

# Relative error (Frobenius norm) that rounding an output once to its dtype may cost, with room for the rounding of
# 16-bit inputs inside a product of float32 sums. Measured on Gaussian data: 2.1e-4 in fp16, 1.7e-3 in bf16.
TOLERANCES = {
    torch.float16: 8e-4,
    torch.bfloat16: 6e-3,
    torch.float32: 2e-6,
    torch.float64: 1e-13,
}


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Return |result - reference| / |reference| in float64 (the plain norm where the reference is zero).

    NaN anywhere in the result gives NaN, which compares false with every tolerance.
    """
    exact = reference.double()
    size = float(exact.norm())
    return float((result.double() - exact).norm()) / (size or 1.0)
