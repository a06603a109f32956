"""How the CUDA engine runs, as the operator set it, and what it tells of."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import torch

from hueshift.engines.cuda_attention import AttentionTable


class CompileKind(StrEnum):
    """How a UNet becomes calls of the device."""

    NONE = "none"
    """Eagerly: every call launches its thousands of kernels one by one. For finding faults."""

    GRAPH = "graph"
    """Eager kernels, captured in a CUDA graph for each shape."""

    INDUCTOR = "inductor"
    """torch.compile's kernels, captured in the same graphs; other sizes than the warmed ones as with `graph`."""


class KernelUse(StrEnum):
    """Whether adapted layers run on the Triton kernels."""

    AUTO = "auto"
    """What was measured to be faster on this GPU, for each plan."""

    ON = "on"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaOptions:
    """`warm_sizes` are latent sizes (h, w) that are captured at start and stay; `max_area` the most latent positions of
    a picture; `graphs` the most captures of other shapes; `weight_slots` the mixes that can be merged at a time.
    `slot_weight_bytes` is the most memory for whole weights of every slot (slot_weights.py); None: a tenth of the
    device's. `autotune` lets torch.compile try many kernels for each product, which takes minutes at the first start.
    With `search_convolutions` cuDNN tries its algorithms for every shape that is captured at start.
    Without a `dtype` networks run in fp16 on a GPU and in fp32 on a CPU. Pictures with a side above `tile_above` pixels
    (0: none) are decoded in tiles (engines/vae.py).
    """

    warm_sizes: tuple[tuple[int, int], ...]
    max_area: int
    compile: CompileKind = CompileKind.GRAPH
    autotune: bool = False
    search_convolutions: bool = True
    attention: AttentionTable = field(default_factory=AttentionTable)
    kernels: KernelUse = KernelUse.AUTO
    weight_slots: int = 0
    slot_weight_bytes: int | None = 0
    graphs: int = 64
    dtype: torch.dtype | None = None
    tile_above: int = 0

    @property
    def searches(self) -> bool:
        """True if a start searches: calls that are never captured are not worth it."""
        return self.search_convolutions and self.compile is not CompileKind.NONE

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The dtype of the networks on a device."""
        return self.dtype or (torch.float32 if device.type == "cpu" else torch.float16)


class EngineObserver(Protocol):
    """Hears what an engine does beside its steps."""

    def captured(self, role: str) -> None:
        """A call was captured in a graph."""

    def compiled(self, role: str) -> None:
        """A network was compiled for a shape."""

    def merge_began(self) -> None:
        """The weights of a mix are being written."""

    def capacity(self, size: tuple[int, int], rows: int, free_bytes: int | None) -> None:
        """UNet rows of a latent size that fit in one call, with what is free on the device; None if not known."""


class Silent:
    """An EngineObserver that tells nobody."""

    def captured(self, role: str) -> None:
        """Nothing."""

    def compiled(self, role: str) -> None:
        """Nothing."""

    def merge_began(self) -> None:
        """Nothing."""

    def capacity(self, size: tuple[int, int], rows: int, free_bytes: int | None) -> None:
        """Nothing."""
