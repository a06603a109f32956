"""The decomposition of a base model on the device that trains, held once for all jobs of a worker.

It is laid out as layers hold it, so that their weights are aliases of it: SD1.5's 1.08 billion values are 4.3 GB in
fp32, which each job would upload anew, and 2.2 GB where products are in bfloat16.
"""

import gc
import threading
from dataclasses import replace
from weakref import WeakValueDictionary

import structlog
import torch
from torch import Tensor

from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors

_log = structlog.get_logger()


class DeviceCopy:
    """Factors on a device; its memory stays for as long as a UNet, or who keeps it for the next one, holds this."""

    def __init__(self, factors: SpectralFactors) -> None:
        self.factors = factors


class HeldFactors:
    """Gives the UNets of one base model the same copy of `factors`, on the device of the base's own weights.

    It keeps the copy that was last asked for until `release`. Safe to call from several threads.
    """

    def __init__(self, base: BaseModel, factors: SpectralFactors) -> None:
        self._base, self._factors = base, factors
        self._lock = threading.Lock()
        self._kept: DeviceCopy | None = None
        # Those that a UNet has, kept or not: another UNet shares them.
        self._alive: WeakValueDictionary[torch.dtype, DeviceCopy] = WeakValueDictionary()

    def take(self, dtype: torch.dtype) -> DeviceCopy:
        """Return the copy in `dtype`, uploaded if there is none. Jobs of one precision come one after the other, so one
        of another dtype is not kept beside it."""
        with self._lock:
            # What holds it, if a UNet does, holds it for itself.
            self._kept = self._alive.get(dtype)
            if self._kept is None:
                self._kept = self._alive[dtype] = DeviceCopy(self._upload(dtype))
            return self._kept

    def release(self) -> bool:
        """Give the memory back unless a UNet still works with it; True if there was any to give."""
        with self._lock:
            if self._kept is None:
                return False
            dtypes = [dtype for dtype, copy in self._alive.items() if copy is self._kept]
            self._kept = None
            # A UNet's hooks know it, so one that nobody uses goes only when cycles are looked for.
            gc.collect()
            self._kept = next((self._alive[dtype] for dtype in dtypes if dtype in self._alive), None)
            if self._kept is not None:
                return False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _log.info("training.factors_released", base=self._base.base_hash[:16])
        return True

    def _upload(self, dtype: torch.dtype) -> SpectralFactors:
        u: dict[str, Tensor] = {}
        vh: dict[str, Tensor] = {}
        for layer in self._base.layout.matrices:
            weight = self._base.unet.get_parameter(f"{layer.name}.weight")
            # One layer after the other, so that never more than one lies there twice.
            u[layer.name] = self._factors.u[layer.name].to(weight.device).to(dtype)
            found = self._factors.vh[layer.name].to(weight.device).to(dtype)
            if weight.dim() == 4:
                found = found.view(-1, *weight.shape[1:]).contiguous(memory_format=torch.channels_last)
            vh[layer.name] = found
        return replace(self._factors, u=u, vh=vh, laid_out=True)
