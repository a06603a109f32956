"""Mixed precision where the machine gains by it, or where the job asks for it."""

from contextlib import AbstractContextManager

import torch

from hueshift.training.spec import Precision


def has_fast_bfloat16(device: torch.device) -> bool:
    """True if matrix products in bfloat16 are faster than in fp32 there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def mixed_precision(device: torch.device, precision: Precision = Precision.AUTO) -> AbstractContextManager[object]:
    """Run products in bfloat16; parameters, losses and updates stay fp32. There is no fp16: it needs loss scaling.

    emoji-128, batch of 4, forward and backward: 0.62 s in fp32, 0.41 s so (2-core x86 CPU, 2026-11-20).
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=lowers_products(device, precision))


def lowers_products(device: torch.device, precision: Precision) -> bool:
    """True if a job of this precision has its products in bfloat16 there."""
    return has_fast_bfloat16(device) if precision is Precision.AUTO else precision is Precision.BF16


def holds_lowered(device: torch.device, precision: Precision) -> bool:
    """True if weights that never change are held in bfloat16 for such products, not lowered for each.

    The bits are the same: autocast keeps no lowered copy of a weight that needs no gradient, and makes one in every
    call. SD1.5's factors are 1.08 billion values, so that is 6.5 GB to move and 700 launches in each forward pass. Not
    on the CPU, where pictures are drawn in fp32 with the same weights.
    """
    return device.type != "cpu" and lowers_products(device, precision)
