"""Guidance and sampler update of a batch in one kernel launch, in the place of a dozen small ones.

At batch 16 of 64x64 latents torch's form takes about fourteen launches and moves the latents as often; the kernel reads
and writes them once (kernels/sampler_step.py).
"""

from collections.abc import Sequence

import structlog
import torch
from torch import Tensor

from hueshift.engines.device_errors import Fault, classify
from hueshift.engines.transfer import to_device
from hueshift.kernels.launch import triton
from hueshift.kernels.sampler_step import NO_ROW, sampler_step

_log = structlog.get_logger()


class UpdateForm:
    """Whether steps are updated by the kernel: until it fails once, then by torch. For one thread, step after step."""

    def __init__(self) -> None:
        self._failed = False

    def update(
        self,
        x: Tensor,
        prev: Tensor,
        out: Tensor,
        guidance: Sequence[float],
        coefficients: Tensor,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Do what fused_update does, or nothing, and return None, where the kernel does not compile or launch here.

        Raises what says that memory is short or the device is lost.
        """
        if self._failed:
            return None
        try:
            return fused_update(x, prev, out, guidance, coefficients, noise)
        except Exception as error:
            # Triton has errors of its own. Nothing was written: what fails so has not been launched.
            if classify(error) is not Fault.OTHER:
                raise
            self._failed = True
            _log.error("sampler_step_failed", serves="torch", exc_info=error)
            return None


def fits(device: torch.device) -> bool:
    """True where the kernel runs and gains: on CUDA with Triton."""
    return device.type == "cuda" and triton is not None


def fused_update(
    x: Tensor, prev: Tensor, out: Tensor, guidance: Sequence[float], coefficients: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return x' and prev' of N samples, [N, C, h, w] fp32; x and prev are overwritten with them.

    `out` [N + G, C, h, w] has the samples' own rows, then the negative rows of the first G = len(guidance), which are
    the guided ones. `coefficients` [N, 6] is on the host; it goes to the device together with the guidance, in one
    copy.
    """
    count, guided = x.shape[0], len(guidance)
    scales = torch.zeros(count)
    scales[:guided] = torch.tensor(guidance)
    numbers = to_device(torch.cat([coefficients.flatten(), scales]), x.device)
    rows = torch.full((2, count), NO_ROW, dtype=torch.int32)
    rows[0] = torch.arange(count)
    rows[1, :guided] = torch.arange(count, count + guided)
    rows = to_device(rows, x.device)
    table, scales = numbers[: count * 6].view(count, 6), numbers[count * 6 :]
    sampler_step(x, prev, out.contiguous(), rows[0], rows[1], scales, table, noise)
    return x, prev
